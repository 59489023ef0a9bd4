"""Resumable stages of data preparation: settings, item logs, and division of the work.

    SET/scenes/settings.json           settings that made this folder, and their fingerprint
    SET/scenes/items-00-of-01.jsonl    log of process 0 of 1: one line per finished item

The line of an item is appended after all its files are on disk, so a run that was stopped at any
moment can resume. The stages themselves only implement how one item is made.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

from training.outputs import hold, is_held
from turbotalk_core.checkpoints.tensors import read_header
from turbotalk_core.errors import (
    CheckpointError,
    MissingToolError,
    OutputError,
    RequestError,
    TurboTalkError,
)
from turbotalk_core.safe_io.atomic import make_folder, reports_disk_errors, whole_file
from turbotalk_core.safe_io.paths import show

SETTINGS = "settings.json"
ITEM_LOGS = "items-*.jsonl"
ITEM_LOCKS = ".items-*.lock"
KEY, SKIPPED, ATTEMPT = "key", "skipped", "attempt"

_PLAIN = (".pt2", ".model")  # exported programs and tokenizers: single files, not sharded weights

_OPENING_SECONDS = 60.0  # a process opens a stage in far less

_log = getLogger(__name__)

Record = dict[str, Any]
"""One line of an item log: ``key``, and either the item's facts or why it is ``skipped``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A process's share of the work, and its treatment of existing items.

    Attributes:
        part: number of the process, 0 or more.
        parts: number of processes that share the work.
        overwrites: whether to delete items that were made with other settings.
        retries: whether to try skipped items again.

    Raises:
        RequestError: if ``part`` is out of range.
    """

    part: int = 0
    parts: int = 1
    overwrites: bool = False
    retries: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise RequestError(
                f"got part {self.part} of {self.parts}; parts count from 0, so the last is "
                f"{self.parts - 1}"
            )

    @property
    def name(self) -> str:
        """Prefix of the names of this share's files."""
        return f"{self.part:02d}-of-{self.parts:02d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Summary of a run of a stage.

    Attributes:
        num_made: items made in this run.
        num_kept: items that existed before.
        skips: numbers of skipped items, of this run and earlier ones, by reason.
        left_out: what was found and is no item, by reason.
    """

    num_made: int
    num_kept: int
    skips: Mapping[str, int]
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the summary for display, one fact per line."""
        lines = [f"{self.num_made} made, {self.num_kept} were there"]
        if self.skips:
            lines.append(f"{sum(self.skips.values())} skipped:")
            lines += [f"  {number} x {reason}" for reason, number in sorted(self.skips.items())]
        if self.left_out:
            lines += ["not taken:", *(f"  {line}" for line in describe_left_out(self.left_out))]
        return lines


