"""Evaluation of a long video: seams, drift of colours, and lip sync over many chunks.

    python -m training.evaluation.long --chunks 100 --json FILE --markdown FILE
    python -m training.evaluation.long --chunks 20 --model teacher --json FILE

The command generates a video and writes a report as JSON, a page and a strip of pictures. It
measures each chunk when it is generated and keeps only the last ones in memory; other evaluations
use short clips.

Axes: C channels, T video frames, H height, W width, S audio samples, K chunks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from training.avatars.mouth import mouth_curve
from training.avatars.speech import draw_speech
from training.avatars.synthetic import SAMPLES_PER_FRAME, film
from training.evaluation.generation import DITS, SPLIT, load_family
from training.evaluation.mouth import estimate_aperture, sync
from training.markdown import table
from training.outputs import hold_files, write_picture
from turbotalk_core.audio.conversation import encode_speech
from turbotalk_core.cli.arguments import Parser, parse_count, parse_number, parse_threads, run
from turbotalk_core.errors import RequestError
from turbotalk_core.geometry import FPS, MAX_FRAMES, SAMPLE_RATE, TEMPORAL_STRIDE
from turbotalk_core.pipeline import generate
from turbotalk_core.safe_io.atomic import write_text
from turbotalk_core.takes.host_memory import trim_host_memory
from turbotalk_core.types import FrameChunk, Waveform
from turbotalk_core.video.mux import quantize_frames

PROGRAM = "python -m training.evaluation.long"
NUM_PICTURES = 9  # pictures of the strip
TEN = 10  # chunks at the start and at the end that are compared
MINUTE = 60 * FPS  # video frames
CALIBRATION_FRAMES = 81  # frames of the avatar's own render that determine the still region
BLACK = 1.0  # added to pixels in [-1, 1], so that black is 0 and relative changes are meaningful


@dataclass(frozen=True, slots=True, kw_only=True)
class LongScores:
    """Scores of a long video.

    Attributes:
        num_chunks: chunks of the video.
        num_frames: frames of the video.
        seam_ratio: median change of a pixel from the last frame of a chunk to the first of the
            next, divided by the median change from frame to frame inside chunks.
        worst_seam_ratio: the same for the seam with the largest change.
        latent_step_ratio: the same for the steps inside chunks at which a latent frame begins. A
            seam is such a step too, and of the four frames of a latent frame the first one differs
            most from the frame before.
        colour_drift: largest relative change of a channel's mean in still regions from the first
            minute to the last. Regions are still if they do not move in the avatar's own render.
        contrast_drift: the same for its standard deviation over the region's pixels.
        first_sync: sync correlation of the first ten chunks.
        last_sync: sync correlation of the last ten chunks.
        syncs: sync correlation of each group of ten successive chunks, from the first on.
        chunk_syncs: sync correlation of each chunk alone. That of ten chunks together also falls
            if the mouth opens wider in some chunks than in others.
    """

    num_chunks: int
    num_frames: int
    seam_ratio: float
    worst_seam_ratio: float
    latent_step_ratio: float
    colour_drift: float
    contrast_drift: float
    first_sync: float
    last_sync: float
    syncs: list[float]
    chunk_syncs: list[float]


def measure(
    chunks: Iterable[FrameChunk],
    still_mask_HW: Tensor,
    aperture_T: Tensor,
    on_chunk: Callable[[int, Tensor], None] = lambda *_: None,
) -> LongScores:
    """Measure a video while it is generated.

    Args:
        chunks: chunks of ``generate``, at least two.
        still_mask_HW: True where nothing should move.
        aperture_T: the true mouth curve, a value per frame.
        on_chunk: called with the number of each chunk, from 0, and its frames, uint8 [T, H, W, C].

    Returns:
        The scores.

    Raises:
        RequestError: if there is a single chunk, no still region, or no motion.
    """
    if not bool(still_mask_HW.any()):
        raise RequestError("the avatar has no region that stands still; choose another seed")
    seams: list[float] = []
    steps: list[float] = []
    latent_steps: list[float] = []
    means: list[list[float]] = []  # [T, C]
    spreads: list[list[float]] = []
    syncs: list[float] = []
    chunk_syncs: list[float] = []
    last: deque[tuple[int, Tensor]] = deque(maxlen=TEN)
    previous_CHW = None
    for number, made in enumerate(chunks):
        bytes_THWC = quantize_frames(made.frames_BCTHW)
        frames_CTHW = bytes_THWC.permute(3, 0, 1, 2).float() / 127.5 - 1
        if previous_CHW is not None:
            seams.append(float((frames_CTHW[:, 0] - previous_CHW).abs().mean()))
        inside = frames_CTHW.diff(dim=1).abs().mean((0, 2, 3)).tolist()
        steps += inside
        position = made.chunk.keep_start - made.chunk.start  # of the chunk's first kept frame
        latent_steps += inside[-position % TEMPORAL_STRIDE :: TEMPORAL_STRIDE]
        on_chunk(number, bytes_THWC)
        previous_CHW = frames_CTHW[:, -1]
        still_TCN = frames_CTHW[:, :, still_mask_HW].transpose(0, 1)
        means += still_TCN.mean(2).tolist()
        spreads += still_TCN.std(2).tolist()
        last.append((made.chunk.keep_start, bytes_THWC))
        chunk_syncs.append(_read_sync([last[-1]], aperture_T))
        if (number + 1) % TEN == 0:
            syncs.append(_read_sync(last, aperture_T))
        trim_host_memory()  # as a take does after each chunk
    if not seams:
        raise RequestError("got a single chunk; a long video has at least two")
    usual = median(steps)
    if usual == 0:
        raise RequestError("nothing moves from frame to frame; is the network trained?")
    last_sync = _read_sync(last, aperture_T)
    first_sync = syncs[0] if syncs else last_sync
    return LongScores(
        num_chunks=len(chunk_syncs),
        num_frames=len(means),
        seam_ratio=median(seams) / usual,
        worst_seam_ratio=max(seams) / usual,
        latent_step_ratio=median(latent_steps) / usual,
        colour_drift=_measure_drift(torch.tensor(means) + BLACK),
        contrast_drift=_measure_drift(torch.tensor(spreads)),
        first_sync=first_sync,
        last_sync=last_sync,
        syncs=syncs,
        chunk_syncs=chunk_syncs,
    )


def _measure_drift(values_TC: Tensor) -> float:
    """Compare the last minute with the first, or the two halves of a video under two minutes."""
    length = min(MINUTE, values_TC.shape[0] // 2)
    begin_C, end_C = values_TC[:length].mean(0), values_TC[-length:].mean(0)
    return float(((end_C - begin_C).abs() / begin_C.clamp_min(1e-3)).max())


def _read_sync(kept: Iterable[tuple[int, Tensor]], aperture_T: Tensor) -> float:
    starts, pictures = zip(*kept, strict=True)
    frames_CTHW = torch.cat(pictures).permute(3, 0, 1, 2) / 127.5 - 1
    start = starts[0]
    true_T = aperture_T[start : start + frames_CTHW.shape[1]]
    return sync(estimate_aperture(frames_CTHW), true_T)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Upper bound of a score.

    Attributes:
        text: the claim in words.
        value: the measured value.
        most: the largest allowed value.
    """

    text: str
    value: float
    most: float

    @property
    def holds(self) -> bool:
        """Whether the value is within the bound."""
        return self.value <= self.most


