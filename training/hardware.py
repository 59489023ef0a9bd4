"""What a measurement ran on, in words that name no machine."""

from __future__ import annotations

import platform
from pathlib import Path


def name_cpu() -> str:
    """Name the processor: its model where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