def describe_left_out(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line per reason, with the number of names and the first of them."""
    return [
        f"{len(names)} x {reason} (first: {show(names[0])})" for reason, names in left_out.items()
    ]


def fingerprint_files(path: Path) -> dict[str, Any]:
    """Identify a model file by its content.

    Args:
        path: model file, or the index file of its shards.

    Returns:
        Name, bytes and SHA-256 of all its bytes.

    Raises:
        CheckpointError: if a file is missing or cannot be read.
    """
    return hash_files(path.name, (path,) if path.suffix in _PLAIN else read_header(path).files)


def hash_files(name: str, files: Sequence[Path]) -> dict[str, Any]:
    """Identify files by their whole content.

    Args:
        name: common name of the files.
        files: files to read, one after the other.

    Returns:
        Name, bytes and SHA-256 of all their bytes.

    Raises:
        CheckpointError: if a file is missing or cannot be read.
    """
    digest, num_bytes = hashlib.sha256(), 0
    try:
        for file in files:
            with file.open("rb") as opened:
                while block := opened.read(1 << 22):
                    digest.update(block)
                    num_bytes += len(block)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {name} ({error.strerror}); give the path of a model file"
        ) from error
    return {"file": name, "bytes": num_bytes, "sha256": digest.hexdigest()}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return a short digest of settings; equal settings have equal digests."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def hold_stage(
    folder: Path, settings: Mapping[str, Any], work: Work, products: Iterable[str] = ()
) -> Iterator[ItemLog]:
    """Open a stage for this process's share of the work, which no other process can have then.

    Args:
        folder: folder of the stage; created if it does not exist.
        settings: everything that decides the items; JSON values.
        work: this process's share of the work.
        products: patterns of the files that the stage makes besides its item logs.

    Yields:
        The item log of the share.

    Raises:
        RequestError: if the folder was made with other settings.
        OutputError: if another process has the same share or another number of parts, or the folder
            cannot be written.
    """
    make_folder(folder)
    with ExitStack() as stack:
        # One process opens at a time, so that two never wait for each other.
        with hold(folder / ".opening.lock", f"opens {folder}", seconds=_OPENING_SECONDS):
            own = folder / ITEM_LOCKS.replace("*", work.name)
            what = f"works on part {work.part} of {work.parts} in {folder}"
            stack.enter_context(hold(own, what))
            _refuse_others(folder, work, allows_same_parts=True)
            open_stage(folder, settings, work, products)
            item_log = ItemLog(folder, work)
        yield item_log


def _refuse_others(folder: Path, work: Work, *, allows_same_parts: bool = False) -> None:
    """Refuse to work beside other processes, or beside those of another number of parts."""
    for path in sorted(folder.glob(ITEM_LOCKS)):
        name = path.name.removeprefix(".items-").removesuffix(".lock")
        is_fine = allows_same_parts and name.endswith(work.name.partition("-")[2])
        if name != work.name and not is_fine and is_held(path):
            advice = " or give both the same --parts" if allows_same_parts else " or stop it"
            raise OutputError(
                f"another process works on part {name} in {folder}, this one would on {work.name}; "
                f"wait until it ends,{advice}"
            )


def open_stage(
    folder: Path, settings: Mapping[str, Any], work: Work, products: Iterable[str] = ()
) -> None:
    """Create the folder of a stage, or check that it was made with the same settings.

    Args:
        folder: folder of the stage.
        settings: everything that decides the items; JSON values.
        work: whether items made with other settings may be deleted.
        products: patterns of the files that the stage makes besides its item logs.

    Raises:
        RequestError: if it was made with other settings.
        OutputError: if the folder cannot be written.
    """
    path = folder / SETTINGS
    make_folder(folder)
    present = read_settings(folder) if path.exists() else None
    if present is not None and present["settings"] != settings:
        changes = _list_changes(present["settings"], settings)
        if not work.overwrites:
            raise RequestError(
                f"{folder} was made with other settings: {changes}; give the same ones or another "
                "folder, or --overwrite to throw it away"
            )
        if work.part != 0:
            raise RequestError(
                f"{folder} was made with other settings ({changes}), and of several processes only "
                "part 0 throws it away; start that one first"
            )
        _refuse_others(folder, work)
        with reports_disk_errors(folder):
            # Item logs first: after an interrupted deletion, all items are made again.
            for pattern in (ITEM_LOGS, *products):
                for file in folder.glob(pattern):
                    file.unlink()
        present = None
    if present is None:
        described = {"fingerprint": fingerprint(settings), "settings": settings}
        # Processes that start together write the same settings, each to its own temporary file.
        with whole_file(path, writer=work.name) as part, reports_disk_errors(path):
            part.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings that made a stage's folder.

    Args:
        folder: folder of the stage.

    Returns:
        ``fingerprint`` and ``settings``.

    Raises:
        RequestError: if there is no such folder, or its settings cannot be read.
    """
    path = folder / SETTINGS
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        return {
            "fingerprint": str(described["fingerprint"]),
            "settings": dict(described["settings"]),
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(
            f"cannot read {path} ({type(error).__name__}), which each command of `python -m "
            "training.data` writes; run the one before (split, filter, precompute) first, or name "
            "the right folder"
        ) from error


def read_records(folder: Path) -> dict[str, Record]:
    """Read the finished items of a stage, by key; of several lines of an item the last counts.

    A line that a stopped process left unfinished is ignored, so its item is made again.

    Args:
        folder: folder of the stage.

    Returns:
        The lines of all processes, sorted by key.

    Raises:
        OutputError: if a finished line is not JSON.
    """
    records: dict[str, Record] = {}
    for path in sorted(folder.glob(ITEM_LOGS)):
        with reports_disk_errors(path):
            data = path.read_bytes()
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                known = records.get(record[KEY], {})
                if record.get(ATTEMPT, 1) >= known.get(ATTEMPT, 1):
                    records[record[KEY]] = record
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise OutputError(
                    f"line {number} of {path} is damaged ({type(error).__name__}); delete the "
                    "line, and the stage that wrote it will make its item again"
                ) from error
    return dict(sorted(records.items()))


class ItemLog:
    """Log of one process: a file to which finished items are appended.

    Attributes:
        before: items that all processes had finished when it was opened, by key.
    """

    def __init__(self, folder: Path, work: Work) -> None:
        """Open the file, and remove an unfinished last line.

        Args:
            folder: folder of the stage.
            work: share of the work, from which the file's name follows.

        Raises:
            OutputError: if the file cannot be written, or a line is damaged.
        """
        self.before = read_records(folder)
        self._path = folder / ITEM_LOGS.replace("*", work.name)
        with reports_disk_errors(self._path), self._path.open("ab+") as file:
            file.seek(0)
            whole = file.read()
            file.truncate(whole.rfind(b"\n") + 1)

    def append(self, records: Iterable[Record]) -> None:
        """Write finished items; they are on disk when this returns.

        Args:
            records: one line per item; for an item with a line, it is the next attempt.

        Raises:
            OutputError: if the file cannot be written.
        """
        lines = "".join(json.dumps(self._count(record)) + "\n" for record in records)
        with reports_disk_errors(self._path), self._path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def _count(self, record: Record) -> Record:
        known = self.before.get(record[KEY])
        return record if known is None else {**record, ATTEMPT: known.get(ATTEMPT, 1) + 1}


def list_missing(keys: Iterable[str], done: Mapping[str, Record], work: Work) -> list[str]:
    """List this process's share of the items that are not done.

    The share depends on an item's key alone. So processes never share an item, even if their lists
    differ because files were added between their starts.

    Args:
        keys: keys of all items.
        done: finished items.
        work: the share, and whether skipped items are tried again.

    Returns:
        Keys, in the order given.
    """
    return [
        key
        for key in keys
        if draw_number(key, "part") % work.parts == work.part
        and (key not in done or (work.retries and SKIPPED in done[key]))
    ]


def draw_number(key: str, purpose: str) -> int:
    """Return an integer from 0 to 2**64 - 1, as a fixed hash of an item's key and a purpose."""
    # The name of a file may have bytes that are not UTF-8, which Python represents as surrogates.
    text = f"{purpose}/{key}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def attempt(key: str, make: Callable[[], Record]) -> Record:
    """Make the line of an item, or a line with the reason why it was skipped.

    An error of the item itself goes into its line. An error that every other item would meet too,
    such as a bad model file, a full disk or a missing program, is raised.

    Args:
        key: key of the item.
        make: function that returns the line without the key.

    Returns:
        The line.
    """
    try:
        return {KEY: key, **make()}
    except (CheckpointError, MissingToolError, OutputError):
        raise
    except TurboTalkError as error:
        _log.warning("%s", show(f"{key} is skipped: {error}"))
        return {KEY: key, SKIPPED: str(error), "kind": type(error).__name__}


def summarize(folder: Path, num_made: int) -> Summary:
    """Count the items in a stage's folder.

    Args:
        folder: folder of the stage.
        num_made: number of items that this run made.

    Returns:
        The counts; reasons are grouped by type of error.
    """
    records = read_records(folder)
    skips: dict[str, int] = {}
    for record in records.values():
        if SKIPPED in record:
            kind = record.get("kind", SKIPPED)
            skips[kind] = skips.get(kind, 0) + 1
    num_kept = max(0, len(records) - sum(skips.values()) - num_made)
    return Summary(num_made=num_made, num_kept=num_kept, skips=skips)


def _list_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)
