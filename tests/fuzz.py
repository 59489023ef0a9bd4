"""Feed one entry point with files from a coverage-guided fuzzer.

    python -m tests.fuzz request --seconds 60

A finding is an error other than a ``TurboTalkError``, a call of more than ten seconds, or memory
above four gigabytes: the file that caused it is kept, and the exit code is not 0. Needs the extra
``fuzz`` (atheris: Linux, Python 3.11 to 3.13). The entry points are those of
tests/core/entry_points.py, so that a finding becomes a test there.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

atheris: Any = import_module("atheris")  # the stubs that type checkers bring are of an older one

with atheris.instrument_imports(include=["turbotalk_core", "PIL"]):
    from tests.core.entry_points import TARGETS, feed

SECONDS_A_FILE = 10
MEGABYTES = 4_096  # torch and FFmpeg are half a gigabyte
LARGEST = 65_536  # bytes of a file


def main() -> None:
    """Fuzz until the time is over, or something is found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer; 0 draws one")
    parser.add_argument(
        "--found",
        type=Path,
        default=Path("out/fuzz"),
        help="folder for what is found (%(default)s)",
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of damage, Pillow and torch tell in passing
    arguments.found.mkdir(parents=True, exist_ok=True)
    target = TARGETS[arguments.target]
    with TemporaryDirectory() as corpus:
        for number, data in enumerate(target.seeds()):
            (Path(corpus) / str(number)).write_bytes(data)
        options = {
            "max_total_time": arguments.seconds,
            "seed": arguments.seed,
            "timeout": SECONDS_A_FILE,
            "rss_limit_mb": MEGABYTES,
            "max_len": LARGEST,
            "print_final_stats": 1,
            "artifact_prefix": f"{arguments.found}/{arguments.target}-",
        }
        flags = [f"-{name}={value}" for name, value in options.items()]
        atheris.Setup([sys.argv[0], *flags, corpus], lambda data: feed(target.entry_point, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
