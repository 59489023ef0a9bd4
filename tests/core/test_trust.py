"""Untrusted names, JSON and headers: accepted as a whole or refused, and always checked."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from turbotalk_core.trust import (
    MAX_AXES,
    MAX_DIGITS,
    MAX_TEXT,
    TensorEntry,
    check_tables,
    is_file,
    is_number,
    is_plain_name,
    is_shown,
    parse_json,
    read_small,
    read_tensor_header,
    show,
)

RIGHT_TO_LEFT = "\u202e"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["a", "chunk_00000.mkv", "model-00001-of-00002.safetensors", "模型.safetensors",
             "Gespräch 3.mkv", ".hidden", "-", "console.log", "nullify"],
)  # fmt: skip
def test_plain_names(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "...", "a/b", "a\\b", "../a", "/a", "C:a", "C:\\a", "a\0", "a\n", "a\x1b[2J",
     "a.", "a ", "*.mkv", "a?", "a|b", "CON", "nul", "NUL.mkv", "aux.tar.gz", "com1", "LPT9.txt",
     "con .mkv", "CONIN$", "COM¹", f"{RIGHT_TO_LEFT}vkm.a", "\uff0e\uff0e\uff0fa", "\uff41.mkv",
     "\u200ba", "a\ufeff", "a\ud800", "x" * 256, "é" * 128, "e\u0301", None, 3, b"a", ["a"]],
)  # fmt: skip
def test_names_with_a_trick(name: object) -> None:
    assert not is_plain_name(name)


@given(st.text())
def test_a_plain_name_stays_in_its_folder(name: str) -> None:
    if is_plain_name(name):
        folder = Path("/folder")
        assert Path(os.path.normpath(folder / name)).parent == folder
        assert (folder / name).name == name


@given(st.text())
def test_what_is_shown_holds_no_command(text: str) -> None:
    shown = show(text)
    assert is_shown(shown)
    assert shown.encode().decode() == shown  # no half of a pair is left
    assert (shown == text) == is_shown(text)


def test_what_does_not_show_itself_is_spelt_out() -> None:
    assert show("a\x1b[2J\nb") == r"a\x1b[2J\nb"
    assert show(f"{RIGHT_TO_LEFT}x\ud800\x00") == r"\u202ex\ud800\x00"
    assert show("Zoë 模型 👩\u200d🚀") == "Zoë 模型 👩\u200d🚀"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, True), (-2.5, True), (2**64, True), (True, False), ("1", False), (None, False),
     (float("nan"), False), (float("inf"), False), (10**400, False), (-(10**400), False)],
)  # fmt: skip
def test_numbers(value: object, expected: bool) -> None:
    assert is_number(value) == expected


@given(JSON)
def test_json_of_one_meaning_is_read(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text) == value
    assert parse_json(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("\ufeff{}", "BOM"),
        (b"\xff", "utf-8"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "names 'c' twice"),
        ("[NaN]", "NaN"),
        ("-Infinity", "-Infinity"),
        ("1e999", "no float holds"),
        ("1" * (MAX_DIGITS + 1), "more than 20 digits"),
        ("1" * 5_000, "more than 20 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (" " * (MAX_TEXT + 1), "more than"),
    ],
)
def test_json_of_another_kind_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@given(st.text() | st.binary())
def test_any_text_is_json_or_a_value_error(text: str | bytes) -> None:
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x/" * 3_000, "\ud800"])
def test_a_name_that_cannot_be_is_no_file(tmp_path: Path, name: str) -> None:
    assert not is_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / name)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(FileNotFoundError):
            read_small(tmp_path / name)


def test_a_small_file_is_read_and_a_large_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_small(path, 4)


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
    monkeypatch.setattr("turbotalk_core.trust.MAX_TENSORS", 3)
    with pytest.raises(ValueError, match="names 4 tensors, at most 3"):
        read_tensor_header(path)


def _box(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    return struct.pack(">I4s", len(content) + 8 if size is None else size, kind) + content


def _sizes(count: int, size: int = 1) -> bytes:
    return _box(b"stsz", struct.pack(">III", 0, size, count))


def _run(count: int) -> bytes:
    return _box(b"moof", _box(b"traf", _box(b"trun", struct.pack(">II", 0, count))))


MOOV = _box(b"ftyp", b"isom") + _box(b"moov", _box(b"trak", _sizes(48)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"RIFF" + bytes(100),
        MOOV,
        MOOV + _box(b"mdat", bytes(100)),
        MOOV + _box(b"mdat", bytes(200) + _sizes(2**31), size=0),
        MOOV + _box(b"mdat", struct.pack(">Q", 30) + bytes(14), size=1),
        MOOV + _box(b"mdat", _sizes(2**31)) + _box(b"free", _sizes(2**31)),
        _box(b"WAVE", _sizes(2**31), size=0),
        MOOV + b"".join(_run(3) for _ in range(9)),
        MOOV + bytes(100),
        MOOV + _box(b"mdat", b"", size=3),
    ],
)
def test_tables_that_can_be_are_let_pass(data: bytes) -> None:
    check_tables(BytesIO(data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_box(b"moov", _sizes(2**32 - 1)), "claims 4294967295 samples, and has 28 bytes"),
        (_box(b"moov", _sizes(29)), "claims 29 samples"),
        (_box(b"udta", _box(b"meta", _sizes(2**31))), "claims"),
        (_box(b"stsd", bytes(90) + _sizes(2**31)), "claims"),
        (_box(b"mdat", bytes(8)) + _box(b"moov", _sizes(2**31), size=0), "claims"),
        (_box(b"moov", struct.pack(">Q", 36) + _sizes(2**31), size=1), "claims"),
        (MOOV + _box(b"moov", _sizes(2**31), size=2**31), "claims"),
        (_run(2**31), "claims"),
        (_box(b"moov", b"stsz" + _sizes(2**31)), "claims"),  # the name before hides it
        (_box(b"moov", b"stsztrun" + _sizes(2**31)), "claims"),
        (b"".join(_run(40) for _ in range(9)), "claims 320 samples, and has 288 bytes"),
        (_box(b"moov", _box(b"cmov", _box(b"dcom", b"zlib"))), "compressed"),
    ],
)
def test_tables_that_claim_more_than_there_is_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tables(BytesIO(data))


def test_endless_tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = _box(b"udta", bytes(8)) * 4
    check_tables(BytesIO(boxes))
    monkeypatch.setattr("turbotalk_core.trust.MAX_BOXES", 3)
    with pytest.raises(ValueError, match="larger than those of any film"):
        check_tables(BytesIO(boxes))
    monkeypatch.undo()
    monkeypatch.setattr("turbotalk_core.trust.MAX_TABLES", 63)
    with pytest.raises(ValueError, match="larger than those of any film"):
        check_tables(BytesIO(boxes))


@given(st.binary())
def test_any_bytes_have_tables_or_not(data: bytes) -> None:
    try:
        check_tables(BytesIO(data))
    except ValueError as error:
        told = str(error)
    else:
        told = "it claims"
    assert "it claims" in told or "its tables" in told


@pytest.mark.parametrize("size", range(8))
def test_a_file_without_a_header_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"ends after {size} bytes"):
        read_tensor_header(tmp_path / "a")
