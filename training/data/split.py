"""Splitting of videos into pieces: spans without a cut and within limits of length.

    python -m training.data split --videos FOLDER --set SET

Input: mp4, mkv and webm files, with captions beside them or in a table. Output: ``SET/scenes``, a
line per video that lists its pieces. No video is re-encoded: a piece is a file and a range of its
frames, 25 per second.

A cut is a frame that differs from the one before by more than ``CUT_DIFFERENCE``, and by more than
``CUT_RATIO`` times the median difference of its neighbours. The second condition prevents a moving
camera or a flickering lamp from being detected as cuts. PySceneDetect has the same method with more
kinds of measures, but it needs OpenCV, and several OpenCV packages overwrite each other in the
environments of ComfyUI users. Hard cuts are enough here, because fades are rare in footage of
people who talk.

Axes: T video frames, H height, W width, C channels.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from training.data.footage import find_videos, open_video, read_sound
from training.data.resumable_stage import (
    ItemLog,
    Record,
    Summary,
    Work,
    attempt,
    list_missing,
    open_stage,
    summarize,
)
from turbotalk_core.errors import GeometryError, RequestError

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
    names = find_videos(videos) if videos.is_dir() else []
    if not names:
        raise RequestError(
            f"there is no mp4, mkv or webm file in {videos}; give the folder that holds the videos"
        )
    texts = {} if captions is None else read_captions(captions)
    unknown = sorted(set(texts) - set(names))
    if unknown:
        raise RequestError(
            f"{captions} has captions for {len(unknown)} files that are not in {videos} (first: "
            f"{unknown[0]}); name files by their path inside that folder"
        )
    folder = out / SCENES
    # The folder of the videos may change between runs; these settings may not.
    open_stage(folder, {**asdict(settings), "cuts": [CUT_DIFFERENCE, CUT_RATIO]}, work)
    item_log = ItemLog(folder, work)
    missing = list_missing(names, item_log.before, work)
    num_made = 0
    for name in tqdm(missing, desc="videos", mininterval=10, disable=None):
        record = attempt(name, lambda name=name: _split(videos, name, settings, texts))
        item_log.append([record])
        num_made += "pieces" in record
    return summarize(folder, num_made)


def _split(videos: Path, name: str, settings: SplitSettings, captions: Mapping[str, str]) -> Record:
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
        "caption": captions.get(name, _read_caption_beside(path)),
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


def read_captions(path: Path) -> dict[str, str]:
    """Read a table of captions.

    Args:
        path: CSV with a header line, or JSONL; columns ``file`` and ``caption``.

    Returns:
        Captions by file.

    Raises:
        RequestError: if the table cannot be read, or lacks a column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows: list[dict[str, Any]] = (
                list(csv.DictReader(file))
                if path.suffix.lower() == ".csv"
                else [json.loads(line) for line in file if line.strip()]
            )
        return {Path(row["file"]).as_posix(): str(row["caption"]).strip() for row in rows}
    except (OSError, ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
        raise RequestError(
            f"cannot read captions from {path} ({type(error).__name__}: {error}); give a CSV with "
            "a head line or a JSONL, each with the columns file and caption"
        ) from error


def _read_caption_beside(path: Path) -> str | None:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return None
    try:
        return beside.read_text(encoding="utf-8").strip() or None
    except ValueError as error:
        raise RequestError(f"{beside} is no UTF-8 text; save it as that") from error
