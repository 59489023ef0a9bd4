"""Splitting of videos into pieces: spans without a cut and within limits of length.

    python -m training.data split --videos FOLDER --set SET

Input: videos, with captions beside them or in a table. Output: ``SET/scenes``, a line per video
that lists its pieces. No video is re-encoded: a piece is a file and a range of its frames, 25 per
second.

A cut is a frame that differs from the one before by more than ``CUT_DIFFERENCE``, and by more than
``CUT_RATIO`` times the median difference of its neighbours. The second condition prevents a moving
camera or a flickering lamp from being detected as cuts. PySceneDetect has the same method with more
kinds of measures, but it needs OpenCV, and several OpenCV packages overwrite each other in the
environments of ComfyUI users. Hard cuts are enough here, because fades are rare in footage of
people who talk.

Axes: T video frames, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from training.data.captions import match_captions, read_caption_beside, read_captions
from training.data.footage import VIDEO_SUFFIXES, open_video, read_sound, search
from training.data.resumable_stage import (
    Record,
    Summary,
    Work,
    attempt,
    describe_left_out,
    hold_stage,
    list_missing,
    summarize,
)
from turbotalk_core.errors import GeometryError, RequestError
from turbotalk_core.safe_io.paths import is_folder

SCENES = "scenes"  # folder of this stage
CUT_DIFFERENCE = 0.08  # mean absolute difference of pixels in [0, 1]
CUT_RATIO = 3.0
CUT_NEIGHBOURS = 3  # differences on each side
THUMBNAIL = (24, 24)  # pixels: so small that motion changes little, and a cut changes much


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSettings:
    """Settings that decide the pieces.

    Attributes:
        min_frames: shortest piece, in frames at 25 per second; at least one training chunk.
        max_frames: longest piece; longer scenes are cut into equal pieces.

    Raises:
        RequestError: if the lengths are invalid.
    """

    min_frames: int = 81
    max_frames: int = 250

    def __post_init__(self) -> None:
        if not 1 <= self.min_frames <= self.max_frames:
            raise RequestError(
                f"got pieces of {self.min_frames} to {self.max_frames} frames; the shortest must "
                "have at least 1, the longest no less"
            )


def run_split(
    videos: Path, out: Path, settings: SplitSettings, work: Work, captions: Path | None = None
) -> Summary:
    """Split all videos of a folder that are not split yet.

    Args:
        videos: folder to search.
        out: folder of the set.
        settings: limits of length.
        work: this process's share of the work.
        captions: table of captions; None to use text files beside the videos, if there are any.

    Returns:
        Summary of the run.

    Raises:
        RequestError: if there are no videos, or the table of captions cannot be read or lists files
            that are not there.
    """
    names, others = search(videos)
    if not names:
        found = "; ".join(describe_left_out(others)) or "nothing"
        raise RequestError(
            f"there is no mp4, mkv or webm file in {videos}, and no other of "
            f"{', '.join(VIDEO_SUFFIXES)}; it has {found if is_folder(videos) else 'no content'}: "
            "give the folder that holds the videos"
        )
    texts = {} if captions is None else match_captions(read_captions(captions), names, captions)
    folder = out / SCENES
    # The folder of the videos may change between runs; these settings may not.
    described = {**asdict(settings), "cuts": [CUT_DIFFERENCE, CUT_RATIO]}
    num_made = 0
    with hold_stage(folder, described, work) as item_log:
        missing = list_missing(names, item_log.before, work)
        for name in tqdm(missing, desc="videos", mininterval=10, disable=None):
            record = attempt(name, lambda name=name: _split(videos, name, settings, texts))
            item_log.append([record])
            num_made += "pieces" in record
    return replace(summarize(folder, num_made), left_out=others)


def _split(
    videos: Path, name: str, settings: SplitSettings, captions: Mapping[str, str | None]
) -> Record:
    path = videos / name
    frames = open_video(path)
    read_sound(path)  # raises an error for a video without sound, which is useless here
    picture_HWC = next(frames.play(0, 1))
    scenes = find_scenes(frames.play(0, len(frames)))
    pieces = [piece for scene in scenes for piece in cut_pieces(*scene, settings)]
    if not pieces:
        longest = max(stop - start for start, stop in scenes)
        raise GeometryError(
            f"{name} has no scene of {settings.min_frames} frames, the longest has {longest}"
        )
    return {
        "height": picture_HWC.shape[0],
        "width": picture_HWC.shape[1],
        "num_frames": len(frames),
        "num_scenes": len(scenes),
        "pieces": pieces,
        "caption": captions[name] if name in captions else read_caption_beside(path),
    }


def find_scenes(pictures: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Find the spans between cuts.

    Args:
        pictures: frames, each [H, W, 3] in [0, 1]; at least one.

    Returns:
        Spans [start, stop) that cover all frames.
    """
    differences, before = [], None
    for picture_HWC in pictures:
        small = F.interpolate(picture_HWC.permute(2, 0, 1)[None], THUMBNAIL, mode="area")
        differences.append(0.0 if before is None else (small - before).abs().mean().item())
        before = small
    cuts = find_cuts(torch.tensor(differences))
    edges = [0, *cuts, len(differences)]
    return list(pairwise(edges))


def find_cuts(differences_T: Tensor) -> list[int]:
    """Find the frames at which a new scene begins.

    Args:
        differences_T: difference of each frame from the one before; the first value is 0.

    Returns:
        Frame numbers, ascending, without 0.
    """
    differences = differences_T.tolist()
    cuts = []
    for t in range(1, len(differences)):
        # The first frame has no frame before it, so its difference is left out.
        before = differences[max(1, t - CUT_NEIGHBOURS) : t]
        around = before + differences[t + 1 : t + CUT_NEIGHBOURS + 1]
        # The median is not changed by another cut nearby.
        usual = median(around) if around else 0.0
        if differences[t] > max(CUT_DIFFERENCE, CUT_RATIO * usual):
            cuts.append(t)
    return cuts


def cut_pieces(start: int, stop: int, settings: SplitSettings) -> list[tuple[int, int]]:
    """Cut a scene into equal pieces, as few as the largest length allows.

    Args:
        start: first frame of the scene.
        stop: one past its last frame.
        settings: limits of length.

    Returns:
        Spans that cover the scene; empty if the pieces would be too short.
    """
    num_frames = stop - start
    num_pieces = -(-num_frames // settings.max_frames)
    edges = [start + num_frames * i // num_pieces for i in range(num_pieces + 1)]
    pieces = list(pairwise(edges))
    return [piece for piece in pieces if piece[1] - piece[0] >= settings.min_frames]
