"""What is asked of a file that somebody else made, before any of it is believed.

Goes in: names, texts and files from strangers. Comes out: the same, or a ``ValueError`` that says
what is wrong, from which the door that asked makes an error of its own kind. Stands below all
rooms, because each has such a door; docs/security.md says what they promise together.
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
MAX_TENSORS = 50_000  # in a file; the largest public video models have some thousands
MAX_LAYERS = 1_000  # of one network; the largest public video models have 40
MAX_AXES = 16  # of one tensor; a video's have five
MAX_DIGITS = 20  # of a whole number in JSON: those of 2**64
MAX_TABLES = 2**28  # bytes of all tables of an mp4; those of a day of film are a third
MAX_BOXES = 2**20  # of an mp4; six days in fragments of a second have as many
MAX_PIXELS = 2**26  # of a picture or of a video's frame: 8192x8192

# What FFmpeg may take a file for: containers that hold their own media. It knows others that are
# lists of further files to open, such as HLS, DASH and concat, or programs, such as lavfi.
CONTAINERS = (
    "aac", "ac3", "aiff", "amr", "ape", "asf", "au", "avi", "caf", "dts", "eac3", "flac", "flv",
    "gif", "m4v", "matroska", "mov", "mp3", "mpeg", "mpegts", "mpegvideo", "ogg", "tta", "w64",
    "wav", "wv",
)  # fmt: skip

# safetensors' names of types, and the bits of one value.
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_METADATA = "__metadata__"
# Boxes of mp4 inside of which FFmpeg looks for others, wherever they stand.
_NESTS = {
    b"clip", b"dinf", b"edts", b"ilst", b"ipco", b"iprp", b"mdia", b"meta", b"minf", b"moof",
    b"moov", b"mvex", b"schi", b"sinf", b"stbl", b"stsd", b"traf", b"trak", b"tref", b"udta",
    b"wave", b"wide",
}  # fmt: skip
# Tables of the sizes of samples, of a film and of a fragment, and how far behind the name their
# number stands; or tables that are compressed, which say so there.
_TABLES = {b"stsz": 8, b"trun": 4, b"cmov": 4}
_TABLE = re.compile(b"|".join(_TABLES))
_MAX_NAME = 255  # bytes; what file systems hold
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in range(10)
}  # Windows opens these in any folder, with any suffix
# Without a glyph of their own: controls, halves of surrogate pairs, breaks of lines, and what
# writes backwards, so that "gpj.exe" reads "exe.jpg".
_HIDDEN = {"Cc", "Cs", "Zl", "Zp"}
_DIRECTIONS = {chr(code) for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F))} | {
    chr(code) for code in range(0x2066, 0x206A)
}


class TensorEntry(NamedTuple):
    """One tensor as the header of a safetensors file tells of it."""

    shape: tuple[int, ...]
    dtype: str


def is_file(path: Path) -> bool:
    """Tell whether a regular file is there; a name that cannot be a file's is none.

    Args:
        path: any, with any characters in it. Pipes and devices, which may never end, are no files.

    Returns:
        Whether there is such a file.
    """
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or a folder that may not be looked into
        return False


def is_folder(path: Path) -> bool:
    """Tell whether a folder is there; a name that cannot be a folder's is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_small(path: Path, limit: int = MAX_TEXT) -> bytes:
    """Read a whole file of which it is known that it must be small.

    Args:
        path: of a regular file.
        limit: most bytes that it may have.

    Returns:
        Its bytes.

    Raises:
        OSError: it is missing, no regular file, or cannot be read.
        ValueError: it is larger.
    """
    if not is_file(path):
        raise FileNotFoundError(2, "No such file", str(path))
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401 (whatever JSON says)
    """Read JSON that means one thing only.

    Args:
        text: one value, at most ``MAX_TEXT`` long; bytes are UTF-8.

    Returns:
        What it says.

    Raises:
        ValueError: it is longer, no JSON, nested deeper than Python reads, names a key twice, or
            has a number that is not finite or of more than ``MAX_DIGITS`` digits.
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
    """Tell whether a value is a number that a float can hold; true and false are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # compared, not converted: an int may be too long


def is_plain_name(name: object) -> bool:
    """Tell whether a name means one file of the folder it is used in, on every system.

    Args:
        name: from a stranger, of any type.

    Returns:
        False for anything but a string; one with a separator, a colon or a character that is not
        seen; ``.`` and ``..``; one that is too long, or ends in a dot or a space; one that another
        spelling would turn into something else, as full-width letters and dots are; and the names
        of Windows' devices.
    """
    if not isinstance(name, str) or not name or not name.isprintable():
        return False
    if unicodedata.normalize("NFKC", name) != name or any(c in name for c in '/\\:*?"<>|'):
        return False
    if name.endswith((".", " ")) or len(name.encode()) > _MAX_NAME:  # "." and ".." among them
        return False
    return name.split(".")[0].rstrip().upper() not in _DEVICES


def is_shown(text: str) -> bool:
    """Tell whether each character of a text shows itself, on one line, in the order it stands."""
    return not any(_is_hidden(char) for char in text)


def show(text: str) -> str:
    """Make a stranger's words safe to print: what does not show itself is spelt out.

    Args:
        text: any; may hold what a terminal takes for a command.

    Returns:
        The text with such characters spelt as Python spells them, by their number.
    """
    return "".join(ascii(char)[1:-1] if _is_hidden(char) else char for char in text)


def read_tensor_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read what a safetensors file says it holds, and none of the data.

    Sizes are compared with the file before anything of that size is made.

    Args:
        path: of the file.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: the header is damaged, larger than ``MAX_TEXT``, or names more than
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
    """Give the options that FFmpeg opens a stranger's file with.

    Args:
        protocols: where it may read from: ``file``, or ``none`` for bytes in memory. Never a
            network's.

    Returns:
        Options for container and streams: no other file is opened for this one, and no frame is
        made of more than ``MAX_PIXELS``.
    """
    return {
        "protocol_whitelist": protocols,
        "format_whitelist": ",".join(CONTAINERS),
        "max_pixels": str(MAX_PIXELS),
    }


def check_tables(file: BinaryIO) -> None:
    """Refuse an mp4 or mov file whose tables claim more samples than it has bytes.

    FFmpeg makes an entry in memory for each sample claimed, gigabytes for a file of a kilobyte.

    Args:
        file: open for reading, of any format; of others hardly anything is read.

    Raises:
        OSError: it cannot be read.
        ValueError: it claims more, has tables larger than ``MAX_TABLES``, more than ``MAX_BOXES``,
            or compressed tables, which no camera of this century makes.

    Source: ISO/IEC 14496-12, 4.2 (boxes), 8.7.3 (stsz) and 8.8.8 (trun).
    """
    num_bytes = file.seek(0, SEEK_END)
    place, num_boxes, num_read, num_samples = 0, 0, 0, 0
    while place + 8 <= num_bytes:
        file.seek(place)
        head = file.read(16).ljust(16, b"\0")
        size, kind = struct.unpack(">I4s", head[:8])
        if size == 1:  # it stands behind, in 64 bits
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
            # Searched, not parsed: who knows what FFmpeg finds inside.
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
    """Read one tensor of a header, and where its data begin and end."""
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
