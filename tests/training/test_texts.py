"""Texts are read in UTF-8 with or without a mark, and refused in other encodings."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.texts import read_text

TEXT = "Zoë spricht.\nUnd hört zu."


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", 2 * b"\xef\xbb\xbf"])
def test_byte_order_marks_are_no_part_of_a_text(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(mark + TEXT.encode() + mark)  # as joined files have them
    assert read_text(path) == TEXT


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (TEXT.encode("utf-16"), "UTF-16"),
        (TEXT.encode("utf-16-be"), "no UTF-8 text"),
        ("plain".encode("utf-16-le"), "bytes of zero"),
        (TEXT.encode("cp1252"), "the byte 0xeb at 2"),
        (b"\x89PNG\r\n\x1a\n", "the byte 0x89 at 0"),
    ],
)
def test_other_encodings_are_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{reason}.*save it as UTF-8"):
        read_text(path)
