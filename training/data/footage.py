"""Pieces of recorded videos: their pictures at 25 per second, fitted, and the sound beside them.

In: a file, or a line that names a piece of one. Out: pictures and sound that belong together.
Separate because both filtering and encoding look at the same pieces.

Axes: C channels, T video frames, H height, W width, S audio samples.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from turbotalk_core.audio.io import read_audio, read_first_second
from turbotalk_core.geometry import count_samples
from turbotalk_core.image import prepare_reference
from turbotalk_core.types import Waveform
from turbotalk_core.video.source import VideoFrames

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm")
VIDEOS_KEPT = 2  # whose sound is in memory, decoded: the pieces of a video follow each other


def find_videos(folder: Path) -> list[str]:
    """List the videos of a folder and its sub-folders.

    Args:
        folder: to look through.

    Returns:
        Paths relative to it, with forward slashes, sorted.
    """
    files = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    return sorted(path.relative_to(folder).as_posix() for path in files if path.is_file())


@lru_cache(maxsize=VIDEOS_KEPT)
def open_video(path: Path) -> VideoFrames:
    """Read the times of a video's pictures.

    Args:
        path: of the video.

    Returns:
        Its pictures, 25 per second.

    Raises:
        ImageError: the file is missing or damaged, or shows nothing.
    """
    return VideoFrames(path)


@lru_cache(maxsize=VIDEOS_KEPT)
def read_sound(path: Path) -> Waveform:
    """Read the sound of a video, from its first picture on.

    Many files begin their sound a little before or after the picture; lips and voice are in time
    only by the file's clock.

    Args:
        path: of the video.

    Returns:
        The sound; its first sample is heard when picture 0 is shown.

    Raises:
        AudioError: the file has no sound or is damaged.
        ImageError: it has no picture.
    """
    waveform = read_audio(path)
    lead_seconds = read_first_second(path) - open_video(path).first_second
    num_samples = round(lead_seconds * waveform.sample_rate)
    samples_CS = F.pad(waveform.samples_CS, (max(0, num_samples), 0))[:, max(0, -num_samples) :]
    return Waveform(samples_CS=samples_CS, sample_rate=waveform.sample_rate)


def cut_sound(waveform: Waveform, start: int, stop: int) -> Waveform:
    """Cut the sound of some pictures out of a video's.

    Args:
        waveform: of the whole video.
        start: first picture.
        stop: one past the last.

    Returns:
        Exactly as much sound as the pictures take; silence where the video's ends before.
    """
    first, last = (count_samples(frame, waveform.sample_rate) for frame in (start, stop))
    samples_CS = waveform.samples_CS[:, first:last]
    samples_CS = F.pad(samples_CS, (0, last - first - samples_CS.shape[1]))
    return Waveform(samples_CS=samples_CS, sample_rate=waveform.sample_rate)


def show(path: Path, start: int, stop: int, height: int, width: int) -> Tensor:
    """Decode pictures and fit them to a size, as a portrait is fitted.

    Args:
        path: of the video.
        start: first picture.
        stop: one past the last.
        height: wanted, pixels.
        width: wanted, pixels.

    Returns:
        [3, T, height, width] in [-1, 1].

    Raises:
        ImageError: the file is damaged, or ends earlier.
    """
    pictures = open_video(path).play(start, stop)
    fitted = [prepare_reference(picture_HWC, height, width)[0] for picture_HWC in pictures]
    return torch.stack(fitted, 1)
