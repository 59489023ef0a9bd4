"""Photos as phones save them: HEIF files, of one picture or of tiles, from their boxes.

Source of the layout: ISO/IEC 14496-12, 8.11 (items), and 23008-12 (pictures as items).
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import cast

import av
import numpy as np
from av import VideoStream

TILE = 64  # pixels of a tile's side


@dataclass(frozen=True, kw_only=True)
class Item:
    """Picture of a file: its four-letter type, its data, and its properties by number from 1."""

    kind: bytes
    data: bytes
    properties: Sequence[int]


def box(kind: bytes, *content: bytes) -> bytes:
    """Return a box of an mp4 or HEIF file."""
    joined = b"".join(content)
    return struct.pack(">I4s", 8 + len(joined), kind) + joined


def full_box(kind: bytes, version: int, *content: bytes) -> bytes:
    """Return a box with a version."""
    return box(kind, struct.pack(">I", version << 24), *content)


def make_heif(
    items: Sequence[Item],
    properties: Sequence[bytes],
    references: Sequence[bytes],
    primary: int = 1,
) -> bytes:
    """Return a file of items, which are numbered from 1.

    Args:
        items: pictures.
        properties: boxes that the items refer to.
        references: boxes of references between items.
        primary: number of the item that is shown.
    """
    numbered = list(enumerate(items, 1))
    entries = [
        full_box(b"infe", 2, struct.pack(">HH", number, 0), item.kind, b"\0")
        for number, item in numbered
    ]
    uses = [
        struct.pack(">HB", number, len(item.properties)) + bytes(item.properties)
        for number, item in numbered
    ]
    handler = full_box(b"hdlr", 0, struct.pack(">I4s12s", 0, b"pict", bytes(12)), b"\0")
    count = struct.pack(">H", len(items))
    information = full_box(b"iinf", 0, count, *entries)
    of_items = box(
        b"iprp",
        box(b"ipco", *properties),
        full_box(b"ipma", 0, struct.pack(">I", len(items)), *uses),
    )
    head = box(b"ftyp", b"heic", bytes(4), b"mif1heic")

    def describe(start: int) -> bytes:
        places = []
        for number, item in numbered:
            places.append(struct.pack(">HHHII", number, 0, 1, start, len(item.data)))
            start += len(item.data)
        return full_box(
            b"meta",
            0,
            handler,
            full_box(b"pitm", 0, struct.pack(">H", primary)),
            full_box(b"iloc", 0, b"\x44\0", count, *places),
            information,
            full_box(b"iref", 0, *references) if references else b"",
            of_items,
        )

    start = len(head) + len(describe(0)) + 8
    return head + describe(start) + box(b"mdat", *(item.data for item in items))


def make_photo(pixels_HWC: np.ndarray, *extra: bytes, has_thumbnail: bool = False) -> bytes:
    """Return a photo of one item; with a thumbnail, that comes first.

    Args:
        pixels_HWC: uint8 picture.
        *extra: further properties of it, such as its rotation.
        has_thumbnail: whether a smaller picture lies in the file, too.
    """
    setup, data = _encode(pixels_HWC)
    small_setup, small = _encode(pixels_HWC[::2, ::2])
    used = [*range(1, 3 + len(extra))]
    properties = [setup, _size(pixels_HWC), *extra, small_setup, _size(pixels_HWC[::2, ::2])]
    photo = Item(kind=b"hvc1", data=data, properties=used)
    if not has_thumbnail:
        return make_heif([photo], properties, [])
    thumbnail = Item(kind=b"hvc1", data=small, properties=[len(used) + 1, len(used) + 2])
    reference = box(b"thmb", struct.pack(">HHH", 1, 1, 2))
    return make_heif([thumbnail, photo], properties, [reference], primary=2)


def make_tiled_photo(num_tiles: int = 2) -> bytes:
    """Return a photo of tiles side by side, with a thumbnail, as phones save it."""
    setup, data = _encode(np.full((TILE, TILE, 3), 90, dtype=np.uint8))
    whole = np.empty((TILE, num_tiles * TILE, 3))
    grid = struct.pack(">BBBBHH", 0, 0, 0, num_tiles - 1, whole.shape[1], TILE)
    tile = Item(kind=b"hvc1", data=data, properties=[1, 2])
    numbers = range(2, 2 + num_tiles)
    references = [
        box(b"dimg", struct.pack(f">HH{num_tiles}H", 1, num_tiles, *numbers)),
        box(b"thmb", struct.pack(">HHH", 2 + num_tiles, 1, 1)),
    ]
    items = [Item(kind=b"grid", data=grid, properties=[3]), *[tile] * num_tiles, tile]
    return make_heif(items, [setup, _size(np.empty((TILE, TILE))), _size(whole)], references)


def _size(pixels_HWC: np.ndarray) -> bytes:
    height, width = pixels_HWC.shape[:2]
    return full_box(b"ispe", 0, struct.pack(">II", width, height))


def _encode(pixels_HWC: np.ndarray) -> tuple[bytes, bytes]:
    """Return the decoder's setup, as a property, and the data of a picture in H.265."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as opened:
        options = {"x265-params": "log-level=none:keyint=1", "crf": "4"}
        stream = cast(VideoStream, opened.add_stream("libx265", rate=1, options=options))
        stream.height, stream.width = pixels_HWC.shape[:2]
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
        opened.mux(stream.encode(frame))
        opened.mux(stream.encode(None))
    with av.open(BytesIO(file.getvalue())) as opened:
        stream = opened.streams.video[0]
        setup = box(b"hvcC", bytes(stream.codec_context.extradata or b""))
        return setup, b"".join(bytes(packet) for packet in opened.demux(stream) if packet.size)
