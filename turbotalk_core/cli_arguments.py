"""What programs with a command line share: kinds of arguments, and how a program ends."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from fractions import Fraction

import torch

from .errors import OutOfMemoryError, TurboTalkError
from .safe_io.paths import show

REFUSED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
# As 7.5, or 15/2. Fraction reads 1e999999999 too, and would write it out.
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}|/0*[1-9][0-9]{0,8})?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(work: Callable[[], object]) -> int:
    """Do the work of a program.

    Args:
        work: what is refused in it, or interrupted, is told in one line on stderr.

    Returns:
        The exit code.
    """
    try:
        work()
    except TurboTalkError as error:
        return refuse(error)
    except torch.OutOfMemoryError as error:  # of weights that are brought to the device
        told = str(error).split("\n")[0]
        return refuse(
            OutOfMemoryError(
                f"memory ran out ({told}); close what else uses the device, or use weights of a "
                "smaller dtype, a smaller size, or another device"
            )
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    return 0


def refuse(error: TurboTalkError) -> int:
    """Tell on stderr, in one line, why something was refused; returns the exit code."""
    sys.stderr.write(f"error: {show(' '.join(str(error).split()))}\n")
    return REFUSED


def parse_size(text: str) -> tuple[int, int] | str:
    """Read width x height, or auto.

    Args:
        text: as typed.

    Returns:
        Width and height, or ``auto``.

    Raises:
        ArgumentTypeError: anything else.
    """
    return text if text == "auto" else parse_sides(text, or_else=", or auto")


def parse_sides(text: str, *, or_else: str = "") -> tuple[int, int]:
    """Read width x height.

    Args:
        text: as typed.
        or_else: end of the message, what else may be given.

    Returns:
        Width and height.

    Raises:
        ArgumentTypeError: anything else.
    """
    try:
        width, height = (int(side) for side in text.lower().split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; give width x height in pixels, as in 640x640{or_else}"
        ) from error
    return width, height


def parse_count(text: str) -> int:
    """Read a whole number from 1 on.

    Args:
        text: as typed.

    Returns:
        The number.

    Raises:
        ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number from 1 on")
    return int(text)


def parse_seconds(text: str) -> Fraction:
    """Read a length of time.

    Args:
        text: as typed.

    Returns:
        Seconds, exactly.

    Raises:
        ArgumentTypeError: anything else.
    """
    if not _SECONDS.fullmatch(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; give seconds, as in 7.5")
    return Fraction(text)


def find_device() -> torch.device:
    """Choose the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
