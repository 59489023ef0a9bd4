"""JSON from strangers is read with one meaning or refused, and large files are not read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.safe_io.json import MAX_DIGITS, MAX_TEXT, is_number, parse_json, read_small
from turbotalk_core.safe_io.paths import is_file

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


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
        ('{"a": 1}'.encode("utf-16"), "UTF-16; save it as UTF-8"),
        (b"\xfe\xff\0{\0}", "UTF-16; save it as UTF-8"),
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


def test_a_file_may_begin_with_a_byte_order_mark() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}\r\n\r\n') == {"a": 1}
