"""Hardware of a measurement, described without naming the machine."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch


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


def read_memory(device: torch.device) -> tuple[int, int]:
    """Read the memory of this process.

    Args:
        device: device of the networks.

    Returns:
        Bytes now and at the peak so far: of the GPU as torch counts it, else of the process.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.is_file():  # systems that report the peak alone
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        return peak, peak
    # Not ru_maxrss: it starts at the value of the parent process.
    held = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, peak = (int(held[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def describe_device(device: torch.device) -> str:
    """Return the name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{name_cpu()}, {os.cpu_count()} cores"
