"""The command line: make a talking video, show a chunk plan, say what a model file is, measure.

Exit codes: 0 done, 2 refused (one line on stderr says why), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .audio.encoder import load_audio_encoder
from .audio.features import encode_speech
from .audio.io import read_audio
from .bench import (
    FULL_REQUEST,
    FULL_SIZES,
    measure,
    read_sizes,
    single_chunk,
)
from .chunking.plan import plan_chunks
from .errors import RequestError, TurboTalkError
from .geometry import FPS, count_frames, fit_size
from .image import prepare_reference, read_image
from .library import (
    AUDIO_ENCODER,
    EMBEDDED_MODELS,
    VAE,
    ModelFiles,
    find_model_files,
    load_models,
    read_request,
)
from .model.checkpoint import inspect
from .pipeline import count_work, generate, plan_video
from .request import CHUNK_FRAMES, NUM_MOTION_FRAMES, SCHEDULES, UPDATES, TalkRequest
from .types import ChunkPlan, Waveform
from .video.assemble import assemble, quantize_frames

REFUSED = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FULL, TINY = "14b", "tiny"
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = _make_parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except TurboTalkError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return REFUSED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    return 0


class _Bar:
    """A progress bar over the units of ``count_work``."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        self._bar.update(units)


def _talk(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    files = find_model_files(
        arguments.models,
        dit=arguments.dit,
        adapter=arguments.adapter,
        audio_encoder=arguments.encoder,
        vae=arguments.vae,
    )
    image_HWC = read_image(arguments.image)
    request = _make_request(arguments, read_request(files.dit), image_HWC)
    waveform = read_audio(arguments.audio)
    num_frames = assemble(
        arguments.out,
        # Nothing in it runs before the output file is known to be writable.
        _make_frames(
            request, image_HWC, waveform, files, arguments.device, DTYPES[arguments.dtype]
        ),
        waveform,
        crf=arguments.crf,
        metadata={"turbotalk": request.to_json()},
    )
    seconds = time.monotonic() - started
    sys.stdout.write(
        f"{arguments.out}: {num_frames} frames, {num_frames / FPS:.2f} s, made in {seconds:.1f} s\n"
    )


def _make_request(
    arguments: argparse.Namespace, shipped: TalkRequest, image_HWC: Tensor
) -> TalkRequest:
    if arguments.size == "auto":
        height, width = fit_size(*image_HWC.shape[:2], area=shipped.height * shipped.width)
    else:
        width, height = arguments.size
    chosen = {
        "num_inference_steps": arguments.steps,
        "schedule": arguments.schedule,
        "shift": arguments.shift,
        "update": arguments.update,
        "audio_guidance_scale": arguments.audio_guidance,
        "chunk_frames": arguments.chunk_frames,
        "num_motion_frames": arguments.motion_frames,
    }
    return replace(
        shipped,
        seed=arguments.seed,
        height=height,
        width=width,
        audio_scale=arguments.audio_scale,
        normalizes_loudness=arguments.loudness,
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _make_frames(
    request: TalkRequest,
    image_HWC: Tensor,
    waveform: Waveform,
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    reference_BCHW = prepare_reference(image_HWC, request.height, request.width)
    speech = encode_speech(
        waveform,
        load_audio_encoder(files.audio_encoder),
        normalizes_loudness=request.normalizes_loudness,
    )
    models = load_models(files, device, request.audio_scale, dtype, request.teacache_threshold)
    plan = plan_video(request, speech)
    with tqdm(total=count_work(plan, request), unit="call", dynamic_ncols=True) as bar:
        for finished in generate(request, reference_BCHW, speech, models, progress=_Bar(bar)):
            yield quantize_frames(finished.frames_BCTHW)


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.audio is not None:
        num_frames = read_audio(arguments.audio).num_frames
    else:
        num_frames = count_frames(arguments.seconds.numerator, arguments.seconds.denominator)
    plan = plan_chunks(num_frames, arguments.chunk_frames, arguments.motion_frames)
    sys.stdout.write(_plan_as_json(plan) if arguments.json else _plan_as_table(plan))


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
    text = json.dumps(info.to_json(), indent=2) if arguments.json else "\n".join(info.lines())
    sys.stdout.write(text + "\n")


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    is_tiny = arguments.model == TINY
    if is_tiny:
        files = find_model_files(arguments.models)
        request, sizes = read_request(files.dit), read_sizes(files)
    elif arguments.random:
        files, request, sizes = None, FULL_REQUEST, FULL_SIZES
    else:
        raise RequestError(
            f"got --model {arguments.model} without --random; only {TINY} ships weights, and for "
            "speed and memory random ones do: add --random"
        )
    if arguments.size != "auto":
        request = replace(request, width=arguments.size[0], height=arguments.size[1])
    request = single_chunk(request, arguments.steps, arguments.frames)
    report = measure(
        request,
        sizes,
        files=None if arguments.random else files,
        dtype=DTYPES[arguments.dtype or ("float32" if is_tiny else "bfloat16")],
        device=arguments.device,
    )
    text = json.dumps(report.to_json(), indent=2) if arguments.json else "\n".join(report.lines())
    sys.stdout.write(text + "\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m turbotalk_core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_talk(commands.add_parser("talk", help="make a talking video"))
    _add_plan(commands.add_parser("plan", help="show which frames each chunk makes and keeps"))
    _add_inspect(commands.add_parser("inspect", help="say what a model file is"))
    _add_bench(commands.add_parser("bench", help="measure one chunk, or say what it would need"))
    return parser


def _add_talk(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_talk)
    parser.add_argument("--image", type=Path, required=True, help="the portrait")
    parser.add_argument("--audio", type=Path, required=True, help="the voice: sound or video file")
    parser.add_argument("--out", type=Path, required=True, help="the .mp4 to make")
    parser.add_argument("--crf", type=int, default=18, help="H.264 quality, 0 (best) to 51")
    parser.add_argument("--device", type=torch.device, default=_find_device(), help="%(default)s")
    parser.add_argument("--threads", type=_parse_count, help="CPU threads of the networks")

    models = parser.add_argument_group("models", "file names in the sub-folders of --models")
    models.add_argument("--models", type=Path, default=EMBEDDED_MODELS, metavar="FOLDER")
    models.add_argument("--dit", help="video transformer; default: the embedded one")
    models.add_argument(
        "--adapter", help="audio adapter; default: the one inside --dit, else the embedded one"
    )
    models.add_argument("--encoder", default=AUDIO_ENCODER, help="audio encoder (%(default)s)")
    models.add_argument("--vae", default=VAE, help="video VAE (%(default)s)")
    models.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of transformer and adapter in memory, whatever the files hold (%(default)s)",
    )

    settings = parser.add_argument_group(
        "settings", "each defaults to what the video transformer ships with"
    )
    settings.add_argument("--seed", type=int, default=0, help="of all noise (0)")
    settings.add_argument(
        "--size", type=_parse_size, default="auto", metavar="WxH", help="default: from the image"
    )
    settings.add_argument("--steps", type=int, help="network evaluations per chunk")
    settings.add_argument("--schedule", choices=SCHEDULES)
    settings.add_argument("--shift", type=float, help="of the schedule")
    settings.add_argument("--update", choices=UPDATES, help="from one noise level to the next")
    settings.add_argument("--audio-guidance", type=float, help="push towards the voice, 1 is off")
    settings.add_argument("--audio-scale", type=float, default=1.0, help="adapter strength (1)")
    settings.add_argument("--chunk-frames", type=int, help="4n + 1")
    settings.add_argument("--motion-frames", type=int, help="4m + 1")
    settings.add_argument(
        "--loudness",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="bring the voice to -23 LUFS before it is heard; the video keeps the original",
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_plan)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--audio", type=Path, help="sound or video file")
    length.add_argument("--seconds", type=Fraction, help="length of the voice")
    parser.add_argument("--chunk-frames", type=int, default=CHUNK_FRAMES, help="(%(default)s)")
    parser.add_argument(
        "--motion-frames", type=int, default=NUM_MOTION_FRAMES, help="(%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_inspect)
    parser.add_argument(
        "file", type=Path, help="safetensors, .pth, or an index or folder of shards"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_bench)
    parser.add_argument("--model", choices=(FULL, TINY), default=TINY, help="(%(default)s)")
    parser.add_argument("--random", action="store_true", help="random weights instead of files")
    parser.add_argument("--models", type=Path, default=EMBEDDED_MODELS, metavar="FOLDER")
    parser.add_argument("--device", type=torch.device, default=_find_device(), help="%(default)s")
    parser.add_argument("--threads", type=_parse_count, help="CPU threads of the networks")
    parser.add_argument(
        "--dtype", choices=DTYPES, help=f"of the transformer; {FULL}: bfloat16, {TINY}: float32"
    )
    parser.add_argument(
        "--size",
        type=_parse_size,
        default="auto",
        metavar="WxH",
        help=f"{FULL}: 832x480, {TINY}: as trained",
    )
    parser.add_argument(
        "--frames", type=_parse_count, help=f"4n + 1; {FULL}: 81, {TINY}: as trained"
    )
    parser.add_argument("--steps", type=_parse_count, default=1, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="for programs")


def _parse_size(text: str) -> tuple[int, int] | str:
    if text == "auto":
        return text
    try:
        width, height = (int(side) for side in text.lower().split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; give width x height in pixels, as in 640x640, or auto"
        ) from error
    return width, height


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number from 1 on")
    return int(text)


def _find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
