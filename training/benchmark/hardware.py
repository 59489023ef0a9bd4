"""Hardware of a measurement, described without naming the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def name_cpu() -> str:
    """Return the processor's model name if the system reports it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_resident_bytes(process_id: int | None = None) -> int | None:
    """Read the resident memory of a process.

    Args:
        process_id: id of the process; None for this one.

    Returns:
        Bytes; None if the system has no Linux ``/proc``, or the process has ended.
    """
    path = Path(f"/proc/{'self' if process_id is None else process_id}/statm")
    try:
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return None
