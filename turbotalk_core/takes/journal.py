"""Append-only journal: a file of records that survives a crash or a loss of power.

Each record is either complete or ignored, so after a crash all records written before can be read.
Separate because it does not depend on the contents of the records, which are plain JSON objects.

A record is one line: the CRC-32 of its JSON in eight hexadecimal digits, a space, the JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

from ..safe_io.atomic import reports_disk_errors, sync_folder
from ..safe_io.json import parse_json
from ..safe_io.paths import is_file

MAX_BYTES = 2**26  # a week of video takes half of it; a larger file is not one of our journals


class Journal:
    """Records in a file, read when it is opened.

    Attributes:
        records: the complete records in order, up to the first damaged one.
    """

    def __init__(self, path: Path) -> None:
        """Read the records of a file; a missing file has none.

        Args:
            path: the file; the first record creates it.

        Raises:
            OutputError: if the file cannot be read.
        """
        self._path = path
        self.records: list[dict[str, Any]] = []
        self._length = 0
        with reports_disk_errors(path):
            if not is_file(path) or path.stat().st_size > MAX_BYTES:
                return
            lines = path.read_bytes().splitlines(keepends=True)
        for line in lines:
            record = _parse(line)
            if record is None:
                return
            self.records.append(record)
            self._length += len(line)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record and sync it to disk.

        When this returns, the record survives a crash.

        Args:
            record: JSON object, with integers of at most twenty digits.

        Raises:
            OutputError: if the record cannot be written; the records before are unchanged.
        """
        text = json.dumps(record, allow_nan=False).encode()
        line = b"%08x %s\n" % (crc32(text), text)
        with reports_disk_errors(self._path):
            is_new = not self._path.exists()
            # Not append mode: it would keep an incomplete record of an earlier run.
            with self._path.open("wb" if is_new else "r+b") as file:
                file.seek(self._length)
                file.truncate()
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                sync_folder(self._path.parent)
        self.records.append(dict(record))
        self._length += len(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % crc32(text):
        return None
    try:
        record = parse_json(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
