"""Does a long video stay as it began? Seams, colours, lips and memory over many chunks.

In: a number of chunks. Out: a report as JSON and Markdown. Separate because it looks at one long
video as it is made, and keeps none of it; the other evaluations look at many short ones.

Axes: C channels, T video frames, H height, W width, S audio samples, K chunks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.data.mouth import estimate_aperture, mouth_curve, sync
from training.data.speech import draw_speech
from training.data.synthetic import SAMPLES_PER_FRAME, film
from training.evaluate import SPLIT, load_family
from training.hardware import name_cpu
from turbotalk_core.audio.features import encode_speech
from turbotalk_core.chunking.plan import plan_chunks
from turbotalk_core.errors import RequestError, TurboTalkError
from turbotalk_core.geometry import FPS, SAMPLE_RATE
from turbotalk_core.pipeline import generate
from turbotalk_core.types import FrameChunk, Waveform
from turbotalk_core.video.assemble import quantize_frames

TEN = 10  # chunks at either end that are compared
MINUTE = 60 * FPS  # video frames
WATCHED = (3, 10, 50, 100, 200)  # chunks after which the memory is read
CALIBRATION_FRAMES = 81  # of the avatar, from which the still region is known
BLACK = 1.0  # what is added to pixels in [-1, 1], so that black is 0 and shares mean something


@dataclass(frozen=True, slots=True, kw_only=True)
class LongScores:
    """What a long video shows.

    Attributes:
        num_chunks: that it was made of.
        num_frames: of the video.
        seam_ratio: median change of a pixel from the last frame of a chunk to the first of the
            next, in the median change from frame to frame inside chunks.
        worst_seam_ratio: of the seam that shows most.
        colour_drift: largest change of a channel's mean in still regions from the first minute to
            the last, as a share of the first.
        contrast_drift: the same of its standard deviation over the region's pixels.
        first_sync: sync correlation of the first ten chunks.
        last_sync: of the last ten.
        resident_bytes: memory of the process after some chunks; empty where the system does not
            tell it.
        seconds_per_chunk: median, of the first ten chunks and of the last ten.
    """

    num_chunks: int
    num_frames: int
    seam_ratio: float
    worst_seam_ratio: float
    colour_drift: float
    contrast_drift: float
    first_sync: float
    last_sync: float
    resident_bytes: dict[int, int]
    seconds_per_chunk: tuple[float, float]


def watch(chunks: Iterable[FrameChunk], still_mask_HW: Tensor, aperture_T: Tensor) -> LongScores:
    """Measure a video while it is made.

    Args:
        chunks: of ``generate``, at least two.
        still_mask_HW: True where nothing should move.
        aperture_T: the true mouth, a value per frame.

    Returns:
        Its scores.

    Raises:
        RequestError: a single chunk, or no still region.
    """
    if not bool(still_mask_HW.any()):
        raise RequestError("the avatar has no region that stands still; choose another seed")
    seams: list[float] = []
    steps: list[float] = []
    means: list[Tensor] = []  # [T, C] each
    spreads: list[Tensor] = []
    first: list[tuple[int, Tensor]] = []
    last: deque[tuple[int, Tensor]] = deque(maxlen=TEN)
    seconds: list[float] = []
    resident: dict[int, int] = {}
    previous_CHW = None
    started = time.perf_counter()
    for made in chunks:
        seconds.append(time.perf_counter() - started)
        bytes_THWC = quantize_frames(made.frames_BCTHW)
        frames_CTHW = bytes_THWC.permute(3, 0, 1, 2).float() / 127.5 - 1
        if previous_CHW is not None:
            seams.append(float((frames_CTHW[:, 0] - previous_CHW).abs().mean()))
        steps += frames_CTHW.diff(dim=1).abs().mean((0, 2, 3)).tolist()
        previous_CHW = frames_CTHW[:, -1]
        still_TCN = frames_CTHW[:, :, still_mask_HW].transpose(0, 1)
        means.append(still_TCN.mean(2))
        spreads.append(still_TCN.std(2))
        kept = made.chunk.keep_start, bytes_THWC
        last.append(kept)
        if len(first) < TEN:
            first.append(kept)
        number = len(seconds)
        if number in WATCHED and (now := _read_resident_bytes()) is not None:
            resident[number] = now
        started = time.perf_counter()
    if not seams:
        raise RequestError("got a single chunk; a long video has at least two")
    usual = median(steps)
    return LongScores(
        num_chunks=len(seconds),
        num_frames=sum(mean_TC.shape[0] for mean_TC in means),
        seam_ratio=median(seams) / usual,
        worst_seam_ratio=max(seams) / usual,
        colour_drift=_measure_drift(torch.cat(means) + BLACK),
        contrast_drift=_measure_drift(torch.cat(spreads)),
        first_sync=_read_sync(first, aperture_T),
        last_sync=_read_sync(list(last), aperture_T),
        resident_bytes=resident,
        seconds_per_chunk=(median(seconds[:TEN]), median(seconds[-TEN:])),
    )


def _measure_drift(values_TC: Tensor) -> float:
    """Compare the last minute with the first, or the last half where there are not two."""
    length = min(MINUTE, values_TC.shape[0] // 2)
    begin_C, end_C = values_TC[:length].mean(0), values_TC[-length:].mean(0)
    return float(((end_C - begin_C).abs() / begin_C.clamp_min(1e-3)).max())


def _read_sync(kept: Sequence[tuple[int, Tensor]], aperture_T: Tensor) -> float:
    frames_CTHW = torch.cat([bytes_THWC for _, bytes_THWC in kept]).permute(3, 0, 1, 2) / 127.5 - 1
    start = kept[0][0]
    true_T = aperture_T[start : start + frames_CTHW.shape[1]]
    return sync(estimate_aperture(frames_CTHW), true_T)[0]


def _read_resident_bytes() -> int | None:
    """Read how much memory this process holds, where Linux tells it."""
    path = Path("/proc/self/statm")
    if not path.is_file():
        return None
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a score must not exceed.

    Attributes:
        text: what is claimed.
        value: that was measured.
        most: that is allowed.
    """

    text: str
    value: float
    most: float

    @property
    def holds(self) -> bool:
        """Whether it does not."""
        return self.value <= self.most


