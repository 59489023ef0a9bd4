"""Shots to encode: frames of a span of time with the voices in it.

Input: filtered pieces of videos, or seeds of the synthetic set. Output: shots, made on request.
Through this interface the encoders are independent of the origin of the frames.

Axes: C channels, T video frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from training.avatars.avatars import draw_avatar
from training.avatars.motion import draw_motion
from training.avatars.mouth import mouth_curve
from training.avatars.pairs import TURNS, draw_two_speakers
from training.avatars.portrait import render
from training.avatars.seeds import open_stream
from training.avatars.speech import draw_speech
from training.data.footage import cut_sound, read_sound, show
from training.data.resumable_stage import SKIPPED, Record, draw_number
from turbotalk_core.errors import GeometryError, RequestError
from turbotalk_core.geometry import FPS, SAMPLE_RATE, count_samples
from turbotalk_core.types import Waveform

SECONDS = 8.0  # length of an avatar's utterance: 200 frames, enough for a later clip anywhere
SILENT_SHARE = 0.04  # fraction of avatars that are silent, with the mouth closed
FALLS_SILENT_SHARE = 0.25  # fraction of avatars whose voice ends before the shot does
EARLIEST_LATER = 10  # video frames; earliest start of an avatar's later clip
LONGEST_CLIP = 1 + 4 * ((round(SECONDS * FPS) - EARLIEST_LATER - 1) // 4)  # 4n + 1 video frames

SIZE_PRESETS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "infinitetalk-480": (
        (320, 1216),
        (384, 1024),
        (448, 896),
        (512, 768),
        (576, 704),
        (640, 640),
        (704, 576),
        (768, 512),
        (832, 448),
        (896, 448),
        (960, 384),
        (1088, 384),
        (1152, 320),
        (1216, 320),
        (1280, 320),
    ),
    "infinitetalk-720": (
        (448, 2048),
        (512, 1792),
        (576, 1600),
        (640, 1408),
        (704, 1280),
        (768, 1216),
        (832, 1088),
        (896, 1024),
        (960, 960),
        (1024, 896),
        (1088, 832),
        (1152, 768),
        (1216, 768),
        (1280, 704),
        (1344, 704),
        (1408, 640),
        (1472, 640),
        (1536, 576),
        (1664, 576),
        (1856, 512),
        (1920, 512),
    ),
}
"""Heights and widths that InfiniteTalk was trained with; at others its later frames blur."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """Frames and voices of one shot.

    Attributes:
        show: function of start and stop that returns these frames, [3, T, H, W] in [-1, 1].
        voices: voices of the speakers, from left to right, each as long as the shot.
        num_frames: frames of the shot.
        clip_frames: frames of each of the two clips to encode, 4n + 1.
        later_start: first frame of the later clip; the opening clip begins with the shot.
        caption: prompt, or None.
        facts: further values for the manifest line; JSON values.
    """

    show: Callable[[int, int], Tensor]
    voices: tuple[Waveform, ...]
    num_frames: int
    clip_frames: int
    later_start: int
    caption: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Source of shots."""

    @property
    def keys(self) -> Sequence[str]:
        """Keys of all shots."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Return the settings that decide the shots, besides their keys: JSON values."""
        ...

    def open(self, key: str) -> Shot:
        """Make a shot."""
        ...


class VideoSource:
    """Source of shots from pieces of recorded videos, fitted to one of several sizes."""

    def __init__(
        self,
        videos: Path,
        pieces: Mapping[str, Record],
        fingerprint: str,
        sizes: Sequence[tuple[int, int]],
        clip_frames: Sequence[int],
    ) -> None:
        """Store the settings of the shots.

        Args:
            videos: folder of the videos.
            pieces: lines of the filter.
            fingerprint: fingerprint of the settings that made them.
            sizes: (height, width), pixels; each piece gets the one nearest to its aspect ratio.
            clip_frames: lengths of clips; each piece gets the longest that fits into it.
        """
        self._videos = videos
        self._pieces = {key: piece for key, piece in pieces.items() if SKIPPED not in piece}
        self._fingerprint = fingerprint
        self._sizes = sorted(sizes)
        self._clip_frames = sorted(clip_frames)

    @property
    def keys(self) -> Sequence[str]:
        """Keys of all pieces."""
        return list(self._pieces)

    def describe(self) -> Mapping[str, Any]:
        """Return the settings that decide the shots."""
        return {
            "source": "videos",
            "pieces": self._fingerprint,
            "sizes": [list(size) for size in self._sizes],
            "clip_frames": self._clip_frames,
        }

    def open(self, key: str) -> Shot:
        """Make the shot of a piece.

        Args:
            key: key of the piece.

        Returns:
            The shot; frames are decoded when they are requested.

        Raises:
            GeometryError: if the piece is shorter than every clip length.
            AudioError: if the sound cannot be read.
        """
        piece = self._pieces[key]
        path, start, stop = self._videos / piece["video"], piece["start"], piece["stop"]
        num_frames = stop - start
        fitting = [frames for frames in self._clip_frames if frames <= num_frames]
        if not fitting:
            raise GeometryError(
                f"{key} has {num_frames} frames; a clip needs {self._clip_frames[0]}, so prepare "
                "shorter ones with --frames, or split into longer pieces"
            )
        height, width = choose_size(piece["height"], piece["width"], self._sizes)
        room = num_frames - fitting[-1]
        return Shot(
            show=lambda first, last: show(path, start + first, start + last, height, width),
            voices=(cut_sound(read_sound(path), start, stop),),
            num_frames=num_frames,
            clip_frames=fitting[-1],
            # Anywhere except at the beginning, where the opening clip starts.
            later_start=1 + draw_number(key, "later") % room if room else 0,
            caption=piece["caption"],
            facts={fact: piece[fact] for fact in ("video", "start", "stop", "tier", "scores")},
        )


