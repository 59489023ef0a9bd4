"""Argument parsers and exit codes shared by all programs with a command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from fractions import Fraction

import torch

from ..errors import OutOfMemoryError, TurboTalkError
from ..safe_io.paths import show

REFUSED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
# Such as 7.5 or 15/2. Fraction also parses 1e999999999, and would allocate all its digits.
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}|/0*[1-9][0-9]{0,8})?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(work: Callable[[], object]) -> int:
    """Run the work of a program and print an error or an interruption as one line on stderr.

    Args:
        work: function that does the work.

    Returns:
        The exit code: 0 done, ``REFUSED`` or ``INTERRUPTED``.
    """
    try:
        work()
    except TurboTalkError as error:
        return refuse(error)
    except torch.OutOfMemoryError as error:  # when weights are moved to the device
        reason = str(error).split("\n")[0]
        return refuse(
            OutOfMemoryError(
                f"memory ran out ({reason}); close what else uses the device, or use weights of a "
                "smaller dtype, a smaller size, or another device"
            )
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    return 0


def refuse(error: TurboTalkError) -> int:
    """Print an error as one line on stderr and return the exit code."""
    sys.stderr.write(f"error: {show(' '.join(str(error).split()))}\n")
    return REFUSED


def print_note(text: str) -> None:
    """Print a remark that does not stop the work as one line on stderr."""
    sys.stderr.write(f"note: {show(' '.join(text.split()))}\n")


def parse_size(text: str) -> tuple[int, int] | str:
    """Parse "WIDTHxHEIGHT" or "auto".

    Args:
        text: argument of the command line.

    Returns:
        Width and height in pixels, or ``auto``.

    Raises:
        ArgumentTypeError: if the text is neither.
    """
    return text if text == "auto" else parse_sides(text, or_else=", or auto")


def parse_sides(text: str, *, or_else: str = "") -> tuple[int, int]:
    """Parse "WIDTHxHEIGHT".

    Args:
        text: argument of the command line.
        or_else: end of the error message, with other allowed values.

    Returns:
        Width and height in pixels.

    Raises:
        ArgumentTypeError: if the text is no size.
    """
    try:
        width, height = (int(side) for side in text.lower().split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; give width x height in pixels, as in 640x640{or_else}"
        ) from error
    return width, height


def parse_count(text: str) -> int:
    """Parse a positive integer of at most nine digits.

    Args:
        text: argument of the command line.

    Returns:
        The number.

    Raises:
        ArgumentTypeError: if the text is no such number.
    """
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number from 1 on")
    return int(text)


def parse_seconds(text: str) -> Fraction:
    """Parse a duration in seconds, such as 7.5 or 15/2.

    Args:
        text: argument of the command line.

    Returns:
        Seconds, without rounding.

    Raises:
        ArgumentTypeError: if the text is no duration.
    """
    if not _SECONDS.fullmatch(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; give seconds, as in 7.5")
    return Fraction(text)


def find_device() -> torch.device:
    """Return the CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
