"""Text on standard output and standard error, whatever these are connected to.

A terminal may lack the letters of a name, and a reader may end before the program does, as ``head``
does. Neither may end a job that is done.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from ..safe_io.paths import show


def prepare_console() -> None:
    """Replace closed streams by the null device, and escape letters that a stream cannot print."""
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r+", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Write the result of a command to standard output.

    Args:
        text: lines, with their ends.

    Raises:
        OSError: if the text cannot be written, as on a full disk; a reader that has ended is none.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        error.filename = "standard output"
        raise


def note(text: str) -> None:
    """Write a remark that does not stop the work to standard error, as one line."""
    MESSAGES.write(f"note: {show(' '.join(text.split()))}\n")


class _Messages:
    """Standard error as a stream for which failures do not matter."""

    def write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
        except (OSError, ValueError, AttributeError):
            _discard(sys.stderr)

    def flush(self) -> None:
        try:
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):
            _discard(sys.stderr)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (any attribute of a stream)
        return getattr(sys.stderr, name)


MESSAGES = _Messages()


def _discard(stream: TextIO) -> None:
    """Connect a stream to the null device, or its rest would be written again at the end."""
    with suppress(OSError, ValueError, AttributeError):  # a stream that is no file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
