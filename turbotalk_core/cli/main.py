"""The command line: make a talking video, show a chunk plan, say what a model file is, measure.

Exit codes: 0 done, 2 refused (one line on stderr says why), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..audio.io import open_sound
from ..benchmark.report import (
    FULL_REQUEST,
    FULL_SIZES,
    NUM_CHUNKS,
    NUM_STEPS,
    measure,
    plain_request,
    read_sizes,
)
from ..checkpoints.inspect import inspect
from ..chunking.plan import plan_chunks
from ..errors import RequestError
from ..geometry import FPS, count_frames
from ..loading import EMBEDDED_MODELS, find_model_files, read_request
from ..request import CHUNK_FRAMES, NUM_MOTION_FRAMES
from ..safe_io.paths import show
from ..types import ChunkPlan
from .arguments import (
    DTYPES,
    Parser,
    find_device,
    names_options,
    parse_count,
    parse_device,
    parse_seconds,
    parse_size,
    parse_threads,
    parse_whole,
    run,
)
from .console import note, say
from .talk import add_talk

FULL, TINY = "14b", "tiny"
# options by the settings that they set
_PLAN_OPTIONS = {"chunk_frames": "--chunk-frames", "num_motion_frames": "--motion-frames"}
_BENCH_OPTIONS = {"chunk_frames": "--frames", "num_inference_steps": "--steps"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None uses those of the process.

    Returns:
        The exit code: 0 done, 2 refused, 130 interrupted.
    """
    return run(lambda: _run_command(argv))


def _run_command(argv: Sequence[str] | None) -> None:
    arguments = _make_parser().parse_args(argv)
    with names_options(arguments.options):
        arguments.command(arguments)


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.audio is not None:
        num_frames = open_sound(arguments.audio, on_note=note).num_frames
    else:
        num_frames = count_frames(arguments.seconds.numerator, arguments.seconds.denominator)
    plan = plan_chunks(num_frames, arguments.chunk_frames, arguments.motion_frames)
    say(_plan_as_json(plan) if arguments.json else _plan_as_table(plan))


def _plan_as_json(plan: ChunkPlan) -> str:
    chunks = [asdict(chunk) for chunk in plan.chunks]
    described = {"num_frames": plan.num_frames, "fps": FPS, "chunks": chunks}
    return json.dumps(described, indent=2) + "\n"


def _plan_as_table(plan: ChunkPlan) -> str:
    lines = [
        f"{plan.num_frames} frames, {plan.num_frames / FPS:.2f} s, {len(plan.chunks)} chunks; "
        "frames from (included) to (excluded)",
        f"{'chunk':>5}  {'makes':>15}  {'keeps':>15}  {'seconds':>17}",
    ]
    for chunk in plan.chunks:
        makes = f"{chunk.start} - {chunk.stop}"
        keeps = f"{chunk.keep_start} - {chunk.keep_stop}"
        seconds = f"{chunk.keep_start / FPS:.2f} - {chunk.keep_stop / FPS:.2f}"
        lines.append(f"{chunk.index:>5}  {makes:>15}  {keeps:>15}  {seconds:>17}")
    return "\n".join(lines) + "\n"


def _inspect(arguments: argparse.Namespace) -> None:
    info = inspect(arguments.file)
    # Metadata may contain any text, and terminals interpret some characters as commands.
    lines = (show(line) for line in info.lines())
    text = json.dumps(info.to_json(), indent=2) if arguments.json else "\n".join(lines)
    say(text + "\n")


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    is_tiny = arguments.model == TINY
    if is_tiny:
        files = find_model_files(arguments.models)
        request, sizes = read_request(files.inspect(files.dit)), read_sizes(files)
    elif arguments.random:
        files, request, sizes = None, FULL_REQUEST, FULL_SIZES
    else:
        raise RequestError(
            f"got --model {arguments.model} without --random; only {TINY} ships weights, and for "
            "speed and memory random ones do: add --random"
        )
    if arguments.size != "auto":
        request = replace(request, width=arguments.size[0], height=arguments.size[1])
    report = measure(
        plain_request(request, arguments.frames),
        sizes,
        files=None if arguments.random else files,
        dtype=DTYPES[arguments.dtype or ("float32" if is_tiny else "bfloat16")],
        device=arguments.device,
        steps=arguments.steps,
        num_chunks=arguments.chunks,
    )
    text = json.dumps(report.to_json(), indent=2) if arguments.json else "\n".join(report.lines())
    say(text + "\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m turbotalk_core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    add_talk(commands.add_parser("talk", help="make a talking video"))
    _add_plan(commands.add_parser("plan", help="show which frames each chunk makes and keeps"))
    _add_inspect(commands.add_parser("inspect", help="say what a model file is"))
    _add_bench(commands.add_parser("bench", help="measure chunks, or say what one would need"))
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_plan, options=_PLAN_OPTIONS)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--audio", type=Path, help="sound or video file")
    length.add_argument("--seconds", type=parse_seconds, help="length of the voice")
    parser.add_argument(
        "--chunk-frames", type=parse_whole, default=CHUNK_FRAMES, help="(%(default)s)"
    )
    parser.add_argument(
        "--motion-frames", type=parse_whole, default=NUM_MOTION_FRAMES, help="(%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_inspect, options={})
    parser.add_argument(
        "file", type=Path, help="safetensors, .pth, or an index or folder of shards"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_bench, options=_BENCH_OPTIONS)
    parser.add_argument("--model", choices=(FULL, TINY), default=TINY, help="(%(default)s)")
    parser.add_argument("--random", action="store_true", help="random weights instead of files")
    parser.add_argument("--models", type=Path, default=EMBEDDED_MODELS, metavar="FOLDER")
    parser.add_argument("--device", type=parse_device, default=find_device(), help="%(default)s")
    parser.add_argument("--threads", type=parse_threads, help="CPU threads of the networks")
    parser.add_argument(
        "--dtype", choices=DTYPES, help=f"of the transformer; {FULL}: bfloat16, {TINY}: float32"
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        default="auto",
        metavar="WxH",
        help=f"{FULL}: 832x480, {TINY}: as trained",
    )
    parser.add_argument(
        "--frames", type=parse_count, help=f"4n + 1; {FULL}: 81, {TINY}: as trained"
    )
    parser.add_argument(
        "--steps",
        type=parse_count,
        nargs="+",
        default=NUM_STEPS,
        help="network calls per chunk, a video for each (1 2 4)",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--chunks", type=parse_count, default=NUM_CHUNKS, help="of each video (%(default)s)"
    )
