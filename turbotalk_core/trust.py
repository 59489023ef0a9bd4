"""Validation of untrusted names, texts and files before they are used.

A ``ValueError`` says what is wrong; the entry point that called converts it to an error of its own
kind. Below all rooms, because each has such entry points; docs/security.md lists what they
guarantee together.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
import unicodedata
from io import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MAX_TEXT = 16 * 2**20  # bytes of a JSON file, or of the header of a safetensors file
MAX_TENSORS = 50_000  # per file; the largest public video models have some thousands
MAX_LAYERS = 1_000  # of one network; the largest public video models have 40
MAX_AXES = 16  # of one tensor; a video's have five
MAX_DIGITS = 20  # of an integer in JSON; 2**64 has as many
MAX_TABLES = 2**28  # bytes of all tables of an mp4; those of a day of video take a third
MAX_BOXES = 2**20  # of an mp4; six days in fragments of a second have as many
MAX_PIXELS = 2**26  # of a picture or of a video's frame: 8192x8192

# Formats that FFmpeg may open: containers with their own media. It supports others that are lists
# of further files to open, such as HLS, DASH and concat, or programs, such as lavfi.
CONTAINERS = (
    "aac", "ac3", "aiff", "amr", "ape", "asf", "au", "avi", "caf", "dts", "eac3", "flac", "flv",
    "gif", "m4v", "matroska", "mov", "mp3", "mpeg", "mpegts", "mpegvideo", "ogg", "tta", "w64",
    "wav", "wv",
)  # fmt: skip

# safetensors' names of dtypes, and the bits of one value.
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_METADATA = "__metadata__"
# Boxes of mp4 in which FFmpeg searches for further boxes, at any place.
_NESTS = {
    b"clip", b"dinf", b"edts", b"ilst", b"ipco", b"iprp", b"mdia", b"meta", b"minf", b"moof",
    b"moov", b"mvex", b"schi", b"sinf", b"stbl", b"stsd", b"traf", b"trak", b"tref", b"udta",
    b"wave", b"wide",
}  # fmt: skip
# Tables with the sizes of samples, of a whole video and of a fragment, and the distance from their
# name to the number of samples; and compressed tables, which have their mark at that distance.
_TABLES = {b"stsz": 8, b"trun": 4, b"cmov": 4}
_TABLE = re.compile(b"|".join(_TABLES))
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


class TensorEntry(NamedTuple):
    """Entry of one tensor in the header of a safetensors file."""

    shape: tuple[int, ...]
    dtype: str


def is_file(path: Path) -> bool:
    """Return whether a path is a regular file; a name that no file can have is none.

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
    """Return whether a path is a folder; a name that no folder can have is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_small(path: Path, limit: int = MAX_TEXT) -> bytes:
    """Read a whole file that must be small.

    Args:
        path: path of a regular file.
        limit: largest allowed size, bytes.

    Returns:
        Its bytes.

    Raises:
        OSError: if the file is missing, no regular file, or cannot be read.
        ValueError: if it is larger.
    """
    if not is_file(path):
        raise FileNotFoundError(2, "No such file", str(path))
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401 (any JSON value)
    """Parse JSON strictly, so that it has one meaning only.

    Args:
        text: one JSON value, at most ``MAX_TEXT`` long; bytes are UTF-8.

    Returns:
        The value.

    Raises:
        ValueError: if the text is longer, no JSON, nested too deeply for Python, has a key twice,
            or has a number that is not finite or has more than ``MAX_DIGITS`` digits.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"it has more than {MAX_TEXT} characters")
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        return json.loads(
            text,
            object_pairs_hook=_pair_once,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_number(value: object) -> bool:
    """Return whether a value is a number in the range of a float; true and false are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # compared, not converted: an int may be too long


def is_plain_name(name: object) -> bool:
    """Return whether a name is that of one file in the folder it is used in, on every system.

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
    """Return whether all characters of a text are visible, on one line, and in reading order."""
    return not any(_is_hidden(char) for char in text)


def show(text: str) -> str:
    """Escape an untrusted text for printing.

    Args:
        text: any text; it may contain control characters that terminals interpret as commands.

    Returns:
        The text with invisible characters replaced by Python's escape sequences.
    """
    return "".join(ascii(char)[1:-1] if _is_hidden(char) else char for char in text)


def read_tensor_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read and check the header of a safetensors file, without the data.

    Sizes are compared with that of the file before memory of that size is allocated.

    Args:
        path: path of the file.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        OSError: if the file is missing or cannot be read.
        ValueError: if the header is damaged, larger than ``MAX_TEXT``, or has more than
            ``MAX_TENSORS`` tensors; or the tensors do not fill the file exactly.

    Source: the format's own description, github.com/huggingface/safetensors.
    """
    with path.open("rb") as file:
        num_bytes = path.stat().st_size
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"it ends after {len(start)} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_TEXT:
            raise ValueError(f"its header would have {length} bytes, at most {MAX_TEXT} are read")
        if length > num_bytes - 8:
            raise ValueError(f"its header would have {length} bytes, {num_bytes - 8} are there")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are no texts by name")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it names {len(header)} tensors, at most {MAX_TENSORS} are read")
    tensors = {}
    spans = []
    for name, told in header.items():
        tensors[name], span = _read_entry(name, told)
        spans.append(span)
    edge = 0
    for begin, end in sorted(spans):
        if begin != edge:
            raise ValueError(f"its tensors overlap or leave a gap at byte {edge}")
        edge = end
    if edge != num_bytes - 8 - length:
        raise ValueError(f"its tensors would have {edge} bytes, {num_bytes - 8 - length} are there")
    return tensors, metadata


def media_options(protocols: str) -> dict[str, str]:
    """Return the options with which FFmpeg opens an untrusted file.

    Args:
        protocols: allowed protocols: ``file``, or ``none`` for bytes in memory. Never one of a
            network.

    Returns:
        Options for container and streams: they limit formats and protocols, so that no other file
        is opened, and frames to ``MAX_PIXELS``.
    """
    return {
        "protocol_whitelist": protocols,
        "format_whitelist": ",".join(CONTAINERS),
        "max_pixels": str(MAX_PIXELS),
    }


def check_tables(file: BinaryIO) -> None:
    """Check that the tables of an mp4 or mov file declare no more samples than it has bytes.

    FFmpeg allocates an entry for each declared sample, gigabytes for a file of a kilobyte.

    Args:
        file: file open for reading, of any format; of others hardly anything is read.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it declares more, its tables exceed ``MAX_TABLES``, its boxes ``MAX_BOXES``,
            or its tables are compressed, as no camera of this century writes them.

    Source: ISO/IEC 14496-12, 4.2 (boxes), 8.7.3 (stsz) and 8.8.8 (trun).
    """
    num_bytes = file.seek(0, SEEK_END)
    place, num_boxes, num_read, num_samples = 0, 0, 0, 0
    while place + 8 <= num_bytes:
        file.seek(place)
        head = file.read(16).ljust(16, b"\0")
        size, kind = struct.unpack(">I4s", head[:8])
        if size == 1:  # the size follows in 64 bits
            (size,) = struct.unpack(">Q", head[8:])
        size = min(size or num_bytes, num_bytes - place)  # 0 means up to the end
        if size < 8:
            return
        num_boxes += 1
        num_read += size if kind in _NESTS else 0
        if num_read > MAX_TABLES or num_boxes > MAX_BOXES:
            raise ValueError("its tables are larger than those of any film")
        if kind in _NESTS:
            file.seek(place)
            data = file.read(size)
            # Searched, not parsed: FFmpeg may find boxes at places that a parser would not.
            for table in _TABLE.finditer(data):
                start = table.end() + _TABLES[table[0]]
                count = data[start : start + 4]
                if table[0] == b"cmov" and count == b"dcom":
                    raise ValueError("its tables are compressed")
                num_samples += 0 if table[0] == b"cmov" else int.from_bytes(count, "big")
        if num_samples > num_bytes:
            raise ValueError(f"it claims {num_samples} samples, and has {num_bytes} bytes")
        place += size


def _read_entry(name: str, told: object) -> tuple[TensorEntry, tuple[int, int]]:
    """Return one tensor's entry in a header, and the range of its data in the file."""
    try:
        if not isinstance(told, dict):
            raise TypeError(told)
        dtype, shape, (begin, end) = told["dtype"], told["shape"], told["data_offsets"]
        counts = [*shape, begin, end]
        is_whole = all(type(count) is int and count >= 0 for count in counts)
        bits = _BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its entry of {name} is damaged") from error
    if not is_whole or not isinstance(shape, list) or len(shape) > MAX_AXES:
        raise ValueError(f"its entry of {name} is damaged: that is no shape")
    if math.prod(shape) * bits != 8 * (end - begin):
        raise ValueError(f"its entry of {name} is damaged: shape, type and bytes do not fit")
    return TensorEntry(tuple(shape), dtype), (begin, end)


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in _HIDDEN or char in _DIRECTIONS


def _pair_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, value in pairs:
        if name in told:
            raise ValueError(f"it names {name[:40]!r} twice")
        told[name] = value
    return told


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it has {name}, which is no number of JSON")


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {text[:40]}, which no float holds")
    return value


def _parse_int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"it has a number of more than {MAX_DIGITS} digits")
    return int(text)