def list_bounds(scores: LongScores) -> list[Bound]:
    """Return the bounds that a long video must keep.

    Args:
        scores: result of ``measure``.

    Returns:
        The bounds with the measured values.
    """
    sync_lost = scores.first_sync - scores.last_sync
    return [
        Bound(
            text="The step across a seam is at most 1.25 times the usual step inside a chunk",
            value=scores.seam_ratio,
            most=1.25,
        ),
        Bound(
            text="Colours of still regions drift by at most 2 %",
            value=scores.colour_drift,
            most=0.02,
        ),
        Bound(
            text="Contrast of still regions drifts by at most 2 %",
            value=scores.contrast_drift,
            most=0.02,
        ),
        Bound(
            text="The last ten chunks lose at most 0.02 of the first ten's sync correlation",
            value=sync_lost,
            most=0.02,
        ),
    ]


def to_page(reports: Sequence[Mapping[str, Any]], command: str) -> str:
    """Format reports as a page, with one column each.

    Args:
        reports: reports of one or several models, as the command line writes them.
        command: command that made the first report.

    Returns:
        Markdown.
    """
    scores = [report["scores"] for report in reports]

    claims = [bound["text"] for bound in reports[0]["bounds"]]
    head = ["", *(_name(report["settings"]) for report in reports)]
    rows = [
        ["chunks, minutes", *map(_format_length, scores)],
        *(
            [text, *(_format_bound(text, report["bounds"]) for report in reports)]
            for text in claims
        ),
        ["worst seam, in usual steps", *(f"{score['worst_seam_ratio']:.2f}" for score in scores)],
        [
            "step to the beginning of a latent frame inside chunks, in usual steps",
            *(f"{score['latent_step_ratio']:.2f}" for score in scores),
        ],
        [
            "sync correlation, first and last ten chunks",
            *(f"{score['first_sync']:.3f}, {score['last_sync']:.3f}" for score in scores),
        ],
        [
            "the same of the worst ten between",
            *(f"{min(score['syncs'], default=score['first_sync']):.3f}" for score in scores),
        ],
        [
            "the same of a chunk by itself, median of the first and last ten",
            *(
                f"{median(score['chunk_syncs'][:TEN]):.3f}, "
                f"{median(score['chunk_syncs'][-TEN:]):.3f}"
                for score in scores
            ),
        ],
    ]
    lines = [
        "# Long videos from the embedded models",
        "",
        "One video each of a held-out avatar that says held-out speech, made by "
        f"`{PROGRAM}`. The usual step is the median change from a frame to the next "
        "inside chunks; most of the picture rests, so it is small.",
        "",
        table(head, rows, is_tight=True),
        "",
        "What remains, why, and what was tried is in [ADR 11](../adr/0011-seams-and-drift.md) and "
        "[ADR 12](../adr/0012-a-student-learns-to-go-on.md).",
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines)


