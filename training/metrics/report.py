"""Report of an evaluation, as JSON for programs and Markdown for people.

The report keeps numbers together with their context: how many clips, which weights, and what was
left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.markdown import escape, table
from training.metrics.clips import Skip
from training.metrics.weights import UsedFile
from turbotalk_core.safe_io.atomic import make_folder, write_text

REPORT = "metrics.json"
TABLE = "metrics.md"
RULE = (
    "Distances of sets depend on how many samples there are: compare only rows with equal numbers "
    "of clips and frames on both sides. FID, FVD and E-FID are too large where there are few; KID "
    "is unbiased."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SideCount:
    """Numbers of usable clips and frames in a folder.

    Attributes:
        side: ``generated`` or ``real``.
        num_clips: clips that could be opened.
        num_frames: frames of all of them.
    """

    side: str
    num_clips: int
    num_frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetScore:
    """Distance of the generated set from the real one.

    Attributes:
        metric: fid, kid, fvd or e_fid.
        value: the distance.
        spread: standard deviation over subsets, for kid.
        sample: description of one sample.
        width: feature width.
        clips: numbers of clips, generated and real.
        frames: numbers of frames of these clips, generated and real.
        samples: numbers of samples taken from them, generated and real.
        notes: caveats for readers.
    """

    metric: str
    value: float
    spread: float | None
    sample: str
    width: int
    clips: tuple[int, int]
    frames: tuple[int, int]
    samples: tuple[int, int]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipScore:
    """Scores of one clip; see ``syncnet.SyncScores``.

    Attributes:
        side: ``generated`` or ``real``.
        clip: name of the clip.
        num_frames: number of measured frames.
        sync_c: confidence; more is better.
        sync_d: distance; less is better.
        offset: in video frames, positive if the voice is late.
    """

    side: str
    clip: str
    num_frames: int
    sync_c: float
    sync_d: float
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipMean:
    """Means of clip scores over a side.

    Attributes:
        side: ``generated`` or ``real``.
        num_clips: number of measured clips.
        num_frames: frames of all of them.
        sync_c: mean of the clips' values.
        sync_d: mean of the clips' values.
    """

    side: str
    num_clips: int
    num_frames: int
    sync_c: float
    sync_d: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Complete results of one evaluation.

    Attributes:
        settings: settings of the evaluation.
        sides: numbers of clips and frames that were compared.
        set_scores: distances between the sets.
        clip_means: means of ``clip_scores``.
        clip_scores: scores of each clip.
        not_measured: metrics that were not measured, with reasons.
        skips: clips that were left out, and of what.
        weights: weight files that were used.
    """

    settings: dict[str, Any]
    sides: tuple[SideCount, ...]
    set_scores: tuple[SetScore, ...]
    clip_means: tuple[ClipMean, ...]
    clip_scores: tuple[ClipScore, ...]
    not_measured: dict[str, str]
    skips: tuple[Skip, ...]
    weights: tuple[UsedFile, ...]


def average_clips(scores: Sequence[ClipScore]) -> tuple[ClipMean, ...]:
    """Average clip scores by side.

    Args:
        scores: scores of all clips.

    Returns:
        Means per side that has any scores.
    """
    means = []
    for side in dict.fromkeys(score.side for score in scores):
        of_side = [score for score in scores if score.side == side]
        means.append(
            ClipMean(
                side=side,
                num_clips=len(of_side),
                num_frames=sum(score.num_frames for score in of_side),
                sync_c=sum(score.sync_c for score in of_side) / len(of_side),
                sync_d=sum(score.sync_d for score in of_side) / len(of_side),
            )
        )
    return tuple(means)


def write_report(report: Report, folder: Path) -> None:
    """Write a report as JSON and as Markdown.

    Args:
        report: report to write.
        folder: folder to write to; created if it does not exist.

    Raises:
        OutputError: if a file cannot be written.
    """
    text = json.dumps(asdict(report), indent=1) + "\n"
    for name, content in ((REPORT, text), (TABLE, format_report(report))):
        make_folder(folder)
        write_text(folder / name, content)


def format_report(report: Report) -> str:
    """Format a report as Markdown.

    Args:
        report: report to format.

    Returns:
        Tables, and lists of what was left out.
    """
    parts = ["# Generated against real videos", _tabulate_sides(report), RULE]
    if report.set_scores:
        parts += ["## Of sets", _tabulate_sets(report.set_scores)]
        notes = [f"- {score.metric}: {note}" for score in report.set_scores for note in score.notes]
        parts += ["\n".join(notes)] if notes else []
    if report.clip_scores:
        parts += ["## Of clips", _tabulate_means(report.clip_means)]
        parts += [_tabulate_clips(report.clip_scores)]
    if report.not_measured:
        missing = [
            f"- {metric}: not measured: {why}" for metric, why in report.not_measured.items()
        ]
        parts += ["## Not measured", "\n".join(missing)]
    if report.skips:
        parts += ["## Left out", _tabulate_skips(report.skips)]
    if report.weights:
        parts += ["## Weights", _tabulate_weights(report.weights)]
    return "\n\n".join(parts) + "\n"


def _tabulate_sides(report: Report) -> str:
    left_out = [skip.side for skip in report.skips if skip.of == "all"]
    return _tabulate(
        ("", "clips", "frames", "clips left out"),
        (
            (side.side, side.num_clips, side.num_frames, left_out.count(side.side))
            for side in report.sides
        ),
    )


def _tabulate_sets(scores: Sequence[SetScore]) -> str:
    def both(counts: tuple[int, int]) -> str:
        return f"{counts[0]} / {counts[1]}"

    return _tabulate(
        ("metric", "value", "clips", "frames", "samples", "a sample is"),
        (
            (
                score.metric,
                f"{score.value:.4f}"
                + (f" ± {score.spread:.4f}" if score.spread is not None else ""),
                both(score.clips),
                both(score.frames),
                both(score.samples),
                f"{score.sample}, {score.width} wide",
            )
            for score in scores
        ),
    )


def _tabulate_means(means: Sequence[ClipMean]) -> str:
    return _tabulate(
        ("mean", "clips", "frames", "Sync-C", "Sync-D"),
        (
            (mean.side, mean.num_clips, mean.num_frames, f"{mean.sync_c:.3f}", f"{mean.sync_d:.3f}")
            for mean in means
        ),
    )


def _tabulate_clips(scores: Sequence[ClipScore]) -> str:
    return _tabulate(
        ("side", "clip", "frames", "Sync-C", "Sync-D", "offset"),
        (
            (
                score.side,
                score.clip,
                score.num_frames,
                f"{score.sync_c:.3f}",
                f"{score.sync_d:.3f}",
                score.offset,
            )
            for score in scores
        ),
    )


def _tabulate_skips(skips: Sequence[Skip]) -> str:
    return _tabulate(
        ("side", "clip", "of", "reason"),
        ((skip.side, skip.clip, skip.of, skip.reason) for skip in skips),
    )


def _tabulate_weights(weights: Sequence[UsedFile]) -> str:
    return _tabulate(
        ("file", "bytes", "SHA-256", "public"),
        (
            (file.file, file.bytes, file.sha256, "yes" if file.is_public else "unknown")
            for file in weights
        ),
    )


def _tabulate(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return table(names, ([escape(cell) for cell in cells] for cells in rows))
