"""Journals: after a power failure they contain exactly what was written before."""

import json
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.errors import OutputError
from turbotalk_core.takes import journal as journal_module
from turbotalk_core.takes.journal import Journal

RECORDS = st.lists(st.dictionaries(st.text(), st.integers(-(2**64), 2**64) | st.text()), max_size=4)


@given(RECORDS)
def test_records_come_back(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("journal") / "a.journal"
    journal = Journal(path)
    for record in records:
        journal.append(record)
    assert Journal(path).records == journal.records == records


@given(RECORDS, st.data())
def test_cut_anywhere_it_has_the_records_before(tmp_path_factory, records, data):
    path = tmp_path_factory.mktemp("journal") / "a.journal"
    ends = [0]
    for record in records:
        Journal(path).append(record)
        ends.append(path.stat().st_size)
    content = path.read_bytes() if records else b""
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut] + data.draw(st.binary(max_size=20)).replace(b"\n", b""))
    journal = Journal(path)
    num_whole = sum(end <= cut for end in ends) - 1
    assert journal.records == records[:num_whole]
    journal.append({"more": 1})
    assert Journal(path).records == [*records[:num_whole], {"more": 1}]


@given(st.binary(max_size=200))
def test_any_bytes_are_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("journal") / "a.journal"
    path.write_bytes(content)
    assert Journal(path).records == []


@pytest.mark.parametrize("text", ["[1]", "1", "{", "[" * 100_000])
def test_a_true_checksum_of_something_else(tmp_path, text):
    path = tmp_path / "a.journal"
    path.write_bytes(b"%08x %s\n" % (crc32(text.encode()), text.encode()))
    assert Journal(path).records == []


def test_a_changed_byte_ends_it(tmp_path):
    path = tmp_path / "a.journal"
    for number in range(3):
        Journal(path).append({"number": number})
    path.write_bytes(path.read_bytes().replace(b": 1}", b": 7}"))
    assert Journal(path).records == [{"number": 0}]


def test_a_journal_too_long_to_be_one_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.journal"
    Journal(path).append({"number": 1})
    monkeypatch.setattr(journal_module, "MAX_BYTES", 5)
    assert Journal(path).records == []


def test_a_full_disk_keeps_the_records_before(tmp_path, small_files_only):
    path = tmp_path / "a.journal"
    journal = Journal(path)
    journal.append({"number": 0})
    with pytest.raises(OutputError, match=r"File too large.*a\.journal"):
        journal.append({"text": "x" * 100_000})
    assert Journal(path).records == journal.records == [{"number": 0}]


def test_it_is_lines_for_people(tmp_path):
    path = tmp_path / "a.journal"
    Journal(path).append({"seed": 3})
    checksum, text = path.read_text().split(" ", 1)
    assert json.loads(text) == {"seed": 3}
    assert int(checksum, 16) == crc32(text.strip().encode())
