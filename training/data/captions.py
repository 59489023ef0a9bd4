"""Captions of videos, from a table or from texts beside the videos.

Input: a CSV, TSV or JSON table with the columns ``file`` and ``caption``, or a ``.txt`` with the
name of a video. Output: a caption or None for each video. An empty caption is none, and so is what
programs write for a missing value.
"""

from __future__ import annotations

import csv
import io
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from training.texts import read_text
from turbotalk_core.errors import RequestError
from turbotalk_core.safe_io.paths import is_file

_FILE, _CAPTION = COLUMNS = ("file", "caption")
_DELIMITERS = ",;\t"
_MISSING = {"", "nan", "<na>", "n/a", "none", "null"}  # as pandas, R and others write it

_WANTED = (
    "give a CSV with a head line, or a JSONL with an object per line, each with the columns file "
    "and caption"
)


def read_captions(path: Path) -> dict[str, str | None]:
    """Read a table of captions.

    Args:
        path: CSV with a head line and a comma, semicolon or tab between the cells; or JSONL; or a
            JSON list of objects. Columns ``file`` and ``caption``; others are passed over.

    Returns:
        Captions by file, with forward slashes; None for an empty caption.

    Raises:
        RequestError: if the table cannot be read, lacks a column, has a cell too many, has a value
            that is no text, or has two captions for one file.
    """
    captions: dict[str, str | None] = {}
    try:
        for place, row in _read_rows(path):
            name, caption = _take_row(row, place)
            if captions.setdefault(name, caption) != caption:
                raise ValueError(f"{place}: {name} has another caption before; leave one")
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot read captions from {path}: {reason}; {_WANTED}") from error
    return captions


def _read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from _read_csv(text)
    elif text.lstrip().startswith("["):
        for number, row in enumerate(json.loads(text), 1):
            yield f"entry {number}", row
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _parse_line(line, number)


def _read_csv(text: str) -> Iterator[tuple[str, dict[str, str | None]]]:
    head, *_ = text.splitlines() or [""]
    delimiter = max(_DELIMITERS, key=lambda sign: _is_head(head.split(sign)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names = [_clean_name(cell) for cell in next(reader, [])]
    if not _is_head(names):
        raise ValueError(f"its first line has the columns {', '.join(names) or 'none'}")
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        place = f"line {reader.line_num}"
        if len(cells) > len(names):
            raise ValueError(
                f"{place} has {len(cells)} cells and the first line {len(names)}; put a caption "
                f"with {delimiter!r} in it between double quotes"
            )
        yield place, dict(zip(names, [*cells, *[None] * len(names)], strict=False))


def _is_head(cells: Iterable[str]) -> bool:
    return {_clean_name(cell) for cell in cells} >= set(COLUMNS)


def _clean_name(cell: str) -> str:
    return cell.strip().strip('"').lower()


def _parse_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON ({error})") from error


def _take_row(row: Any, place: str) -> tuple[str, str | None]:
    if not isinstance(row, Mapping) or not set(COLUMNS) <= set(row):
        raise ValueError(f"{place} has no {_FILE} and {_CAPTION}")
    name, caption = row[_FILE], row[_CAPTION]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{place}: the {_FILE} is {name!r:.80}, which names no file")
    if isinstance(caption, float) and math.isnan(caption):
        caption = None
    if not isinstance(caption, str | None):
        raise ValueError(f"{place}: the {_CAPTION} is {caption!r:.80}, which is no text")
    return PurePosixPath(name).as_posix(), clean_caption(caption)


def clean_caption(text: str | None) -> str | None:
    """Return a caption without space around it, or None if nothing is left or it says so."""
    stripped = (text or "").strip()
    return None if stripped.lower() in _MISSING else stripped


def match_captions(
    captions: Mapping[str, str | None], names: Iterable[str], path: Path
) -> dict[str, str | None]:
    """Match the files of a table with the videos of a folder.

    A file is the video of the same name. If there is none, it is the only one whose name differs
    just in the form of accents, in the kind of slash, or in space around it: other programs write
    these in other ways.

    Args:
        captions: captions by file.
        names: videos, as paths in their folder.
        path: the table, for messages.

    Returns:
        Captions by video.

    Raises:
        RequestError: if there is no such video, or there are several.
    """
    names = list(names)
    exact = set(names)
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_to_common_form(name), []).append(name)
    found = {
        file: [file] if file in exact else alike.get(_to_common_form(file), []) for file in captions
    }
    wrong = sorted(file for file, videos in found.items() if len(videos) != 1)
    if wrong:
        raise RequestError(
            f"{path} has captions for {len(wrong)} files that are not in the folder of the videos "
            f"(first: {wrong[0]}); name files by their path inside that folder"
        )
    return {found[file][0]: caption for file, caption in captions.items()}


def _to_common_form(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/"))


def read_caption_beside(path: Path) -> str | None:
    """Read the text beside a video, with the same name and the suffix ``.txt``.

    Args:
        path: file of the video.

    Returns:
        The caption; None if there is no text or it is empty.

    Raises:
        RequestError: if the text is not UTF-8 or cannot be read.
    """
    beside = path.with_suffix(".txt")
    if not is_file(beside):
        return None
    try:
        return clean_caption(read_text(beside))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot read the caption {beside}: {reason}") from error
