"""Untrusted media files: the containers that FFmpeg may open, and limits on the size of tables."""

from __future__ import annotations

import re
import struct
from functools import cache
from importlib.metadata import version
from io import SEEK_END
from typing import Any, BinaryIO

MAX_TABLES = 2**28  # bytes of all tables of an mp4; those of a day of film are a third
MAX_BOXES = 2**20  # of an mp4; six days in fragments of a second have as many
MAX_PIXELS = 2**26  # of a picture or of a video's frame: 8192x8192

# Formats that FFmpeg may open: containers with their own media. It supports others that are lists
# of further files to open, such as HLS, DASH and concat, or programs, such as lavfi.
CONTAINERS = (
    "aac", "ac3", "aiff", "amr", "ape", "asf", "au", "avi", "caf", "dts", "eac3", "flac", "flv",
    "gif", "m4v", "matroska", "mov", "mp3", "mpeg", "mpegts", "mpegvideo", "ogg", "tta", "w64",
    "wav", "wv",
)  # fmt: skip

_STREAM_OPTIONS_SINCE = (18, 1)  # version of PyAV, see open_arguments

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


def open_arguments(protocols: str) -> dict[str, Any]:
    """Return the arguments with which PyAV opens an untrusted file.

    PyAV before 18.1 may crash if it passes options to streams: some formats, such as MPEG program
    streams, show their streams only while they are read, when no memory for their options is left.
    There, the options are those of the container alone. ``MAX_PIXELS`` then has to be set on each
    decoder, as everywhere, but does not hold while the file is opened.

    Args:
        protocols: see ``media_options``.

    Returns:
        Keyword arguments of ``av.open``. Titles need not be UTF-8, and are not used.
    """
    name = "options" if _can_pass_options_to_streams() else "container_options"
    return {name: media_options(protocols), "metadata_errors": "replace"}


@cache
def _can_pass_options_to_streams() -> bool:
    parts = re.findall(r"\d+", version("av"))
    return tuple(map(int, parts[:2])) >= _STREAM_OPTIONS_SINCE


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
            # Searched, not parsed: FFmpeg may find a table where a parser would not.
            for table in _TABLE.finditer(data):
                start = table.end() + _TABLES[table[0]]
                count = data[start : start + 4]
                if table[0] == b"cmov" and count == b"dcom":
                    raise ValueError("its tables are compressed")
                num_samples += 0 if table[0] == b"cmov" else int.from_bytes(count, "big")
        if num_samples > num_bytes:
            raise ValueError(f"it claims {num_samples} samples, and has {num_bytes} bytes")
        place += size
