"""Colour transfer from a reference image to frames, in CIE Lab.

Colours drift from chunk to chunk; correcting them is optional. In CIE Lab lightness and colour are
separate channels, and each is matched by itself.

Axes: B batch, C channels, T video frames, H height, W width.
Source: Reinhard et al., Color Transfer between Images (2001), here in CIE Lab as InfiniteTalk does,
wan/utils/multitalk_utils.py, match_and_blend_colors.
"""

from __future__ import annotations

import torch
from torch import Tensor

# IEC 61966-2-1 (sRGB): linear red, green and blue to CIE XYZ.
RGB_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
WHITE_XYZ = (0.95047, 1.0, 1.08883)  # CIE standard illuminant D65, 2 degree observer
# CIE 15: the line that replaces the cube root near black, where its slope would be infinite.
LINE_END, LINE_SLOPE, LINE_OFFSET = 0.008856, 7.787, 16 / 116


def match_color(frames_BCTHW: Tensor, reference_BCHW: Tensor, strength: float) -> Tensor:
    """Match mean and standard deviation of each frame's colours to a picture's, per Lab channel.

    Args:
        frames_BCTHW: RGB frames in [-1, 1].
        reference_BCHW: one RGB picture of any size in [-1, 1].
        strength: strength of the correction: 0 returns the frames unchanged, 1 is full.

    Returns:
        [B, C, T, H, W] in [-1, 1].
    """
    if strength == 0:
        return frames_BCTHW
    reference_BCTHW = reference_BCHW.unsqueeze(2).to(frames_BCTHW)
    wanted_mean, wanted_spread = _measure(_to_lab(reference_BCTHW))
    corrected = torch.empty_like(frames_BCTHW)
    for t in range(frames_BCTHW.shape[2]):  # frame by frame: Lab takes several times its memory
        frame = frames_BCTHW[:, :, t : t + 1]
        lab = _to_lab(frame)
        mean, spread = _measure(lab)
        gain = torch.where(spread > 0, wanted_spread / spread, 0)
        matched = _from_lab((lab - mean) * gain + wanted_mean)
        corrected[:, :, t : t + 1] = (1 - strength) * frame + strength * matched
    return corrected.clamp(-1, 1)


def rgb_to_lab(rgb_BCTHW: Tensor) -> Tensor:
    """Convert sRGB to CIE Lab.

    Args:
        rgb_BCTHW: sRGB in [0, 1].

    Returns:
        The same shape: L in [0, 100], a and b.
    """
    linear = torch.where(
        rgb_BCTHW > 0.04045, ((rgb_BCTHW + 0.055) / 1.055).clamp_min(0) ** 2.4, rgb_BCTHW / 12.92
    )
    white = _constant(WHITE_XYZ, rgb_BCTHW).view(3, 1, 1, 1)
    xyz = torch.einsum("xc,bcthw->bxthw", _constant(RGB_TO_XYZ, rgb_BCTHW), linear) / white
    x, y, z = torch.where(
        xyz > LINE_END, xyz.clamp_min(0) ** (1 / 3), LINE_SLOPE * xyz + LINE_OFFSET
    ).unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), 1)


def lab_to_rgb(lab_BCTHW: Tensor) -> Tensor:
    """Convert CIE Lab to sRGB.

    Args:
        lab_BCTHW: channels L, a and b.

    Returns:
        The same shape, sRGB in [0, 1]; colours outside sRGB are clipped per channel.
    """
    lightness, a, b = lab_BCTHW.unbind(1)
    y = (lightness + 16) / 116
    roots = torch.stack((a / 500 + y, y, (y - b / 200).clamp_min(0)), 1)
    # The cube root of LINE_END, where the two branches meet, to the precision of the constants.
    xyz = torch.where(roots > 0.2068966, roots**3, (roots - LINE_OFFSET) / LINE_SLOPE)
    xyz = xyz * _constant(WHITE_XYZ, lab_BCTHW).view(3, 1, 1, 1)
    to_rgb = _constant(RGB_TO_XYZ, lab_BCTHW, torch.float64).inverse().to(lab_BCTHW)
    linear = torch.einsum("cx,bxthw->bcthw", to_rgb, xyz)
    encoded = 1.055 * linear.clamp_min(0) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, encoded, 12.92 * linear).clamp(0, 1)


def _to_lab(frames_BCTHW: Tensor) -> Tensor:
    return rgb_to_lab(((frames_BCTHW + 1) / 2).clamp(0, 1))


def _from_lab(lab_BCTHW: Tensor) -> Tensor:
    return lab_to_rgb(lab_BCTHW) * 2 - 1


def _measure(lab_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    mean = lab_BCTHW.mean((3, 4), keepdim=True)
    spread = lab_BCTHW.std((3, 4), correction=0, keepdim=True)
    # By rounding, a uniform picture has a tiny spread; dividing by it would amplify noise.
    return mean, torch.where(spread > 1e-4, spread, 0)


def _constant(values: object, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)
