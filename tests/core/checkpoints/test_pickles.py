"""Pickle files: tensors alone are accepted, sizes are bounded, and no code is run."""

from __future__ import annotations

import pickletools
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from turbotalk_core.checkpoints.pickles import load_pickle

TENSORS = {
    "a": torch.tensor([[1.5, -2.0], [0.25, 8.0]]),
    "b": torch.nn.Parameter(torch.tensor([0.1, 3.0])),
    **{
        str(dtype): torch.tensor([1, 2]).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                      torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8,
                      torch.uint8, torch.bool)
    },
}  # fmt: skip


class _Call:
    """Object whose pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self._told = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self._told


def _save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def _rewrite(path: Path, change: Callable[[bytes], bytes], how: int = zipfile.ZIP_STORED) -> Path:
    """Change the pickle inside a file, and pack it again."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    return path


def test_tensors_come_back_as_they_are(tmp_path: Path) -> None:
    for content in (TENSORS, OrderedDict(TENSORS)):
        loaded = load_pickle(_save(tmp_path / "a.pth", content))
        assert type(loaded) is dict
        assert loaded.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name].float(), tensor.float())


def test_a_modules_state_comes_back(tmp_path: Path) -> None:
    state = torch.nn.BatchNorm1d(3).state_dict()
    loaded = load_pickle(_save(tmp_path / "a.pth", state))
    assert loaded.keys() == state.keys()


def test_two_names_of_one_matrix_are_common(tmp_path: Path) -> None:
    matrix = torch.ones(30, 30)
    loaded = load_pickle(_save(tmp_path / "a.pth", {"a": matrix, "b": matrix}))
    assert torch.equal(loaded["a"], loaded["b"])


@pytest.mark.parametrize(
    "content",
    [
        _Call(print, "a file must not run this"),
        _Call(bytearray, 2**31),  # torch's own list allows it
        _Call(torch.Tensor, 2**30),  # and this, which shows what was in memory before
        _Call(torch.device, "cpu"),
        torch.ones(3).to_sparse(),
        torch.empty(10**9, 10**9, device="meta"),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.ones(2, dtype=torch.complex64),
        b"bytes",
        {1, 2},
    ],
)
def test_what_is_no_plain_tensor_is_not_even_asked_for(
    tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _save(tmp_path / "a.pth", {"a": torch.ones(1), "b": content})
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"it asks for .*, and may hold tensors alone"):
        load_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content", [{"a": {"b": torch.ones(1)}}, {"a": 1}, {1: torch.ones(1)}, {"a": "text"}]
)
def test_more_than_tensors_by_name_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match="holds more than tensors by name"):
        load_pickle(_save(tmp_path / "a.pth", content))


def test_a_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="items"):
        load_pickle(_save(tmp_path / "a.pth", [torch.ones(1)]))


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would have 4000000000000 bytes, more than the file"):
        load_pickle(_save(tmp_path / "a.pth", {"a": torch.ones(1).expand(10**6, 10**6)}))


def test_many_tensors_of_the_same_bytes_are_refused(tmp_path: Path) -> None:
    matrix = torch.ones(100, 100)
    with pytest.raises(ValueError, match="more than the file"):
        load_pickle(_save(tmp_path / "a.pth", {str(number): matrix for number in range(9)}))


def test_a_pickle_cannot_change_how_it_is_read(tmp_path: Path) -> None:
    content = OrderedDict(a=torch.ones(2))
    content.itemz = content.keyz = "no function"  # pyright: ignore[reportAttributeAccessIssue]
    path = _save(tmp_path / "a.pth", content)
    _rewrite(path, lambda data: data.replace(b"itemz", b"items").replace(b"keyz", b"keys"))
    assert torch.equal(load_pickle(path)["a"], torch.ones(2))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.pth", {"a": torch.ones(2)})
    bomb = _rewrite(path, lambda data: data[:-1] + b"N0" * 10**7 + b".", zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**5
    tracemalloc.start()
    with pytest.raises(ValueError, match="compressed"):
        load_pickle(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_an_endless_description_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.pth", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="not described once"):
        load_pickle(_rewrite(path, lambda data: data[:-1] + b"N0" * 2**20 + b"."))


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/b.txt", "text")
    with pytest.raises(ValueError, match="not described once"):
        load_pickle(tmp_path / "a.pth")


def test_code_named_in_another_way_is_refused(tmp_path: Path) -> None:
    named = b"\x8c\x08builtins\x8c\x05print\x93\x8c\x02hi\x85R."  # STACK_GLOBAL, protocol 4
    assert [op.name for op, _, _ in pickletools.genops(named)][2] == "STACK_GLOBAL"
    path = _save(tmp_path / "a.pth", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="it asks for None"):
        load_pickle(_rewrite(path, lambda _: b"\x80\x04" + named))


@given(st.integers(0, 10**6), st.integers(-(2**31), 2**31 - 1))
def test_any_number_in_a_pickle_is_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, number: int
) -> None:
    """Sizes, strides and offsets that are not the tensor's."""
    path = _save(tmp_path_factory.getbasetemp() / "a.pth", {"a": torch.ones(2, 3)})

    def change(data: bytes) -> bytes:
        numbers = [
            (position, op)
            for op, value, position in pickletools.genops(data)
            if op.name == "BININT1" and position is not None
        ]
        position, _ = numbers[place % len(numbers)]
        return data[:position] + b"J" + struct.pack("<i", number) + data[position + 2 :]

    try:
        tensors: dict[str, Tensor] = load_pickle(_rewrite(path, change))
    except ValueError:
        return
    assert sum(t.numel() for t in tensors.values()) <= path.stat().st_size
    for tensor in tensors.values():
        tensor.double().sum()


@given(st.binary(max_size=400))
def test_any_pickle_is_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = _save(tmp_path_factory.getbasetemp() / "b.pth", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"."):
        load_pickle(_rewrite(path, lambda _: data))


@pytest.mark.parametrize("data", [b"", b"PK", b"\x80\x02N."])
def test_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(ValueError, match="not a zip"):
        load_pickle(tmp_path / "a.pth")
