"""FID, KID, FVD, E-FID, Sync-C and Sync-D of generated videos against real ones.

Writes metrics.json, metrics.md and contact sheets. Metrics whose weights are missing are left out,
with the reason, unless they are named. Exit codes: 0 done, 2 refused (with a reason on stderr),
130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from training.metrics.evaluation import METRICS, Settings, evaluate
from training.metrics.report import REPORT, format_report
from training.outputs import hold_files
from turbotalk_core.cli.arguments import (
    Parser,
    find_device,
    parse_count,
    parse_device,
    parse_threads,
    run,
)
from turbotalk_core.cli.console import say


def main(argv: Sequence[str] | None = None) -> int:
    """Measure from the command line.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = _make_parser().parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return run(lambda: say(_evaluate(arguments)))


def _evaluate(arguments: argparse.Namespace) -> str:
    settings = Settings(
        metrics=None if arguments.metrics is None else tuple(dict.fromkeys(arguments.metrics)),
        num_frames=arguments.frames,
        seed=arguments.seed,
        device=arguments.device,
    )
    with hold_files(arguments.out / REPORT):
        report = evaluate(
            arguments.generated, arguments.real, arguments.weights, arguments.out, settings
        )
    return format_report(report)


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m training.metrics", description=__doc__)
    parser.add_argument("--generated", type=Path, required=True, help="folder of videos")
    parser.add_argument(
        "--real", type=Path, required=True, help="folder of videos; pairs have one name"
    )
    parser.add_argument(
        "--weights", type=Path, required=True, help="folder of networks (docs/evaluation.md)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        help="that must be measured; default: all whose weights are there",
    )
    parser.add_argument(
        "--frames",
        type=parse_count,
        help="of each clip so many count, from its beginning, and shorter ones are left out; "
        "default: all of every clip",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the subsets of kid (%(default)s)")
    parser.add_argument(
        "--device", type=parse_device, default=find_device(), help="of the networks (%(default)s)"
    )
    parser.add_argument("--threads", type=parse_threads, help="CPU threads of the networks")
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(main())
