"""Conversion between values of the host and of the core: axis order and value range.

No other module converts them. The host: IMAGE [T, H, W, C] float in [0, 1], VIDEO, MASK
[B, H, W], AUDIO {"waveform": [B, C, S], "sample_rate": Hz}. The core: frames [B, C, T, H, W] in
[-1, 1], frames on disk uint8 [T, H, W, C], pictures [H, W, C] in [0, 1], ``Waveform``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ...turbotalk_core.audio.io import from_samples
from ...turbotalk_core.errors import ImageError, RequestError
from ...turbotalk_core.geometry import FPS
from ...turbotalk_core.safe_io.json import is_number
from ...turbotalk_core.types import Waveform
from ...turbotalk_core.video.reader import VideoFrames


def check_finite(name: str, value: float, ending: str) -> None:
    """Check that a widget's number is finite: JSON's NaN passes every bound of a widget.

    Args:
        name: of the widget.
        value: of the widget.
        ending: end of the sentence "use a finite number".

    Raises:
        RequestError: The number is not finite.
    """
    if not is_number(value):
        raise RequestError(f"got {name} {value}; use a finite number{ending}")


def waveform_from_audio(audio: dict[str, Any]) -> Waveform:
    """Convert an AUDIO to a waveform.

    Args:
        audio: one sound, any rate, channel count and sample type.

    Returns:
        The same sound.
    """
    return from_samples(audio["waveform"], int(audio["sample_rate"]))


def region_from_mask(mask_BHW: Tensor) -> Tensor:
    """Convert a MASK to a region.

    Args:
        mask_BHW: one mask, [1, H, W] or [H, W].

    Returns:
        The mask [H, W].

    Raises:
        ImageError: There are several masks.
    """
    if mask_BHW.ndim == 3 and mask_BHW.shape[0] != 1:
        raise ImageError(
            f"got {mask_BHW.shape[0]} masks; a speaker stands in one place, so pick one of them"
        )
    return mask_BHW.reshape(mask_BHW.shape[-2:])


def pictures_from_host(reference: Tensor | io.Video.Type) -> Sequence[Tensor]:
    """Convert a reference image, or a video to dub, to pictures.

    Args:
        reference: IMAGE, where several images are the frames of a video at 25 a second; or VIDEO of
            any frame rate, decoded on access.

    Returns:
        Pictures [H, W, C] in [0, 1], 25 a second.

    Raises:
        ImageError: The video has no frames or cannot be read.
    """
    if isinstance(reference, Tensor):
        return list(reference)
    source = reference.get_stream_source()
    pictures = VideoFrames(Path(source) if isinstance(source, str) else source)
    # If the host trimmed a VIDEO, its source is still the whole file.
    start, seconds = reference.get_active_trim_window()
    kept = range(len(pictures))[round(start * FPS) :]
    kept = kept[: max(1, round(seconds * FPS))] if seconds else kept
    if not kept:
        raise ImageError(
            f"nothing is left of the video, which is {len(pictures) / FPS:g} s long and trimmed to "
            f"begin at {start:g} s; trim less of it"
        )
    return _Excerpt(pictures, kept)


class _Excerpt(Sequence[Tensor]):
    """Range of a video's pictures, decoded on access."""

    def __init__(self, pictures: VideoFrames, kept: range) -> None:
        self._pictures, self._kept = pictures, kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._pictures[self._kept[index]]

    def digest(self) -> str:
        return f"{self._pictures.digest()} {self._kept}"


def image_from_frames(frames_BCTHW: Tensor) -> Tensor:
    """Convert the core's frames to an IMAGE, [T, H, W, C] in [0, 1]."""
    return ((frames_BCTHW[0].permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1)


def frames_from_image(image_THWC: Tensor) -> Tensor:
    """Convert an IMAGE to the core's frames, [1, C, T, H, W] in [-1, 1]."""
    return (image_THWC.permute(3, 0, 1, 2) * 2 - 1).unsqueeze(0)


def image_from_bytes(frames_THWC: Tensor) -> Tensor:
    """Convert uint8 frames to an IMAGE."""
    return frames_THWC.float() / 255
