"""Headers of safetensors files are read whole or refused, and never allocate what they claim."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from turbotalk_core.safe_io.tensor_header import MAX_AXES, TensorEntry, read_tensor_header


def _write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 3), max_size=4),
        max_size=5,
    ),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn]),
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), min_size=1, max_size=3),
)
def test_a_header_says_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, list[int]],
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> None:
    path = tmp_path_factory.getbasetemp() / "saved.safetensors"
    path.write_bytes(
        save({name: torch.zeros(s, dtype=dtype) for name, s in shapes.items()}, metadata)
    )
    tensors, told = read_tensor_header(path)
    assert {name: list(entry.shape) for name, entry in tensors.items()} == shapes
    assert len({entry.dtype for entry in tensors.values()}) <= 1
    assert told == metadata


def test_the_sizes_of_parts_of_a_byte_are_known(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", {"a": _entry([3, 4], 0, 6, "F4")}, bytes(6))
    assert read_tensor_header(path)[0] == {"a": TensorEntry((3, 4), "F4")}


@pytest.mark.parametrize("length", [3, 10**6, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_claims_too_much_is_refused_without_room_for_it(
    tmp_path: Path, length: int
) -> None:
    path = _write(tmp_path / "a", b"{}", length=length)
    tracemalloc.start()
    with pytest.raises(ValueError, match="header would have"):
        read_tensor_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "Expecting value"),
        (b"[" * 100_000, "nested"),
        ([], "no JSON object"),
        ({"__metadata__": []}, "metadata"),
        ({"__metadata__": {"a": 1}}, "metadata"),
        (b'{"a": 1, "a": 1}', "twice"),
        ({"a": 1}, "entry of a is damaged"),
        ({"a": {}}, "entry of a is damaged"),
        ({"a": _entry([2], 0, 4)}, "do not fit"),
        ({"a": _entry([-1], 0, -4)}, "no shape"),
        ({"a": _entry([1.0], 0, 4)}, "no shape"),
        ({"a": _entry([True], 0, 4)}, "no shape"),
        ({"a": _entry("1", 0, 4)}, "no shape"),
        ({"a": _entry([1] * (MAX_AXES + 1), 0, 4)}, "no shape"),
        ({"a": _entry([1], 0, 4, "F31")}, "damaged"),
        ({"a": _entry([1], 0, 4, [])}, "damaged"),
        ({"a": _entry([1], 4, 8)}, "gap at byte 0"),
        ({"a": _entry([1], 0, 4), "b": _entry([1], 0, 4)}, "overlap"),
        ({"a": _entry([2**40], 0, 2**42)}, "would have 4398046511104 bytes, 4 are there"),
        ({}, "would have 0 bytes, 4 are there"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tensor_header(_write(tmp_path / "a", header, bytes(4)))


def test_more_tensors_than_any_model_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "a", {str(number): _entry([0], 0, 0) for number in range(4)})
    assert len(read_tensor_header(path)[0]) == 4
    monkeypatch.setattr("turbotalk_core.safe_io.tensor_header.MAX_TENSORS", 3)
    with pytest.raises(ValueError, match="names 4 tensors, at most 3"):
        read_tensor_header(path)


@pytest.mark.parametrize("size", range(8))
def test_a_file_without_a_header_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"ends after {size} bytes"):
        read_tensor_header(tmp_path / "a")
