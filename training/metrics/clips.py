"""Clips of a folder, decoded a span of frames at a time; all metrics read them.

``list_clips`` returns the readable clips of a folder, and the reasons for the others.

Axes: T video frames, C channels, H height, W width, N samples, D feature width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from training.data.footage import find_videos, open_video
from turbotalk_core.errors import CheckpointError, GeometryError, RequestError, TurboTalkError

SPAN_FRAMES = 16  # a sample of FVD, Unterthiner et al., 2018; for other metrics a batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Video, or the beginning of one.

    Attributes:
        name: path in its folder, without suffix; a generated and a real clip of one name are a
            pair.
        path: the file.
        num_frames: number of frames to measure, at 25 per second.
    """

    name: str
    path: Path
    num_frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """Clip that is left out, with the reason.

    Attributes:
        side: ``generated`` or ``real``.
        clip: name of the clip.
        of: what it is left out of: ``all``, or a metric.
        reason: text for the report.
    """

    side: str
    clip: str
    of: str
    reason: str


def list_clips(folder: Path, side: str, num_frames: int | None) -> tuple[list[Clip], list[Skip]]:
    """List the clips of a folder.

    Args:
        folder: folder with videos.
        side: ``generated`` or ``real``.
        num_frames: number of frames to measure, from the beginning of each clip; shorter clips are
            left out. None measures all frames of every clip.

    Returns:
        Clips sorted by name, and those that cannot be used.

    Raises:
        RequestError: if there is no video, or two have the same name.
    """
    files = find_videos(folder) if folder.is_dir() else []
    if not files:
        raise RequestError(
            f"there is no mp4, mkv or webm file in {folder}; give the folder of the {side} clips"
        )
    names = [PurePosixPath(file).with_suffix("").as_posix() for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(
            f"{folder} has several videos called {twice[0]}; clips are paired by their names "
            "without suffix, so keep one of each"
        )
    clips, skips = [], []
    for name, file in zip(names, files, strict=True):
        try:
            clips.append(_open_clip(name, folder / file, num_frames))
        except TurboTalkError as error:
            skips.append(Skip(side=side, clip=name, of="all", reason=str(error)))
    return clips, skips


def _open_clip(name: str, path: Path, num_frames: int | None) -> Clip:
    length = len(open_video(path))
    if num_frames is not None and length < num_frames:
        raise GeometryError(f"{name} has {length} frames, and {num_frames} are to count")
    return Clip(name=name, path=path, num_frames=num_frames or length)


def iterate_spans(clip: Clip) -> Iterator[Tensor]:
    """Decode a clip.

    Args:
        clip: clip to decode.

    Yields:
        uint8 [T, 3, H, W] of ``SPAN_FRAMES`` frames; the last span may be shorter.

    Raises:
        ImageError: if the file is damaged.
    """
    span: list[Tensor] = []
    for picture_HWC in open_video(clip.path).play(0, clip.num_frames):
        span.append((picture_HWC * 255).round().to(torch.uint8).permute(2, 0, 1))
        if len(span) == SPAN_FRAMES:
            yield torch.stack(span)
            span = []
    if span:
        yield torch.stack(span)


def check_features(features: object, num_samples: int, width: int | None, what: str) -> Tensor:
    """Check the output of a metric's network.

    Args:
        features: output of the network.
        num_samples: expected number of samples.
        width: expected feature width; None for any.
        what: name of the network, for messages.

    Returns:
        The features, float32 on the CPU, [num_samples, D].

    Raises:
        CheckpointError: if the shape differs, or numbers are not finite.
    """
    expected: Sequence[object] = (num_samples, "any" if width is None else width)
    if (
        not isinstance(features, Tensor)
        or features.ndim != 2
        or features.shape[0] != num_samples
        or features.shape[1] != (width or features.shape[1])
    ):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise CheckpointError(
            f"{what} returned {got} instead of features of shape [{expected[0]}, {expected[1]}]; "
            "take the file that docs/evaluation.md names"
        )
    if not features.isfinite().all():
        raise CheckpointError(f"{what} returned numbers that are not finite; its file is damaged")
    return features.float().cpu()


class NetworkSpace(ABC):
    """Feature space of a network that is called span by span.

    Args:
        network: the network; the subclass documents its inputs and outputs.
        device: device of the network.
    """

    def __init__(self, network: Callable[..., Any], device: torch.device) -> None:
        self._network = network
        self._device = device

    @torch.no_grad()
    def __call__(self, clip: Clip) -> Tensor:
        """Compute the features of a clip.

        Args:
            clip: clip to decode.

        Returns:
            Samples [N, D], on the CPU.

        Raises:
            ImageError: if the file is damaged.
            CheckpointError: if the output of the network has the wrong form.
        """
        return torch.cat([self.embed(span_TCHW) for span_TCHW in iterate_spans(clip)])

    @abstractmethod
    def embed(self, span_TCHW: Tensor) -> Tensor:
        """Compute the features of a span.

        Args:
            span_TCHW: uint8 frames, at most ``SPAN_FRAMES``.

        Returns:
            Samples [N, D], on the CPU; none if the span is too short for a sample.
        """
