"""A file that grows by records, of which each is whole or as if it had never been written.

Goes in: records, plain JSON objects. Comes out: all that were written before the power failed.
Separate because it knows nothing of what the records say.

A record is one line: the CRC-32 of its JSON in eight hexadecimal digits, a space, the JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

from ..safe_io.json import parse_json
from ..safe_io.paths import is_file
from .files import reports_disk_errors, sync_folder

MAX_BYTES = 2**26  # a week of video makes half of that; more is not ours


class Journal:
    """Records in a file, read when it is opened.

    Attributes:
        records: those that are whole, in order; what follows a damaged one does not count.
    """

    def __init__(self, path: Path) -> None:
        """Read the records of a file, or of none that is there yet.

        Args:
            path: the file; it is made by the first record.

        Raises:
            OutputError: the file cannot be read.
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
        """Write a record; when this returns, it is on the disk, whatever happens next.

        Args:
            record: what JSON can hold, whole numbers of at most twenty digits.

        Raises:
            OutputError: the disk refused. The records before are as they were.
        """
        text = json.dumps(record, allow_nan=False).encode()
        line = b"%08x %s\n" % (crc32(text), text)
        with reports_disk_errors(self._path):
            is_new = not self._path.exists()
            # Not append mode: a torn record of an earlier run is written over.
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
