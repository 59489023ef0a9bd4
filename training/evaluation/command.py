"""Command line shared by the evaluations: common options, and the report as JSON."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training.evaluation.generation import DITS
from training.outputs import hold_files
from turbotalk_core.cli.arguments import parse_count, parse_threads, run
from turbotalk_core.errors import RequestError
from turbotalk_core.geometry import MAX_FRAMES
from turbotalk_core.safe_io.atomic import write_text

logger = logging.getLogger(__name__)


def run_command(
    parser: argparse.ArgumentParser,
    evaluate: Callable[[argparse.Namespace], dict[str, Any]],
    *,
    num_pairs: int,
) -> int:
    """Parse the command line, evaluate, and write the report.

    Args:
        parser: parser with the evaluation's own options; the common ones are added.
        evaluate: function from all options to a report with a ``summary``.
        num_pairs: default number of pairs.

    Returns:
        The exit code.
    """
    parser.add_argument("--weights", type=Path, required=True, help="models folder")
    parser.add_argument("--model", choices=DITS, default="teacher")
    parser.add_argument("--pairs", type=parse_count, default=num_pairs)
    parser.add_argument("--frames", type=parse_count, default=81, help="length of each clip")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and of the noise")
    parser.add_argument("--json", type=Path, help="file for summary and pairs")
    parser.add_argument("--sheet", type=Path, help="PNG: each pair's true and generated frames")
    parser.add_argument("--threads", type=parse_threads, default=2, help="CPU threads")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    return run(lambda: _evaluate(evaluate, arguments))


def _evaluate(
    evaluate: Callable[[argparse.Namespace], dict[str, Any]], arguments: argparse.Namespace
) -> None:
    if arguments.frames > MAX_FRAMES:
        raise RequestError(f"got {arguments.frames} frames; a clip has at most {MAX_FRAMES}")
    with hold_files(arguments.json, picture=arguments.sheet):
        report = evaluate(arguments)
        for name, value in report["summary"].items():
            logger.info("%-24s %8.4f", name, value)
        if arguments.json:
            write_text(arguments.json, json.dumps(report, indent=1) + "\n")
