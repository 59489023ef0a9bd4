"""Untrusted JSON: texts with one meaning, numbers in the range of a float, and bounded sizes.

Errors are a ``ValueError`` without the name of the file; the caller, which has the name, converts
them to its own kind of error. docs/security.md lists the guarantees of all callers together.
"""

from __future__ import annotations

import json
import math
import sys
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path
from typing import Any

from .paths import is_file

MAX_TEXT = 16 * 2**20  # bytes of a JSON file, or of the header of a safetensors file
_UTF_16 = (BOM_UTF16_LE, BOM_UTF16_BE)
MAX_DIGITS = 20  # of a whole number in JSON: those of 2**64


def read_small(path: Path, limit: int = MAX_TEXT) -> bytes:
    """Read a whole file that must be small.

    Args:
        path: path of a regular file.
        limit: largest allowed size, bytes.

    Returns:
        Its bytes.

    Raises:
        OSError: if the file is missing, no regular file, or cannot be read.
        ValueError: if it is larger.
    """
    if not is_file(path):
        raise FileNotFoundError(2, "No such file", str(path))
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401 (any JSON value)
    """Parse JSON with exactly one meaning.

    Args:
        text: one JSON value, at most ``MAX_TEXT`` long; bytes are UTF-8, with a byte order mark or
            without, as some editors write one into files.

    Returns:
        The value.

    Raises:
        ValueError: if the text is longer, no JSON, nested too deeply for Python, has a key twice,
            or has a number that is not finite or has more than ``MAX_DIGITS`` digits.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"it has more than {MAX_TEXT} characters")
    if isinstance(text, bytes):
        if text.startswith(_UTF_16):
            raise ValueError("it is UTF-16; save it as UTF-8")
        text = text.decode("utf-8-sig")
    try:
        return json.loads(
            text,
            object_pairs_hook=_pair_once,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_number(value: object) -> bool:
    """Check whether a value is a number in the range of a float; true and false are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # compared, not converted: an int may be too long


def _pair_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"it names {name[:40]!r} twice")
        result[name] = value
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it has {name}, which is no number of JSON")


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {text[:40]}, which no float holds")
    return value


def _parse_int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"it has a number of more than {MAX_DIGITS} digits")
    return int(text)
