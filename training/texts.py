"""Texts that people write: recipes, studies, captions.

Editors save them in several encodings. Only UTF-8 is read, with or without a byte order mark: in
another encoding the same bytes would be other letters.
"""

from __future__ import annotations

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path

_MARK = "\ufeff"  # of the byte order; inside a text it stays where files were joined


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Args:
        path: path of the file.

    Returns:
        The text without byte order marks, with line breaks as they are.

    Raises:
        OSError: if the file is missing or cannot be read.
        ValueError: if it is not UTF-8. The message does not contain the name of the file; the
            caller, which has it, converts the error to its own kind.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        is_utf16 = data.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
        found = "UTF-16" if is_utf16 else f"the byte {data[error.start]:#04x} at {error.start}"
        raise ValueError(f"it is no UTF-8 text, it has {found}; save it as UTF-8") from error
    if "\0" in text:  # UTF-16 without a mark, or no text at all
        raise ValueError("it is no UTF-8 text, it has bytes of zero; save it as UTF-8")
    return text.replace(_MARK, "")
