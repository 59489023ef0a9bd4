"""The host's values to the core's and back: axis order and value range, nowhere else.

The host: IMAGE [T, H, W, C] float in [0, 1], AUDIO {"waveform": [B, C, S], "sample_rate": Hz}.
The core: frames [B, C, T, H, W] in [-1, 1], frames on disk uint8 [T, H, W, C], ``Waveform``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..turbotalk_core.audio.io import from_samples
from ..turbotalk_core.types import Waveform


def waveform_from_audio(audio: dict[str, Any]) -> Waveform:
    """Take over an AUDIO.

    Args:
        audio: one sound, any rate, channel count and sample type.

    Returns:
        The same sound.
    """
    return from_samples(audio["waveform"], int(audio["sample_rate"]))


def image_from_frames(frames_BCTHW: Tensor) -> Tensor:
    """Turn the core's frames into an IMAGE, [T, H, W, C] in [0, 1]."""
    return ((frames_BCTHW[0].permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1)


def frames_from_image(image_THWC: Tensor) -> Tensor:
    """Turn an IMAGE into the core's frames, [1, C, T, H, W] in [-1, 1]."""
    return (image_THWC.permute(3, 0, 1, 2) * 2 - 1).unsqueeze(0)


def image_from_bytes(frames_THWC: Tensor) -> Tensor:
    """Turn uint8 frames into an IMAGE."""
    return frames_THWC.float() / 255
