"""What a measurement ran on, in words that name no machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def name_cpu() -> str:
    """Name the processor: its model where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_resident_bytes(process_id: int | None = None) -> int | None:
    """Read how much memory a process holds.

    Args:
        process_id: of the process; None is this one.

    Returns:
        Bytes; None where the system does not tell it as Linux does, or the process has ended.
    """
    path = Path(f"/proc/{'self' if process_id is None else process_id}/statm")
    try:
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return None
