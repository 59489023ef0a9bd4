"""Host memory: freed memory returns to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest

from turbotalk_core.takes import host_memory as heap

HAS_GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim")
BLOCK = 64 * 1024  # under what glibc makes a mapping of its own for
NUM_BLOCKS = 1_500


def _read_resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not HAS_GLIBC, reason="only glibc is asked to give memory back")
def test_memory_that_is_free_is_given_back() -> None:
    blocks = [bytearray(b"\1") * BLOCK for _ in range(NUM_BLOCKS)]
    kept = blocks[::100]  # between them all is free
    held = _read_resident()
    del blocks
    heap.trim_host_memory()
    assert held - _read_resident() > 0.8 * BLOCK * NUM_BLOCKS
    assert all(len(block) == BLOCK for block in kept)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_nothing_happens(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", None)  # is not even opened
    heap._find_trim.cache_clear()
    heap.trim_host_memory()
    heap._find_trim.cache_clear()
