"""Untrusted names: which of them mean a file, and how they are printed."""

from __future__ import annotations

import unicodedata
from pathlib import Path

_MAX_NAME = 255  # bytes; the limit of file systems
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in range(10)
}  # Windows opens these in any folder, with any suffix
# Characters without a glyph: controls, halves of surrogate pairs, line breaks, and those that
# change the direction of text, with which "gpj.exe" is displayed as "exe.jpg".
_HIDDEN = {"Cc", "Cs", "Zl", "Zp"}
_DIRECTIONS = {chr(code) for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F))} | {
    chr(code) for code in range(0x2066, 0x206A)
}


def is_file(path: Path) -> bool:
    """Check whether a path is a regular file; a name that no file can have is none.

    Args:
        path: any path, with any characters.

    Returns:
        True for a regular file; False for pipes and devices, which may never end, and all else.
    """
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long, or the folder may not be read
        return False


def is_folder(path: Path) -> bool:
    """Check whether a path is a folder; a name that no folder can have is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_plain_name(name: object) -> bool:
    """Check whether a name means one file of the folder it is used in, on every system.

    Args:
        name: untrusted name, of any type.

    Returns:
        False for anything but a string; one with a separator, a colon or an invisible character;
        ``.`` and ``..``; one that is too long, or ends in a dot or a space; one that Unicode
        normalisation would change, such as full-width letters and dots; and the names of Windows'
        devices.
    """
    if not isinstance(name, str) or not name or not name.isprintable():
        return False
    if unicodedata.normalize("NFKC", name) != name or any(c in name for c in '/\\:*?"<>|'):
        return False
    if name.endswith((".", " ")) or len(name.encode()) > _MAX_NAME:  # "." and ".." among them
        return False
    return name.split(".")[0].rstrip().upper() not in _DEVICES


def is_shown(text: str) -> bool:
    """Check whether every character is visible, on one line, in the order of the text."""
    return not any(_is_hidden(char) for char in text)


def show(text: str) -> str:
    """Return a text that is safe to print: characters that are not visible are escaped.

    Args:
        text: any; may contain control sequences of a terminal.

    Returns:
        The text with such characters as Python's escape sequences.
    """
    return "".join(ascii(char)[1:-1] if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in _HIDDEN or char in _DIRECTIONS
