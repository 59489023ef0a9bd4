"""Quality scores of a piece of footage, and the tier that follows from them.

Input: sound, frames, and networks whose weights the user supplies. Output: scores by name, and a
tier with its reasons. The functions are arithmetic; apart from loading a network they read no
files.

Axes: C channels, T video frames, H height, W width, S audio samples, N windows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from turbotalk_core.audio.loudness import TARGET_LUFS, measure_loudness
from turbotalk_core.errors import CheckpointError
from turbotalk_core.geometry import SAMPLE_RATE, count_samples

SILENCE_DB = -50.0  # mean power of a silent video frame's sound, in a piece at -23 LUFS
FACE_EVERY = 5  # video frames; the face detector runs on one in so many
FACE_SCORE = 0.5  # boxes with a lower score are not faces
MOST_SHIFT = 15  # video frames; SyncNet's evaluation
FACE_CROP = 224  # pixels; SyncNet
CROP_MARGIN = 0.4  # SyncNet: margin around the face, as a part of half its side
CROP_GREY = 110 / 255  # SyncNet: value outside the picture


class FaceDetector(Protocol):
    """Face detector; a ``torch.export`` program of this form can be supplied to the filter."""

    def __call__(self, picture_CHW: Tensor) -> Tensor:
        """Detect faces in a picture, RGB in [0, 1]: [N, 5] of left, top, right, bottom, score."""
        ...


class SyncNetwork(Protocol):
    """Network that embeds lips and voice close to each other if they match, such as SyncNet."""

    def __call__(self, faces_TCHW: Tensor, waveform_S: Tensor) -> tuple[Tensor, Tensor]:
        """Embed faces [T, 3, 224, 224], RGB in [0, 1], and 16 kHz sound: twice [N, D]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Limits of a score.

    Attributes:
        good: limit of tier 0.
        fair: limit of tier 1; scores beyond it are in tier 2.
        is_most: whether the limits are upper bounds, not lower bounds.
    """

    good: float
    fair: float
    is_most: bool = False

    def place(self, score: float) -> int:
        """Return the tier of a score: 0, 1 or 2."""
        sign = -1 if self.is_most else 1
        return sum(sign * score < sign * bound for bound in (self.good, self.fair))


LIMITS: Mapping[str, Limit] = {
    "side": Limit(good=480, fair=256),  # pixels of the picture's shorter side
    "loudness": Limit(good=-35, fair=-50),  # LUFS
    "silence_share": Limit(good=0.4, fair=0.8, is_most=True),  # of the frames
    "face_share": Limit(good=0.9, fair=0.5),  # of the frames searched, those with exactly one face
    "face_side": Limit(good=256, fair=128),  # pixels, median; 256: LatentSync
    "sync_confidence": Limit(good=3, fair=1.5),  # 3: LatentSync
    "sync_offset": Limit(good=1, fair=3, is_most=True),  # video frames, absolute value
}
"""Limits of the scores; scores that were not measured, for lack of a network, do not count."""


def load_program(path: Path) -> Any:
    """Load a face detector or a lip-sync network that the user supplies.

    Args:
        path: a ``torch.export`` program, .pt2, in the form of ``FaceDetector`` or ``SyncNetwork``.

    Returns:
        A callable.

    Raises:
        CheckpointError: if there is no such file, or it is not such a program.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no judge at {path}; its weights are not ours to ship: export a detector or "
            "a SyncNet with torch.export.save (docs/training.md says in which form), or leave the "
            "option out, and the score is left out, too"
        )
    try:
        return torch.export.load(path).module()
    except Exception as error:  # torch raises a different kind for each way to be no program
        raise CheckpointError(
            f"{path} is not a program of torch.export ({type(error).__name__}); write it with "
            "torch.export.save"
        ) from error


def score_sound(waveform_S: Tensor) -> dict[str, float]:
    """Measure the loudness of a voice, and the fraction of silence.

    Args:
        waveform_S: 16 kHz mono.

    Returns:
        ``loudness`` in LUFS, if the sound is loud enough to measure; ``silence_share``, the
        fraction of silent video frames.
    """
    lufs = measure_loudness(waveform_S)
    if lufs is None:
        return {"silence_share": 1.0}
    samples_per_frame = count_samples(1, SAMPLE_RATE)
    num_frames = len(waveform_S) // samples_per_frame
    frames_TS = waveform_S[: num_frames * samples_per_frame].view(num_frames, samples_per_frame)
    power_T = 10 * frames_TS.square().mean(1).clamp_min(1e-12).log10() + TARGET_LUFS - lufs
    share = (power_T < SILENCE_DB).float().mean().item()
    return {"loudness": round(lufs, 2), "silence_share": round(share, 4)}


