"""Filtering of pieces: scores and a quality tier for each; no piece is dropped.

    python -m training.data filter --videos FOLDER --set SET

Input: ``SET/scenes``. Output: ``SET/pieces``, a line per piece. Training selects tiers, because a
piece that is poor for one purpose is fair for another. Faces and lip sync are scored only if the
user supplies the weights, which cannot be shipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from training.data.footage import cut_sound, open_video, read_sound
from training.data.resumable_stage import (
    SKIPPED,
    Record,
    Summary,
    Work,
    attempt,
    fingerprint_files,
    hold_stage,
    list_missing,
    read_records,
    read_settings,
    summarize,
)
from training.data.scores import (
    FACE_EVERY,
    LIMITS,
    FaceDetector,
    Limit,
    SyncNetwork,
    crop_faces,
    find_faces,
    load_program,
    rank,
    score_faces,
    score_sound,
    score_sync,
)
from training.data.split import SCENES
from turbotalk_core.audio.resample import to_mono_16k
from turbotalk_core.errors import RequestError
from turbotalk_core.geometry import SAMPLE_RATE

PIECES = "pieces"  # folder of this stage


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterSettings:
    """Settings of the filter.

    Attributes:
        face_detector: program of ``scores.FaceDetector``; None leaves faces unscored.
        sync_network: program of ``scores.SyncNetwork``, applied to the detected faces; None leaves
            lip sync unscored.
        limits: limits of the scores.

    Raises:
        RequestError: if there is a ``sync_network`` without a face detector.
    """

    face_detector: Path | None = None
    sync_network: Path | None = None
    limits: Mapping[str, Limit] = field(default_factory=lambda: dict(LIMITS))

    def __post_init__(self) -> None:
        if self.sync_network is not None and self.face_detector is None:
            raise RequestError(
                "got a sync judge without a face detector; it looks at faces, so give --face too"
            )


def run_filter(videos: Path, out: Path, settings: FilterSettings, work: Work) -> Summary:
    """Score all pieces that are not scored yet.

    Args:
        videos: folder that was split.
        out: folder of the set.
        settings: networks and limits.
        work: this process's share of the work.

    Returns:
        Summary of the run.

    Raises:
        RequestError: if nothing was split, or pieces were scored with other settings.
        CheckpointError: if a network cannot be loaded.
    """
    before = read_settings(out / SCENES)
    pieces = list_pieces(out)
    paths = (settings.face_detector, settings.sync_network)
    detector, sync_network = (None if path is None else load_program(path) for path in paths)
    folder = out / PIECES
    described = {
        "scenes": before["fingerprint"],
        "face_detector": _name(settings.face_detector),
        "sync_judge": _name(settings.sync_network),
        "limits": {name: asdict(limit) for name, limit in settings.limits.items()},
    }
    num_made = 0
    with hold_stage(folder, described, work) as item_log:
        missing = list_missing(pieces, item_log.before, work)
        for key in tqdm(missing, desc="pieces", mininterval=10, disable=None):
            record = attempt(
                key,
                lambda key=key: _score_piece(
                    videos, pieces[key], settings.limits, detector, sync_network
                ),
            )
            item_log.append([record])
            num_made += SKIPPED not in record
    return summarize(folder, num_made)


def list_pieces(out: Path) -> dict[str, Record]:
    """List the pieces of a set.

    Args:
        out: folder of the set.

    Returns:
        Video, start, stop, height, width and caption by key. Pieces of one video follow each other.
    """
    return {
        f"{name}#{start}-{stop}": {
            "video": name,
            "start": start,
            "stop": stop,
            **{fact: scenes[fact] for fact in ("height", "width", "caption")},
        }
        for name, scenes in read_records(out / SCENES).items()
        for start, stop in scenes.get("pieces", [])
    }


@torch.no_grad()
def _score_piece(
    videos: Path,
    piece: Record,
    limits: Mapping[str, Limit],
    detector: FaceDetector | None,
    sync_network: SyncNetwork | None,
) -> Record:
    path, start, stop = videos / piece["video"], piece["start"], piece["stop"]
    waveform_S = to_mono_16k(cut_sound(read_sound(path), start, stop))
    scores: dict[str, float] = {
        "side": min(piece["height"], piece["width"]),
        "seconds": round(len(waveform_S) / SAMPLE_RATE, 2),
        **score_sound(waveform_S),
    }
    if detector is not None:
        sampled = [
            picture
            for number, picture in enumerate(open_video(path).play(start, stop))
            if number % FACE_EVERY == 0
        ]
        faces = find_faces(sampled, detector)
        scores |= score_faces(faces)
        if sync_network is not None and "face_side" in scores:
            # Decoded a second time, so that only the small crops are in memory.
            crops = [crop_faces([picture], faces) for picture in open_video(path).play(start, stop)]
            scores |= score_sync(*sync_network(torch.cat(crops), waveform_S))
    tier, reasons = rank(scores, limits)
    return {**piece, "scores": scores, "tier": tier, "reasons": reasons}


def _name(path: Path | None) -> dict[str, object] | None:
    return None if path is None else fingerprint_files(path)
