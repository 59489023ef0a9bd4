"""Log of a run: a file with one line of JSON per step, in which no step occurs twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbotalk_core.errors import OutputError
from turbotalk_core.safe_io.atomic import make_folder, reports_disk_errors, write_text

LOG = "log.jsonl"
CHANGES = "changes.jsonl"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the log of a run.

    Args:
        folder: folder of the run.

    Returns:
        A mapping per step; a last line that was cut off is left out.

    Raises:
        OutputError: if the log cannot be read, or a line is damaged.
    """
    path = folder / LOG
    with reports_disk_errors(path):
        data = path.read_bytes() if path.is_file() else b""
    return [_parse(line, number, path) for number, line in enumerate(data.split(b"\n")[:-1], 1)]


def _parse(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(line)
        return {**values, "step": int(values["step"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(
            f"line {number} of {path} is damaged ({type(error).__name__}); delete the line"
        ) from error


def append_log(folder: Path, line: Mapping[str, Any]) -> None:
    """Append a step to the log.

    Args:
        folder: folder of the run.
        line: values of the step, with its number under ``step``.

    Raises:
        OutputError: if the log cannot be written.
    """
    path = folder / LOG
    with reports_disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(line)) + "\n")


def trim_log(folder: Path, step: int) -> None:
    """Remove the steps after a given one from the log, because they will be logged again.

    Args:
        folder: folder of the run; created if it does not exist.
        step: the last step that stays.

    Raises:
        OutputError: if the log cannot be read or written, or a line is damaged.
    """
    make_folder(folder)
    kept = [json.dumps(line) + "\n" for line in read_log(folder) if line["step"] <= step]
    write_text(folder / LOG, "".join(kept))


def log_changes(folder: Path, step: int, changes: Sequence[str]) -> None:
    """Write what a resumed run changes into ``changes.jsonl``, with a line per change.

    Args:
        folder: folder of the run.
        step: number of steps that were made before; changes at later steps are removed, because
            their steps will be made again.
        changes: descriptions.
    """
    path = folder / CHANGES
    if not changes and not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    kept += [json.dumps({"step": step, "change": change}) for change in changes]
    write_text(path, "".join(f"{line}\n" for line in kept))
