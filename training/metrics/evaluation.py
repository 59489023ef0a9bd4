"""Evaluation of generated clips against real ones, by every metric whose networks are available.

Input: two folders of videos and one of weights. Output: a report and contact sheets. Only this
module imports all metrics.

Axes: N samples, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.data.resumable_stage import SKIPPED, attempt
from training.data.scores import load_program
from training.metrics.clips import SPAN_FRAMES, Clip, Skip, list_clips
from training.metrics.distances import (
    KID_SUBSETS,
    choose_subset_size,
    frechet_distance,
    subset_kernel_distances,
)
from training.metrics.expression import ExpressionSpace
from training.metrics.i3d import load_i3d
from training.metrics.inception import load_inception
from training.metrics.report import (
    ClipScore,
    Report,
    SetScore,
    SideCount,
    average_clips,
    write_report,
)
from training.metrics.sheets import SHEETS, pair_clips, write_sheets
from training.metrics.syncnet import SyncScores, load_syncnet, score_clip
from training.metrics.weights import (
    EXPRESSION,
    FACE,
    I3D,
    INCEPTION,
    SYNCNET,
    UsedFile,
    find_weights,
)
from turbotalk_core.errors import CheckpointError, MissingToolError, RequestError

GENERATED, REAL = "generated", "real"
LEAST_CLIPS = 2  # of each side: one clip is not a set, however many frames it has

INCEPTION_SPACE, I3D_SPACE, EXPRESSION_SPACE, SYNC = "inception", "i3d", "expression", "sync"
SET_METRICS = {
    "fid": INCEPTION_SPACE,
    "kid": INCEPTION_SPACE,
    "fvd": I3D_SPACE,
    "e_fid": EXPRESSION_SPACE,
}
METRICS = (*SET_METRICS, SYNC)
FILES = {
    INCEPTION_SPACE: (INCEPTION,),
    I3D_SPACE: (I3D,),
    EXPRESSION_SPACE: (EXPRESSION, FACE),
    SYNC: (SYNCNET, FACE),
}
FRAMES_PER_SAMPLE = {INCEPTION_SPACE: 1, I3D_SPACE: SPAN_FRAMES, EXPRESSION_SPACE: 1}

Instrument = Callable[[Clip], Any]
"""Measures one clip: a feature space returns samples [N, D], lip sync its scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of an evaluation.

    Attributes:
        metrics: required metrics; None measures those whose weights are available.
        num_frames: number of frames to measure, from the beginning of each clip; None for all.
        seed: seed of the subsets of kid.
        device: device of the networks. The user's own exported programs run on the device that they
            were exported for.

    Raises:
        RequestError: if a metric is unknown, or ``num_frames`` is below 1.
    """

    metrics: tuple[str, ...] | None = None
    num_frames: int | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        unknown = sorted(set(self.metrics or ()) - set(METRICS))
        has_none = self.metrics == () or (self.num_frames is not None and self.num_frames < 1)
        if unknown or has_none:
            raise RequestError(
                f"got the metrics {self.metrics} of {self.num_frames} frames; choose among "
                f"{', '.join(METRICS)}, and at least one frame"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruments:
    """Loaded networks, and the reasons for missing ones.

    Attributes:
        loaded: instruments by feature space, or ``sync``.
        missing: metrics that cannot be measured, with reasons.
        weights: files that were loaded.
    """

    loaded: Mapping[str, Instrument]
    missing: Mapping[str, str]
    weights: tuple[UsedFile, ...]


def evaluate(generated: Path, real: Path, weights: Path, out: Path, settings: Settings) -> Report:
    """Measure clips, and write the report and contact sheets.

    Args:
        generated: folder of generated videos.
        real: folder of real videos.
        weights: folder with files of ``weights.KNOWN_FILES``.
        out: folder to write to.
        settings: settings of the evaluation.

    Returns:
        The report that was written.

    Raises:
        RequestError: if a folder has no videos, or too few for a required metric.
        CheckpointError: if weights are not the expected ones, or those of a required metric are
            missing.
        MissingToolError: if a package that a required metric needs is not installed.
        OutputError: if a file cannot be written.
    """
    instruments = load_instruments(weights, settings)
    sides, skips = {}, []
    for side, folder in ((GENERATED, generated), (REAL, real)):
        sides[side], bad = list_clips(folder, side, settings.num_frames)
        skips += bad
    report = measure(sides, instruments, settings, skips)
    write_report(report, out)
    write_sheets(pair_clips(sides[GENERATED], sides[REAL]), out / SHEETS)
    return report


def load_instruments(folder: Path, settings: Settings) -> Instruments:
    """Load the networks of the requested metrics.

    Args:
        folder: folder of the weights.
        settings: requested metrics; those required by name must load.

    Returns:
        The loaded networks, and reasons for the others.

    Raises:
        CheckpointError: if a file of a required metric is missing or not the expected one.
        MissingToolError: if a package that it needs is not installed.
    """
    open_program = cache(
        load_program
    )  # sync and expressions share one detector and its cached faces

    def load_expression(regressor: Path, face: Path) -> Instrument:
        return ExpressionSpace(open_program(regressor), open_program(face))

    def load_sync(syncnet: Path, face: Path) -> Instrument:
        network = load_syncnet(syncnet, settings.device)
        return partial(score_clip, syncnet=network, detector=open_program(face))

    loaders: dict[str, Callable[..., Instrument]] = {
        INCEPTION_SPACE: partial(load_inception, device=settings.device),
        I3D_SPACE: partial(load_i3d, device=settings.device),
        EXPRESSION_SPACE: load_expression,
        SYNC: load_sync,
    }
    loaded: dict[str, Instrument] = {}
    missing: dict[str, str] = {}
    weights: dict[str, UsedFile] = {}
    for name, load in loaders.items():
        metrics = _list_metrics(name, settings)
        if not metrics:
            continue
        try:
            found = [find_weights(folder, file) for file in FILES[name]]
            loaded[name] = load(*(path for path, _ in found))
            weights |= {used.file: used for _, used in found}
        except (CheckpointError, MissingToolError) as error:
            if settings.metrics is not None:
                raise
            missing |= dict.fromkeys(metrics, str(error))
    return Instruments(loaded=loaded, missing=missing, weights=tuple(weights.values()))


def _list_metrics(instrument: str, settings: Settings) -> list[str]:
    return [
        metric
        for metric in METRICS
        if SET_METRICS.get(metric, SYNC) == instrument
        and (settings.metrics is None or metric in settings.metrics)
    ]


def measure(
    sides: Mapping[str, Sequence[Clip]],
    instruments: Instruments,
    settings: Settings,
    skips: Sequence[Skip] = (),
) -> Report:
    """Measure clips.

    Args:
        sides: clips of ``GENERATED`` and ``REAL``.
        instruments: loaded networks.
        settings: settings of the evaluation.
        skips: clips that were left out before.

    Returns:
        The results. A clip that an instrument cannot measure is left out of its metrics.

    Raises:
        RequestError: if there are too few clips for a required metric.
        CheckpointError: if the output of a network has the wrong form.
    """
    skips = list(skips)
    found: dict[str, dict[str, list[tuple[Clip, Any]]]] = {
        name: {side: [] for side in sides} for name in instruments.loaded
    }
    for side, clips in sides.items():
        # All instruments measure a clip before the next clip, while its decoded faces are cached.
        for clip in tqdm(clips, desc=f"{side} clips", mininterval=10, disable=None):
            for name, measure in instruments.loaded.items():
                record = attempt(
                    clip.name, lambda clip=clip, measure=measure: {"found": measure(clip)}
                )
                if SKIPPED in record:
                    of, reason = ", ".join(_list_metrics(name, settings)), record[SKIPPED]
                    skips.append(Skip(side=side, clip=clip.name, of=of, reason=reason))
                else:
                    found[name][side].append((clip, record["found"]))
    missing, set_scores = dict(instruments.missing), []
    clip_scores = _list_clip_scores(found.get(SYNC, {}))
    for name in found:
        for metric in _list_metrics(name, settings):
            try:
                if metric != SYNC:
                    set_scores.append(_compare(metric, found[name], settings.seed))
                elif not clip_scores:
                    raise RequestError(
                        "sync can be measured on none of the clips; give clips of a second or two, "
                        "with sound and a face"
                    )
            except RequestError as error:
                if settings.metrics is not None:
                    raise
                missing[metric] = str(error)
    return Report(
        settings={
            "metrics": settings.metrics and list(settings.metrics),
            "num_frames": settings.num_frames,
            "seed": settings.seed,
            "device": settings.device.type,
        },
        sides=tuple(
            SideCount(
                side=side,
                num_clips=len(clips),
                num_frames=sum(clip.num_frames for clip in clips),
            )
            for side, clips in sides.items()
        ),
        set_scores=tuple(set_scores),
        clip_means=average_clips(clip_scores),
        clip_scores=clip_scores,
        not_measured=missing,
        skips=tuple(skips),
        weights=instruments.weights,
    )


def _list_clip_scores(found: Mapping[str, list[tuple[Clip, SyncScores]]]) -> tuple[ClipScore, ...]:
    return tuple(
        ClipScore(side=side, clip=clip.name, num_frames=clip.num_frames, **asdict(scores))
        for side, measured in found.items()
        for clip, scores in measured
    )


def _compare(metric: str, found: Mapping[str, list[tuple[Clip, Tensor]]], seed: int) -> SetScore:
    generated, real = (found[side] for side in (GENERATED, REAL))
    if min(len(generated), len(real)) < LEAST_CLIPS:
        raise RequestError(
            f"{metric} compares sets, and can be measured on {len(generated)} generated and "
            f"{len(real)} real clips; give at least {LEAST_CLIPS} of each"
        )
    generated_ND, real_ND = (
        torch.cat([samples for _, samples in side]) for side in (generated, real)
    )
    samples, width = (len(generated_ND), len(real_ND)), real_ND.shape[1]
    frames_per_sample = FRAMES_PER_SAMPLE[SET_METRICS[metric]]
    notes, spread = [], None
    if metric == "kid":
        estimates = subset_kernel_distances(generated_ND, real_ND, seed)
        value, spread = estimates.mean().item(), estimates.std().item()
        notes.append(f"{KID_SUBSETS} subsets of {choose_subset_size(*samples)} samples")
    else:
        value = frechet_distance(generated_ND, real_ND)
        if min(samples) <= width:
            notes.append(
                f"{min(samples)} samples of {width} features make a singular covariance; the "
                "distance tells more of their number than of the videos"
            )
    if samples[0] != samples[1]:
        notes.append(f"unequal sets, {samples[0]} generated and {samples[1]} real samples")
    return SetScore(
        metric=metric,
        value=value,
        spread=spread,
        sample="frame" if frames_per_sample == 1 else f"span of {frames_per_sample} frames",
        width=width,
        clips=(len(generated), len(real)),
        frames=(samples[0] * frames_per_sample, samples[1] * frames_per_sample),
        samples=samples,
        notes=tuple(notes),
    )