def find_faces(pictures: Sequence[Tensor], detector: FaceDetector) -> list[Tensor]:
    """Detect the faces of pictures.

    Args:
        pictures: each [H, W, 3] in [0, 1].
        detector: face detector.

    Returns:
        For each picture the boxes of faces, [N, 4] of left, top, right, bottom.

    Raises:
        CheckpointError: if the output of the detector is not boxes with scores.
    """
    faces = []
    for picture_HWC in pictures:
        boxes = detector(picture_HWC.permute(2, 0, 1))
        if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 5:
            raise CheckpointError(
                "the face detector does not return a tensor [faces, 5] of left, top, right, "
                "bottom and score; export one that does"
            )
        faces.append(boxes[boxes[:, 4] >= FACE_SCORE, :4])
    return faces


def score_faces(faces: Sequence[Tensor]) -> dict[str, float]:
    """Measure how often there is exactly one face, and how large it is.

    Args:
        faces: boxes of each picture, [N, 4].

    Returns:
        ``face_share``, the fraction of pictures with exactly one face; and if there are any,
        ``face_side``, the median over these of the mean of width and height, in pixels.
    """
    lone = [boxes[0] for boxes in faces if len(boxes) == 1]
    share = {"face_share": round(len(lone) / max(1, len(faces)), 4)}
    if not lone:
        return share
    boxes_N4 = torch.stack(lone)
    sides_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).mean(1)
    return {**share, "face_side": round(sides_N.median().item(), 1)}


def crop_faces(pictures: Sequence[Tensor], faces: Sequence[Tensor]) -> Tensor:
    """Crop the face out of all pictures of a piece, at its median place, as SyncNet expects it.

    Args:
        pictures: each [H, W, 3] in [0, 1].
        faces: boxes of some pictures; at least one picture has exactly one face.

    Returns:
        Crops, [T, 3, 224, 224] in [0, 1].

    Source: Chung and Zisserman, syncnet_python, run_pipeline.py, crop_video.
    """
    lone_N4 = torch.stack([boxes[0] for boxes in faces if len(boxes) == 1])
    left, top, right, bottom = lone_N4.median(0).values.tolist()
    half = max(right - left, bottom - top) / 2
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    side = max(1, round(2 * half * (1 + CROP_MARGIN)))
    x, y = round(middle_x - half * (1 + CROP_MARGIN)), round(middle_y - half)
    crops = []
    for picture_HWC in pictures:
        height, width = picture_HWC.shape[:2]
        edges = (-x, x + side - width, -y, y + side - height)  # negative values crop
        crop = F.pad(picture_HWC.permute(2, 0, 1), edges, value=CROP_GREY)[None]
        crops.append(F.interpolate(crop, (FACE_CROP, FACE_CROP), mode="bilinear", antialias=True))
    return torch.cat(crops)


def score_sync(video_ND: Tensor, audio_ND: Tensor) -> dict[str, float]:
    """Measure how well lips match a voice, and their offset in time.

    Args:
        video_ND: embeddings of the lips, one per window.
        audio_ND: embeddings of the voice at the same times.

    Returns:
        ``sync_distance``: the least mean distance over all shifts; ``sync_confidence``: the median
        over all shifts minus the least; ``sync_offset``: the shift in video frames, positive if the
        voice is late. Empty if there are too few windows for all shifts.

    Raises:
        CheckpointError: if the embeddings differ in shape.

    Source: Chung and Zisserman, Out of time (2016); Sync-C and Sync-D of later work.
    """
    if video_ND.shape != audio_ND.shape or video_ND.ndim != 2:
        raise CheckpointError(
            f"the sync judge returned embeddings of shapes {tuple(video_ND.shape)} and "
            f"{tuple(audio_ND.shape)}; export one that returns two equal shapes [windows, width]"
        )
    num_windows = len(video_ND)
    if num_windows <= 2 * MOST_SHIFT:
        return {}
    middle = slice(MOST_SHIFT, num_windows - MOST_SHIFT)  # windows with a partner at every shift
    distances = torch.stack(
        [
            (video_ND[middle] - audio_ND[MOST_SHIFT + shift :][: num_windows - 2 * MOST_SHIFT])
            .norm(dim=1)
            .mean()
            for shift in range(-MOST_SHIFT, MOST_SHIFT + 1)
        ]
    )
    least = distances.min()
    return {
        "sync_distance": round(least.item(), 4),
        "sync_confidence": round((distances.median() - least).item(), 4),
        "sync_offset": int(distances.argmin()) - MOST_SHIFT,
    }


def rank(
    scores: Mapping[str, float], limits: Mapping[str, Limit] = LIMITS
) -> tuple[int, list[str]]:
    """Return the tier of a piece: that of its worst score.

    Args:
        scores: values by name; those without a limit do not count.
        limits: limits by name; scores that were not measured do not count.

    Returns:
        0 (good), 1 (fair) or 2 (poor), and the scores that prevent tier 0.
    """
    tiers = {
        name: limit.place(abs(scores[name]) if name == "sync_offset" else scores[name])
        for name, limit in limits.items()
        if name in scores
    }
    return max(tiers.values(), default=0), [name for name, tier in tiers.items() if tier > 0]
