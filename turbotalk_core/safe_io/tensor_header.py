"""Headers of untrusted safetensors files, checked against the size of the file."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import NamedTuple

from .json import MAX_TEXT, parse_json

MAX_TENSORS = 50_000  # per file; the largest public video models have some thousands
MAX_LAYERS = 1_000  # of one network; the largest public video models have 40
MAX_AXES = 16  # of one tensor; a video's have five

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


class TensorEntry(NamedTuple):
    """One tensor as the header of a safetensors file describes it."""

    shape: tuple[int, ...]
    dtype: str


def read_tensor_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the header of a safetensors file, and none of the data.

    Sizes are compared with the file before memory of that size is allocated.

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
    for name, entry in header.items():
        tensors[name], span = _read_entry(name, entry)
        spans.append(span)
    edge = 0
    for begin, end in sorted(spans):
        if begin != edge:
            raise ValueError(f"its tensors overlap or leave a gap at byte {edge}")
        edge = end
    if edge != num_bytes - 8 - length:
        raise ValueError(f"its tensors would have {edge} bytes, {num_bytes - 8 - length} are there")
    return tensors, metadata


def _read_entry(name: str, entry: object) -> tuple[TensorEntry, tuple[int, int]]:
    """Return one tensor's entry in a header, and the range of its data in the file."""
    try:
        if not isinstance(entry, dict):
            raise TypeError(entry)
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
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