class AvatarSource:
    """Source of shots of drawn avatars, alone or in pairs."""

    def __init__(
        self,
        avatars: int,
        pairs: int,
        *,
        split: str = "train",
        short_frames: int = 33,
        long_frames: int = 81,
        long_every: int = 3,
    ) -> None:
        """Store the settings of the shots.

        Args:
            avatars: number of single avatars; their seeds count from 0.
            pairs: number of pairs; their seeds count from 0 and their clips are long.
            split: ``train`` or ``heldout``.
            short_frames: frames of most avatars' clips.
            long_frames: frames of the other clips.
            long_every: one avatar in this many has long clips; 0 for none.

        Raises:
            RequestError: if a number is negative, or the clips are longer than an utterance.
        """
        if min(avatars, pairs, long_every) < 0 or long_frames > LONGEST_CLIP:
            raise RequestError(
                f"got {avatars} avatars, {pairs} pairs, clips of {long_frames} frames, and every "
                f"{long_every}th of them long; numbers are 0 or more, and the utterance of an "
                f"avatar has room for clips of up to {LONGEST_CLIP} frames"
            )
        self._counts = {"avatar": avatars, "pair": pairs}
        self._split = split
        self._short, self._long, self._long_every = short_frames, long_frames, long_every

    @property
    def keys(self) -> Sequence[str]:
        """Keys of all shots: kind and seed."""
        return [
            f"{kind}_{seed:06d}" for kind, count in self._counts.items() for seed in range(count)
        ]

    def describe(self) -> Mapping[str, Any]:
        """Return the settings that decide the shots, without their number, which may grow."""
        return {
            "source": "avatars",
            "split": self._split,
            "clip_frames": [self._short, self._long],
            "long_every": self._long_every,
        }

    def open(self, key: str) -> Shot:
        """Draw a shot.

        Args:
            key: kind and seed.

        Returns:
            The shot.

        Raises:
            MissingToolError: if espeak-ng is not installed.
        """
        kind, number = key.split("_")
        seed = int(number)
        if kind == "pair":
            return self._open_two_speakers(seed)
        is_short = self._long_every == 0 or seed % self._long_every
        return self._draw_avatar(seed, self._short if is_short else self._long)

    def _draw_avatar(self, seed: int, length: int) -> Shot:
        total = round(SECONDS * FPS)
        stream = open_stream(self._split, seed, "teacher")
        if stream.random() < SILENT_SHARE:
            waveform_S = torch.zeros(count_samples(total, SAMPLE_RATE))
        else:
            waveform_S = draw_speech(self._split, seed, SECONDS)
            if stream.random() < FALLS_SILENT_SHARE:
                stop = count_samples(int(stream.integers(60, total)), SAMPLE_RATE)
                waveform_S[stop:] = 0
        later_start = int(stream.integers(EARLIEST_LATER, total - length + 1))
        mouth = mouth_curve(waveform_S)
        avatar = draw_avatar(self._split, seed)
        motion = draw_motion(avatar, self._split, seed, total, mouth.opening_T)
        return Shot(
            show=lambda first, last: render(
                avatar, motion.select(first, last), mouth.select(first, last)
            ),
            voices=(_to_waveform(waveform_S),),
            num_frames=total,
            clip_frames=length,
            later_start=later_start,
        )

    def _open_two_speakers(self, seed: int) -> Shot:
        total = round(SECONDS * FPS)
        stream = open_stream(self._split, seed, "teacher pair")
        speakers = draw_two_speakers(self._split, seed, total, TURNS[stream.integers(len(TURNS))])
        return Shot(
            show=lambda first, last: speakers.frames_CTHW[:, first:last],
            voices=tuple(_to_waveform(clip.waveform_S) for clip in speakers.clips),
            num_frames=total,
            clip_frames=self._long,
            later_start=int(stream.integers(EARLIEST_LATER, total - self._long + 1)),
        )


def choose_size(height: int, width: int, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Choose the size with the aspect ratio nearest to a picture's, so that least is cropped.

    Args:
        height: height of the picture.
        width: width of the picture.
        sizes: (height, width); at least one.

    Returns:
        One of the sizes.

    Raises:
        RequestError: if there are no sizes.
    """
    allowed = list(sizes)
    if not allowed:
        raise RequestError("got no size to prepare videos at; give at least one, as in 640x640")

    def lost(size: tuple[int, int]) -> float:
        ratio = size[0] * width / (size[1] * height)
        return max(ratio, 1 / ratio)

    return min(allowed, key=lost)


def _to_waveform(waveform_S: Tensor) -> Waveform:
    return Waveform(samples_CS=waveform_S.unsqueeze(0), sample_rate=SAMPLE_RATE)