def list_bounds(scores: LongScores) -> list[Bound]:
    """Say what a long video must keep to.

    Args:
        scores: of ``watch``.

    Returns:
        What is claimed, with what was measured.
    """
    sync_lost = scores.first_sync - scores.last_sync
    bounds = [
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
    watched = [number for number in scores.resident_bytes if number >= TEN]
    if len(watched) > 1:
        grown = scores.resident_bytes[watched[-1]] - scores.resident_bytes[watched[0]]
        per_hundred = grown / (watched[-1] - watched[0]) * 100 / 1e6
        bounds.append(
            Bound(
                text="Memory grows by at most 1 MB per 100 chunks after the first ten",
                value=per_hundred,
                most=1.0,
            )
        )
    return bounds


def to_page(scores: LongScores, settings: dict[str, Any], command: str) -> str:
    """Tell the scores to people.

    Args:
        scores: of ``watch``.
        settings: of the run.
        command: that made it.

    Returns:
        Markdown.
    """
    lines = [
        "# A long video from the embedded student",
        "",
        f"{scores.num_chunks} chunks, {scores.num_frames} frames, "
        f"{scores.num_frames / FPS / 60:.1f} minutes, of a held-out avatar that says held-out "
        f"speech; network calls per chunk: {settings['steps']}, seed {settings['seed']}, "
        f"colour match {settings['color_strength']:g}, on {settings['cpu']}, "
        f"threads: {settings['threads']}.",
        "",
        "| claim | measured | at most | |",
        "|---|---|---|---|",
        *(
            f"| {bound.text} | {bound.value:.3f} | {bound.most:g} | "
            f"**{'holds' if bound.holds else 'does not hold'}** |"
            for bound in list_bounds(scores)
        ),
        "",
        "| | |",
        "|---|---|",
        f"| worst seam | {scores.worst_seam_ratio:.2f} times the usual step |",
        f"| sync correlation, first and last ten chunks | {scores.first_sync:.3f}, "
        f"{scores.last_sync:.3f} |",
        f"| seconds per chunk, first and last ten | {scores.seconds_per_chunk[0]:.2f}, "
        f"{scores.seconds_per_chunk[1]:.2f} |",
        *(
            f"| memory of the process after {number} chunks | {held / 1e6:.1f} MB |"
            for number, held in scores.resident_bytes.items()
        ),
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Args:
        argv: arguments; None takes those of the program.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m training.long", description=__doc__)
    parser.add_argument("--chunks", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--weights", type=Path, default=Path("models"), help="models folder")
    parser.add_argument("--model", choices=("teacher", "student"), default="student")
    parser.add_argument("--seed", type=int, default=1, help="of avatar, speech and noise")
    parser.add_argument("--color-strength", type=float, default=0.0, help="of the colour match")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="report for programs")
    parser.add_argument("--markdown", type=Path, required=True, help="report for people")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        scores, settings = _run(arguments)
    except TurboTalkError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    bounds = [asdict(bound) | {"holds": bound.holds} for bound in list_bounds(scores)]
    report = {"settings": settings, "scores": asdict(scores), "bounds": bounds}
    command = " ".join(("python -m training.long", *(sys.argv[1:] if argv is None else argv)))
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    arguments.markdown.write_text(to_page(scores, settings, command), encoding="utf-8")
    return 0


def _run(arguments: argparse.Namespace) -> tuple[LongScores, dict[str, Any]]:
    shipped, models, encoder = load_family(arguments.weights, arguments.model)
    request = replace(shipped, seed=arguments.seed, color_strength=arguments.color_strength)
    if arguments.chunks < 2:
        raise RequestError(f"got {arguments.chunks} chunks; a long video has at least two")
    new_frames = request.chunk_frames - request.num_motion_frames
    num_frames = request.chunk_frames + (arguments.chunks - 1) * new_frames
    plan = plan_chunks(num_frames, request.chunk_frames, request.num_motion_frames)
    speech_S = draw_speech(SPLIT, arguments.seed, num_frames / FPS)
    shown = min(CALIBRATION_FRAMES, num_frames) * SAMPLES_PER_FRAME
    avatar, reference_CHW = film(SPLIT, arguments.seed, speech_S[:shown])
    waveform = Waveform(samples_CS=speech_S.unsqueeze(0), sample_rate=SAMPLE_RATE)
    chunks = generate(request, reference_CHW.unsqueeze(0), encode_speech(waveform, encoder), models)
    bar = tqdm(chunks, total=len(plan.chunks), unit="chunk", mininterval=10)
    scores = watch(bar, avatar.still_mask_HW, mouth_curve(speech_S).aperture_T)
    settings = {
        "model": arguments.model,
        "steps": request.num_inference_steps,
        "seed": arguments.seed,
        "color_strength": arguments.color_strength,
        "cpu": name_cpu(),
        "threads": arguments.threads,
    }
    return scores, settings


if __name__ == "__main__":
    sys.exit(main())