def _name(settings: Mapping[str, Any]) -> str:
    ways = [
        f"{settings['model']}, steps: {settings['steps']}, seed {settings['seed']}",
        *(["as the reference goes on"] if settings["follows_reference"] else []),
        *(["anchored"] if settings["anchors_chunks"] else []),
        *([f"colours {settings['color_strength']:g}"] if settings["color_strength"] else []),
    ]
    return ", ".join(ways)


def _format_length(score: Mapping[str, Any]) -> str:
    return f"{score['num_chunks']}, {score['num_frames'] / FPS / 60:.1f}"


def _format_bound(text: str, bounds: Iterable[Mapping[str, Any]]) -> str:
    for bound in bounds:
        if bound["text"] == text:
            return f"{bound['value']:.3f} **{'holds' if bound['holds'] else 'does not hold'}**"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    parser = Parser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--chunks", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--weights", type=Path, default=Path("models"), help="models folder")
    parser.add_argument("--model", choices=tuple(DITS), default="student")
    parser.add_argument("--dit", type=Path, help="video transformer to take instead")
    parser.add_argument("--adapter", type=Path, help="its audio adapter")
    parser.add_argument(
        "--steps", type=parse_count, help="network calls per chunk; default: as shipped"
    )
    parser.add_argument("--seed", type=int, default=1, help="of avatar, speech and noise")
    parser.add_argument(
        "--color-strength", type=parse_number, default=0.0, help="of the colour match"
    )
    parser.add_argument(
        "--anchor", action=argparse.BooleanOptionalAction, help="default: as shipped"
    )
    parser.add_argument(
        "--follow-reference",
        action="store_true",
        help="go on from chunk to chunk as the reference does",
    )
    parser.add_argument(
        "--threads", type=parse_threads, default=1, help="CPU threads (%(default)s)"
    )
    parser.add_argument("--json", type=Path, required=True, help="report for programs")
    parser.add_argument("--markdown", type=Path, help="page for people")
    parser.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        metavar="JSON",
        help="an earlier report to show on the page, too; again for each",
    )
    parser.add_argument(
        "--pictures", type=Path, help="strip of first frames of chunks, a .png or .webp"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    command = (
        "python -m training.evaluation.long",
        *(sys.argv[1:] if argv is None else argv),
    )
    return run(lambda: _write(arguments, " ".join(command)))


def _write(arguments: argparse.Namespace, command: str) -> None:
    beside = [_read_report(path) for path in arguments.beside]
    with hold_files(arguments.json, arguments.markdown, picture=arguments.pictures):
        report, pictures = _run(arguments)
        text = json.dumps(report, indent=1) + "\n"
        write_text(arguments.json, text)
        if arguments.pictures is not None:
            write_picture(arguments.pictures, Image.fromarray(torch.cat(pictures, 1).numpy()))
        if arguments.markdown is not None:
            write_text(arguments.markdown, to_page([json.loads(text), *beside], command))


def _read_report(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RequestError(
            f"cannot read {path} ({type(error).__name__}); give a report that this command wrote"
        ) from error


def _run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Tensor]]:
    shipped, models, encoder = load_family(
        arguments.weights, arguments.model, arguments.dit, arguments.adapter
    )
    request = replace(
        shipped,
        seed=arguments.seed,
        color_strength=arguments.color_strength,
        follows_reference=arguments.follow_reference,
        num_inference_steps=arguments.steps or shipped.num_inference_steps,
        anchors_chunks=shipped.anchors_chunks if arguments.anchor is None else arguments.anchor,
    )
    new_frames = request.chunk_frames - request.num_motion_frames
    num_frames = request.chunk_frames + (arguments.chunks - 1) * new_frames
    if arguments.chunks < 2 or num_frames > MAX_FRAMES:
        raise RequestError(
            f"got {arguments.chunks} chunks; a long video has at least two, and at most "
            f"{MAX_FRAMES} frames"
        )
    speech_S = draw_speech(SPLIT, arguments.seed, num_frames / FPS)
    num_samples = min(CALIBRATION_FRAMES, num_frames) * SAMPLES_PER_FRAME
    avatar, reference_CHW = film(SPLIT, arguments.seed, speech_S[:num_samples])
    waveform = Waveform(samples_CS=speech_S.unsqueeze(0), sample_rate=SAMPLE_RATE)
    chunks = generate(
        request, [reference_CHW.unsqueeze(0)], [encode_speech(waveform, encoder)], models
    )
    bar = tqdm(chunks, total=arguments.chunks, unit="chunk", mininterval=10)
    chosen = torch.linspace(0, arguments.chunks - 1, NUM_PICTURES).round().long().tolist()
    pictures: list[Tensor] = []

    def on_chunk(number: int, bytes_THWC: Tensor) -> None:
        if number in chosen:
            pictures.append(bytes_THWC[0].clone())

    scores = measure(bar, avatar.still_mask_HW, mouth_curve(speech_S).aperture_T, on_chunk)
    settings = {
        "model": arguments.model if arguments.dit is None else arguments.dit.stem,
        "steps": request.num_inference_steps,
        "seed": request.seed,
        "color_strength": request.color_strength,
        "anchors_chunks": request.anchors_chunks,
        "follows_reference": request.follows_reference,
    }
    bounds = [asdict(bound) | {"holds": bound.holds} for bound in list_bounds(scores)]
    return {"settings": settings, "scores": asdict(scores), "bounds": bounds}, pictures


if __name__ == "__main__":
    sys.exit(main())
