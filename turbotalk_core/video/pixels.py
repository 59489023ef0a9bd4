"""Conversion of decoded frames to RGB pixels as a player shows them.

The file states how: colour matrix, range and transfer, transparency, shape of a pixel, rotation and
mirroring. Separate from the reader, which finds the frames.

Axes: H height, W width, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..hdr import TRANSFERS, tone_map

# Matrix coefficients, ISO/IEC 23091-2 table 4; FFmpeg's names for them
BT709, BT601 = 1, 5
_UNKNOWN = (2, 3)
_BT601_TOO = 6  # the same matrix under its American name, which PyAV does not accept
_FULL_RANGE = 2
_LIMITED_RANGE = 1
_HD = (1280, 577)  # width or height from which players take an unknown matrix for BT.709


@dataclass(frozen=True, slots=True, kw_only=True)
class Appearance:
    """Properties of a stream that determine how its frames are shown.

    Attributes:
        aspect: width of a pixel divided by its height.
        transfer: transfer characteristic, ISO/IEC 23091-2 table 3.
        matrix: matrix coefficients of frames that state none.
    """

    aspect: Fraction
    transfer: int
    matrix: int

    def to_pixels(self, frame: av.VideoFrame) -> Tensor:
        """Convert a frame to pixels as a player shows them.

        Args:
            frame: decoded frame.

        Returns:
            [H, W, 3], float32 in [0, 1]. Transparency is blended onto white.
        """
        is_hdr, has_alpha = self.transfer in TRANSFERS, _has_alpha(frame.format)
        # Planes of floats, as packed 16-bit formats come out wrong from FFmpeg 8.0.
        planes, packed = ("gbrapf32le", "rgba") if has_alpha else ("gbrpf32le", "rgb24")
        values = frame.to_ndarray(
            format=planes if is_hdr else packed, **_describe_colors(frame, self.matrix)
        )
        pixels_HWC = torch.from_numpy(values).float()
        if is_hdr:
            rgb, alpha = tone_map(pixels_HWC[..., :3], self.transfer), pixels_HWC[..., 3:]
        else:
            pixels_HWC /= 255
            rgb, alpha = pixels_HWC[..., :3], pixels_HWC[..., 3:]
        if has_alpha:
            rgb = rgb * alpha + (1 - alpha)
        return _orient(_stretch(rgb, self.aspect), frame)


def guess_matrix(width: int, height: int) -> int:
    """Return the matrix by which players show a video that states none.

    Args:
        width: width in pixels.
        height: height in pixels.

    Returns:
        BT.709 for high definition, BT.601 for less.
    """
    return BT709 if width >= _HD[0] or height >= _HD[1] else BT601


def _describe_colors(frame: av.VideoFrame, matrix: int) -> dict[str, Any]:
    """Return the arguments by which PyAV converts luma and chroma of a frame to RGB.

    PyAV before 17 converts every file as BT.601 of limited range, unless the stated matrix differs
    from that of the result. RGB has none, so any may be stated for it.
    """
    layout = frame.format
    if layout.is_rgb or layout.has_palette or len(layout.components) < 3:
        return {}
    known = matrix if frame.colorspace in _UNKNOWN else frame.colorspace
    is_full = frame.color_range == _FULL_RANGE or layout.name.startswith("yuvj")
    return {
        "src_colorspace": BT601 if known == _BT601_TOO else known,
        "dst_colorspace": BT601,
        "src_color_range": _FULL_RANGE if is_full else _LIMITED_RANGE,
    }


def _has_alpha(layout: av.VideoFormat) -> bool:
    return layout.has_palette or any(component.is_alpha for component in layout.components)


def _stretch(pixels_HWC: Tensor, aspect: Fraction) -> Tensor:
    """Resize to square pixels; the side that is too short grows, so that no detail is lost."""
    if aspect == 1:
        return pixels_HWC
    height, width = pixels_HWC.shape[:2]
    size = (round(height / min(aspect, 1)), round(width * max(aspect, 1)))
    pixels_BCHW = pixels_HWC.permute(2, 0, 1).unsqueeze(0)
    stretched_BCHW = F.interpolate(pixels_BCHW, size, mode="bilinear", antialias=True)
    return stretched_BCHW[0].permute(1, 2, 0).clamp(0, 1)


def _orient(pixels_HWC: Tensor, frame: av.VideoFrame) -> Tensor:
    """Mirror and turn, to the nearest quarter, as the display matrix of the frame states.

    Its entries (a, b) and (c, d) are the directions, in x and y downwards, of the rows and the
    columns of the stored picture. Source: ISO/IEC 14496-12, 8.3.2.
    """
    stated = frame.side_data.get("DISPLAYMATRIX")
    if stated is None:
        return pixels_HWC
    a, b, _, c, d = np.frombuffer(stated, np.int32)[:5].tolist()
    if a * d < b * c:  # mirrored: mirror the rows, then turn by what is left
        pixels_HWC, a, b = pixels_HWC.flip(1), -a, -b
    return pixels_HWC.rot90(-round(math.atan2(b, a) / (math.pi / 2)))
