"""Pieces of recorded videos: frames at 25 per second, fitted to a size, and their sound.

Input: a file, or a line that names a piece of one. Output: frames and sound in sync. Filtering and
encoding both use these functions.

Axes: C channels, T video frames, H height, W width, S audio samples.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from turbotalk_core.audio.io import open_sound, to_waveform
from turbotalk_core.conditioning.reference import prepare_reference
from turbotalk_core.geometry import count_samples
from turbotalk_core.types import Waveform
from turbotalk_core.video.reader import VideoFrames

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm")
VIDEOS_KEPT = 2  # videos whose decoded sound is cached: pieces of one video follow each other


def find_videos(folder: Path) -> list[str]:
    """List the videos of a folder and its sub-folders.

    Args:
        folder: folder to search.

    Returns:
        Paths relative to it, with forward slashes, sorted.
    """
    files = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    return sorted(path.relative_to(folder).as_posix() for path in files if path.is_file())


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
