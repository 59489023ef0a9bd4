"""Tables of media files are let pass where they can be true, and refused where they cannot."""

from __future__ import annotations

import struct
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.safe_io.media import check_tables


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
    monkeypatch.setattr("turbotalk_core.safe_io.media.MAX_BOXES", 3)
    with pytest.raises(ValueError, match="larger than those of any film"):
        check_tables(BytesIO(boxes))
    monkeypatch.undo()
    monkeypatch.setattr("turbotalk_core.safe_io.media.MAX_TABLES", 63)
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
