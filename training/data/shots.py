"""What is prepared: shots, each some pictures and the voices heard meanwhile.

In: judged pieces of videos, or seeds of the synthetic set. Out: shots, made when they are asked
for. Separate because the encoders should not know where pictures come from.

Axes: C channels, T video frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from training.data.avatars import draw_avatar
from training.data.footage import cut_sound, read_sound, show
from training.data.motion import draw_motion
from training.data.mouth import mouth_curve
from training.data.pairs import TURNS, draw_pair
from training.data.portrait import render
from training.data.seeds import open_stream
from training.data.speech import draw_speech
from training.data.stage import SKIPPED, Record, draw_number
from turbotalk_core.errors import GeometryError, RequestError
from turbotalk_core.geometry import FPS, SAMPLE_RATE, count_samples
from turbotalk_core.types import Waveform

SECONDS = 8.0  # of an avatar's utterance: 200 frames, room for a later clip anywhere in it
SILENT_SHARE = 0.04  # of avatars: they say nothing, and keep the mouth shut
FALLS_SILENT_SHARE = 0.25  # of avatars: a voice that ends before the shot does
EARLIEST_LATER = 10  # video frames; a later clip of an avatar begins no earlier


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """Somebody speaks, or some do, in one shot.

    Attributes:
        show: gives the pictures from one on to another, [3, T, H, W] in [-1, 1].
        voices: of the speakers, from left to right, each as long as the shot.
        num_frames: of the shot.
        clip_frames: of the two clips that are encoded, 4n + 1.
        later_start: first picture of the later clip; the other one begins with the shot.
        caption: a prompt for it, if there is any.
        facts: what else its manifest line shall tell; JSON values.
    """

    show: Callable[[int, int], Tensor]
    voices: tuple[Waveform, ...]
    num_frames: int
    clip_frames: int
    later_start: int
    caption: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Where shots come from."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of all shots."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Say what decides the shots, besides their names: JSON values for the fingerprint."""
        ...

    def open(self, key: str) -> Shot:
        """Make a shot."""
        ...


class VideoSource:
    """Pieces of recorded videos, fitted to one of some sizes."""

    def __init__(
        self,
        videos: Path,
        pieces: Mapping[str, Record],
        fingerprint: str,
        sizes: Sequence[tuple[int, int]],
        clip_frames: Sequence[int],
    ) -> None:
        """Remember what to make.

        Args:
            videos: folder of the videos.
            pieces: lines of the filter.
            fingerprint: of the settings that made them.
            sizes: (height, width), pixels; each piece takes the one nearest to its shape.
            clip_frames: lengths of clips; each piece takes the longest that fits into it.
        """
        self._videos = videos
        self._pieces = {key: piece for key, piece in pieces.items() if SKIPPED not in piece}
        self._fingerprint = fingerprint
        self._sizes = sorted(sizes)
        self._clip_frames = sorted(clip_frames)

    @property
    def keys(self) -> Sequence[str]:
        """Names of all pieces."""
        return list(self._pieces)

    def describe(self) -> Mapping[str, Any]:
        """Say what decides the shots."""
        return {
            "source": "videos",
            "pieces": self._fingerprint,
            "sizes": [list(size) for size in self._sizes],
            "clip_frames": self._clip_frames,
        }

    def open(self, key: str) -> Shot:
        """Make a shot of a piece.

        Args:
            key: of the piece.

        Returns:
            The shot; pictures are decoded when they are asked for.

        Raises:
            GeometryError: the piece is shorter than every clip.
            AudioError: the sound cannot be read.
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
            # Anywhere but at the beginning, which the other clip shows.
            later_start=1 + draw_number(key, "later") % room if room else 0,
            caption=piece["caption"],
            facts={fact: piece[fact] for fact in ("video", "start", "stop", "tier", "scores")},
        )


class AvatarSource:
    """Drawn avatars, alone or in pairs, that speak for a while."""

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
        """Remember what to draw.

        Args:
            avatars: seeds 0 to this, exclusive.
            pairs: seeds 0 to this, exclusive; their clips are long.
            split: ``train`` or ``heldout``.
            short_frames: of most avatars' clips.
            long_frames: of the other clips.
            long_every: one avatar in this many has long clips; 0: none.
        """
        self._counts = {"avatar": avatars, "pair": pairs}
        self._split = split
        self._short, self._long, self._long_every = short_frames, long_frames, long_every

    @property
    def keys(self) -> Sequence[str]:
        """Names of all shots: kind and seed."""
        return [
            f"{kind}_{seed:06d}" for kind, count in self._counts.items() for seed in range(count)
        ]

    def describe(self) -> Mapping[str, Any]:
        """Say what decides the shots; there may be more of them later."""
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
            MissingToolError: espeak-ng is not installed.
        """
        kind, number = key.split("_")
        seed = int(number)
        if kind == "pair":
            return self._draw_pair(seed)
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

    def _draw_pair(self, seed: int) -> Shot:
        total = round(SECONDS * FPS)
        stream = open_stream(self._split, seed, "teacher pair")
        pair = draw_pair(self._split, seed, total, TURNS[stream.integers(len(TURNS))])
        return Shot(
            show=lambda first, last: pair.frames_CTHW[:, first:last],
            voices=tuple(_to_waveform(clip.waveform_S) for clip in pair.clips),
            num_frames=total,
            clip_frames=self._long,
            later_start=int(stream.integers(EARLIEST_LATER, total - self._long + 1)),
        )


def choose_size(height: int, width: int, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Choose the size whose shape is nearest to a picture's, so that the least is cut off.

    Args:
        height: of the picture.
        width: of the picture.
        sizes: (height, width); at least one.

    Returns:
        One of the sizes.

    Raises:
        RequestError: no sizes.
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
