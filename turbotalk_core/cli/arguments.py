"""Argument parsers and exit codes shared by all programs with a command line."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import NoReturn

import torch

from ..errors import CheckpointError, OutOfMemoryError, OutputError, TurboTalkError
from ..safe_io.paths import show
from .console import MESSAGES, prepare_console, say

REFUSED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
# Such as 7.5 or 15/2. Fraction also parses 1e999999999, and would allocate all its digits.
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}|/0*[1-9][0-9]{0,8})?")
MAX_THREADS = max(64, os.cpu_count() or 1)  # thousands of threads take minutes to start
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(work: Callable[[], object]) -> int:
    """Run the work of a program and print an error or an interruption as one line on stderr.

    A reader of the output that ends early, or lacks letters, is no error.

    Args:
        work: function that does the work.

    Returns:
        The exit code: 0 done, ``REFUSED`` or ``INTERRUPTED``.
    """
    prepare_console()
    try:
        work()
        say("")  # writes what a stream may still hold
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
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        return refuse(
            OutputError(
                f"got '{error.strerror or error}'{place}; check that the disk has free space, and "
                "that files and folders are there and may be read and written"
            )
        )
    except KeyboardInterrupt:
        MESSAGES.write("interrupted\n")
        return INTERRUPTED
    return 0


def refuse(error: TurboTalkError) -> int:
    """Print an error as one line on stderr and return the exit code."""
    MESSAGES.write(f"error: {_show_line(str(error))}\n")
    return REFUSED


def _show_line(text: str) -> str:
    return show(" ".join(text.split()))


class Parser(argparse.ArgumentParser):
    """Argument parser that prints an error as one line, after a hint instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit.

        Args:
            message: why the arguments make no sense.
        """
        MESSAGES.write(f"usage: {self.prog} --help lists all arguments\n")
        MESSAGES.write(f"error: {_show_line(message)}\n")
        self.exit(REFUSED)


@contextmanager
def names_options(options: Mapping[str, str]) -> Iterator[None]:
    """Replace the names of settings in the errors of a block by those of the command's options.

    Args:
        options: name of the option by name of the setting.

    Yields:
        Nothing.

    Raises:
        TurboTalkError: what the block raised, with another message.
    """
    try:
        yield
    except CheckpointError:  # contains names of the file's own metadata
        raise
    except TurboTalkError as error:
        raise type(error)(_name_options(str(error), options)) from error


def _name_options(text: str, options: Mapping[str, str]) -> str:
    for name, option in options.items():
        # Names of one word are also words of sentences, except at the place of what was got.
        pattern = rf"\b{name}\b" if "_" in name else rf"(?<=\bgot ){name}\b"
        text = re.sub(pattern, option, text)
    return re.sub(r"^got (width|height)\b", r"--size: got \1", text)


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


def parse_threads(text: str) -> int:
    """Parse a number of CPU threads.

    Args:
        text: argument of the command line.

    Returns:
        The number, 1 to ``MAX_THREADS``.

    Raises:
        ArgumentTypeError: if the text is no such number.
    """
    if not (text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= MAX_THREADS):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; give a whole number from 1 to {MAX_THREADS}; more than the "
            f"{os.cpu_count()} cores of this machine make nothing faster"
        )
    return int(text)


def parse_whole(text: str) -> int:
    """Parse a whole number; its range is checked with the other settings.

    Args:
        text: argument of the command line.

    Returns:
        The number.

    Raises:
        ArgumentTypeError: if the text is no whole number of at most thirty digits.
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}; give a whole number")
    return int(text)


def parse_number(text: str) -> float:
    """Parse a finite number; its range is checked with the other settings.

    Args:
        text: argument of the command line.

    Returns:
        The number.

    Raises:
        ArgumentTypeError: if the text is no number, or is infinite.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}; give a number, as in 1.5")
    return number


def parse_text(text: str) -> str:
    """Parse a text that a network reads.

    Args:
        text: argument of the command line.

    Returns:
        The text without a byte order mark at its start, which some editors write into files.

    Raises:
        ArgumentTypeError: if the text has bytes that are not UTF-8, or NUL.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"got {text[:40]!r}, which is not UTF-8; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, which has NUL; save it as UTF-8")
    return text.removeprefix("\ufeff")


def parse_device(text: str) -> torch.device:
    """Parse the name of a device that this machine has.

    Args:
        text: argument of the command line.

    Returns:
        The device.

    Raises:
        ArgumentTypeError: if there is no such device.
    """
    devices = list_devices()
    if text not in devices:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, which is not available; available: {', '.join(devices)}"
        )
    return torch.device(text)


def list_devices() -> list[str]:
    """Return the names of all devices of this machine, the CPU first.

    Returns:
        Such as cpu, cuda, cuda:0.
    """
    devices = ["cpu"]
    for kind, backend in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.mps)):
        if (torch.backends.mps if kind == "mps" else backend).is_available():
            devices += [kind, *(f"{kind}:{index}" for index in range(backend.device_count()))]
    return devices


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
