"""Face of a clip, tracked from frame to frame and cropped as SyncNet expects it.

Input: a clip and a face detector. Output: small images of the face. Lip sync and expressions share
these faces, and clips without a face are detected here.

Axes: N faces of a picture, T video frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from training.data.footage import open_video
from training.data.scores import FaceDetector, crop_faces, find_faces
from training.metrics.clips import Clip
from turbotalk_core.errors import ImageError

SAME_FACE = 0.5  # overlap (IoU) with the box before; syncnet_python, run_pipeline.py
MOST_MISSING = 25  # video frames without a face between two with it; same source
SMOOTHED = 13  # video frames of the median filter; same source


@lru_cache(maxsize=1)  # the current clip: several metrics use its faces
def cut_faces(clip: Clip, detector: FaceDetector) -> Tensor:
    """Crop the face of each frame of a clip.

    Args:
        clip: clip to decode; it is decoded twice, so that only the small crops are in memory.
        detector: face detector.

    Returns:
        Crops, [T, 3, 224, 224], RGB in [0, 1].

    Raises:
        ImageError: if the file is damaged, or no face can be tracked through it.
        CheckpointError: if the output of the detector is not boxes with scores.
    """
    video = open_video(clip.path)
    with torch.no_grad():
        faces = [find_faces([shown], detector)[0] for shown in video.play(0, clip.num_frames)]
    track_T4 = smooth_track(follow_face(faces))
    crops = [
        crop_faces([shown], [box_4[None]])
        for shown, box_4 in zip(video.play(0, clip.num_frames), track_T4, strict=True)
    ]
    return torch.cat(crops)


def follow_face(faces: Sequence[Tensor]) -> Tensor:
    """Track the face that is the largest in the first frame with a face.

    Args:
        faces: boxes of each frame, [N, 4] of left, top, right, bottom in pixels.

    Returns:
        Its box in every frame, [T, 4]; short gaps are interpolated.

    Raises:
        ImageError: if there is no face, or a gap is longer than ``MOST_MISSING`` frames.
    """
    seen: dict[int, Tensor] = {}
    for number, boxes_N4 in enumerate(faces):
        if not len(boxes_N4):
            continue
        if not seen:
            seen[number] = boxes_N4[_area(boxes_N4).argmax()]
            continue
        before_4 = seen[max(seen)]
        shares_N = _overlap(boxes_N4, before_4)
        if shares_N.max() > SAME_FACE:
            seen[number] = boxes_N4[shares_N.argmax()]
    edges = [-1, *seen, len(faces)]
    missing = max(later - sooner - 1 for sooner, later in pairwise(edges))
    if missing > MOST_MISSING or not seen:
        raise ImageError(
            f"no face can be followed through all {len(faces)} frames: for {missing} on end there "
            f"is none, and at most {MOST_MISSING} may be missed"
        )
    return _interpolate(seen, len(faces))


def smooth_track(track_T4: Tensor) -> Tensor:
    """Smooth a track: square boxes whose centre and side are medians over time.

    Args:
        track_T4: left, top, right, bottom in pixels.

    Returns:
        Square boxes in the same form.
    """
    sides_T2 = (track_T4[:, 2:] - track_T4[:, :2]).amax(1, keepdim=True) / 2
    parts_TP = torch.cat(((track_T4[:, :2] + track_T4[:, 2:]) / 2, sides_T2), 1)
    reach = SMOOTHED // 2
    first, last = (parts_TP[at].expand(reach, -1) for at in (slice(0, 1), slice(-1, None)))
    x_T, y_T, half_T = torch.cat((first, parts_TP, last)).unfold(0, SMOOTHED, 1).median(-1)[0].T
    return torch.stack((x_T - half_T, y_T - half_T, x_T + half_T, y_T + half_T), 1)


def _interpolate(seen: dict[int, Tensor], num_frames: int) -> Tensor:
    known = list(seen)
    boxes = []
    for number in range(num_frames):
        sooner = max((at for at in known if at <= number), default=known[0])
        later = min((at for at in known if at >= number), default=known[-1])
        share = (number - sooner) / (later - sooner) if later > sooner else 0.0
        boxes.append(torch.lerp(seen[sooner], seen[later], share))
    return torch.stack(boxes)


def _area(boxes_N4: Tensor) -> Tensor:
    return (boxes_N4[:, 2:] - boxes_N4[:, :2]).clamp_min(0).prod(1)


def _overlap(boxes_N4: Tensor, box_4: Tensor) -> Tensor:
    left_top_N2 = torch.maximum(boxes_N4[:, :2], box_4[:2])
    right_bottom_N2 = torch.minimum(boxes_N4[:, 2:], box_4[2:])
    shared_N = _area(torch.cat((left_top_N2, right_bottom_N2), 1))
    return shared_N / (_area(boxes_N4) + _area(box_4[None]) - shared_N).clamp_min(1e-9)
