"""Pieces of recorded videos: frames at 25 per second, fitted to a size, and their sound.

Input: a file, or a line that names a piece of one. Output: frames and sound in sync. Filtering and
encoding both use these functions.

Axes: C channels, T video frames, H height, W width, S audio samples.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from turbotalk_core.audio.io import open_sound, to_waveform
from turbotalk_core.conditioning.reference import prepare_reference
from turbotalk_core.geometry import count_samples
from turbotalk_core.safe_io.paths import is_file
from turbotalk_core.types import Waveform
from turbotalk_core.video.reader import VideoFrames

# Of the containers that the reader opens (safe_io/media.py).
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".mts",
    ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".ogv",
)  # fmt: skip
VIDEOS_KEPT = 2  # videos whose decoded sound is cached: pieces of one video follow each other
_CAPTIONS = ".txt"  # texts beside videos are read with these


def find_videos(folder: Path) -> list[str]:
    """List the videos of a folder and its sub-folders.

    Args:
        folder: folder to search.

    Returns:
        Paths relative to it, with forward slashes, sorted. A name that is not UTF-8 has Python's
        surrogates in the place of its bytes.
    """
    return search(folder)[0]


def search(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """List the videos of a folder and its sub-folders, and everything else.

    Args:
        folder: folder to search. Links to files are followed, links to folders are not: they may
            lead in circles.

    Returns:
        The videos, as ``find_videos`` returns them; and by reason the paths that are none, sorted,
        without the texts beside the videos.
    """
    videos: list[str] = []
    others: dict[str, list[str]] = {}

    def leave(path: Path, reason: str) -> None:
        others.setdefault(reason, []).append(path.relative_to(folder).as_posix())

    def on_error(error: OSError) -> None:
        leave(Path(error.filename), f"folders that cannot be read ({error.strerror})")

    for parent, folders, files in os.walk(folder, onerror=on_error):
        for name in folders:
            if Path(parent, name).is_symlink():
                leave(Path(parent, name), "links to folders")
        for path in (Path(parent, name) for name in files):
            is_video = path.suffix.lower() in VIDEO_SUFFIXES
            if is_video and is_file(path):
                videos.append(path.relative_to(folder).as_posix())
            elif path.is_symlink() and not path.exists():
                leave(path, "links to nothing")
            elif not is_file(path):
                leave(path, "pipes or devices")
            elif path.suffix.lower() != _CAPTIONS:
                leave(path, f"{path.suffix.lower() or 'no suffix'}, which is not read as a video")
    return sorted(videos), {reason: sorted(paths) for reason, paths in sorted(others.items())}


@lru_cache(maxsize=VIDEOS_KEPT)
def open_video(path: Path) -> VideoFrames:
    """Read the frame times of a video.

    Args:
        path: file of the video.

    Returns:
        Its frames, 25 per second.

    Raises:
        ImageError: if the file is missing or damaged, or has no frames.
    """
    return VideoFrames(path)


@lru_cache(maxsize=VIDEOS_KEPT)
def read_sound(path: Path) -> Waveform:
    """Read the sound of a video, from its first frame on.

    In many files the sound begins a little before or after the first frame. The timestamps of the
    file are therefore used to align lips and voice.

    Args:
        path: file of the video.

    Returns:
        The sound; its first sample is at the time of frame 0.

    Raises:
        AudioError: if the file has no sound or is damaged.
        ImageError: if it has no frames.
    """
    sound = open_sound(path)
    waveform = to_waveform(sound)
    lead_seconds = sound.first_second - open_video(path).first_second
    num_samples = round(lead_seconds * sound.sample_rate) - sound.num_silent
    samples_CS = F.pad(waveform.samples_CS, (max(0, num_samples), 0))[:, max(0, -num_samples) :]
    return Waveform(samples_CS=samples_CS, sample_rate=waveform.sample_rate)


def cut_sound(waveform: Waveform, start: int, stop: int) -> Waveform:
    """Cut the sound of a range of frames out of a video's sound.

    Args:
        waveform: sound of the whole video.
        start: first frame.
        stop: one past the last frame.

    Returns:
        Sound exactly as long as the frames, padded with silence after the end of the video's sound.
    """
    first, last = (count_samples(frame, waveform.sample_rate) for frame in (start, stop))
    samples_CS = waveform.samples_CS[:, first:last]
    samples_CS = F.pad(samples_CS, (0, last - first - samples_CS.shape[1]))
    return Waveform(samples_CS=samples_CS, sample_rate=waveform.sample_rate)


def show(path: Path, start: int, stop: int, height: int, width: int) -> Tensor:
    """Decode frames and fit them to a size, as a portrait is fitted.

    Args:
        path: file of the video.
        start: first frame.
        stop: one past the last frame.
        height: target height in pixels.
        width: target width in pixels.

    Returns:
        Frames, [3, T, height, width] in [-1, 1].

    Raises:
        ImageError: if the file is damaged, or ends earlier.
    """
    pictures = open_video(path).play(start, stop)
    fitted = [prepare_reference(picture_HWC, height, width)[0] for picture_HWC in pictures]
    return torch.stack(fitted, 1)
