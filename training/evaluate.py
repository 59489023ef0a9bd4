"""Command that evaluates the embedded family on held-out avatars and utterances.

python -m training.evaluate --weights models --steps 20 --pairs 20 --seed 1 --json FILE
python -m training.evaluate --weights models --steps 1 --dit FILE --adapter FILE
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from training.avatars.synthetic import make_sheet
from training.evaluation.command import run_command
from training.evaluation.generation import load_family
from training.evaluation.scores import draw_pairs, evaluate, measure_pairs
from training.outputs import write_picture
from turbotalk_core.cli.arguments import Parser, parse_count, parse_number
from turbotalk_core.request import SCHEDULES


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--steps", type=parse_count, help="network evaluations; default as shipped")
    parser.add_argument("--audio-guidance", type=parse_number, help="default as shipped; 1 is off")
    parser.add_argument("--schedule", choices=SCHEDULES, help="default as shipped")
    parser.add_argument("--dit", type=Path, help="video transformer to take instead")
    parser.add_argument("--adapter", type=Path, help="audio adapter that learnt with --dit")
    return run_command(parser, _evaluate, num_pairs=20)


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    request, models, encoder = load_family(
        arguments.weights, arguments.model, arguments.dit, arguments.adapter
    )
    changes = {
        "num_inference_steps": arguments.steps,
        "audio_guidance_scale": arguments.audio_guidance,
        "schedule": arguments.schedule,
    }
    chosen = {name: value for name, value in changes.items() if value is not None}
    request = replace(request, seed=arguments.seed, **chosen)
    pairs = measure_pairs(draw_pairs(arguments.seed, arguments.pairs, arguments.frames))
    num_kept = len(pairs) if arguments.sheet else 0
    evaluation = evaluate(request, models, encoder, pairs, num_kept=num_kept)
    if arguments.sheet:
        rows = [
            frames
            for pair, made in zip(pairs, evaluation.clips, strict=True)
            for frames in (pair.clip.frames_CTHW, made)
        ]
        columns = 1 + (arguments.frames - 1) // 10
        write_picture(arguments.sheet, Image.fromarray(make_sheet(rows, columns)))
    model = arguments.model if arguments.dit is None else str(arguments.dit)
    return {
        "settings": {"model": model, "frames": arguments.frames, **asdict(request)},
        "summary": evaluation.summary,
        "pairs": [asdict(score) for score in evaluation.scores],
    }


if __name__ == "__main__":
    sys.exit(main())
