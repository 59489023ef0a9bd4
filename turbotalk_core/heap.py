"""Memory that is free but that the process still holds, given back to the system.

The C library keeps what is freed between blocks that are not, and over hundreds of chunks that
adds up, although nothing that is alive grows. Its other remedy, a page of its own for each large
block, doubles the time of a chunk; this takes about a hundredth.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Hand free memory back; nothing happens where the C library is not glibc."""
    trim = _find_trim()
    if trim is not None:
        trim(0)


@cache
def _find_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
