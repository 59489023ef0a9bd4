"""The mouth read from pixels, and its comparison with the true curve.

Axes: C colour channels, T video frames, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from training.avatars.mouth import MOUTH_COLOUR
from turbotalk_core.errors import MismatchError


def estimate_aperture(frames_CTHW: Tensor) -> Tensor:
    """Measure in pixels how far the mouth is open, in any picture of this set.

    The part of a pixel that the mouth covers is proportional to the distance of its green value
    below both red and blue (see MOUTH_COLOUR). Blur distributes this amount over more pixels and
    keeps the sum, so the measured area does not depend on sharpness. Pixels far from the mouth's
    place in the clip are not counted.

    Args:
        frames_CTHW: red, green and blue in [-1, 1].

    Returns:
        Mouth area per frame in pixels; comparable up to offset and scale.

    Raises:
        MismatchError: if the frames have no four axes or not three channels.
    """
    if frames_CTHW.ndim != 4 or frames_CTHW.shape[0] != 3:
        raise MismatchError(f"frames must be [3, T, H, W], got {tuple(frames_CTHW.shape)}")
    share_THW = mouth_share(frames_CTHW)
    return (share_THW * _mouth_place(share_THW)).sum((1, 2))


def mouth_share(frames_CTHW: Tensor) -> Tensor:
    """Compute by colour which fraction of each pixel is open mouth.

    Args:
        frames_CTHW: red, green and blue in [-1, 1]; any axes may replace T, H and W.

    Returns:
        Fractions, the frames' shape without the colour axis: 0 for none, about 1 for all.
    """
    red, green, blue = frames_CTHW.float() / 2  # the span of 2 becomes one of 1
    by_red = (red - green) / (MOUTH_COLOUR[0] - MOUTH_COLOUR[1])
    by_blue = (blue - green) / (MOUTH_COLOUR[2] - MOUTH_COLOUR[1])
    return torch.minimum(by_red, by_blue).clamp(min=0)


def _mouth_place(share_THW: Tensor) -> Tensor:
    """Return a soft disc, `[H, W]`, around the place of mouth colour in a clip."""
    height, width = share_THW.shape[1:]
    found_HW = share_THW.square().mean(0)
    rows_H1 = torch.arange(height)[:, None].float()
    columns_W = torch.arange(width).float()
    # The centre is the strongest neighbourhood, so that a stray pixel far away cannot shift it.
    pooled_HW = functional.avg_pool2d(found_HW[None, None], 9, stride=1, padding=4)[0, 0]
    peak = int(pooled_HW.argmax())
    distance_HW = ((rows_H1 - peak // width) ** 2 + (columns_W - peak % width) ** 2).sqrt()
    radius = 0.19 * width
    return ((radius - distance_HW) / (0.25 * radius)).clamp(0, 1)


def sync(estimated_T: Tensor, true_T: Tensor, max_lag: int = 5) -> tuple[float, int]:
    """Correlate two curves at the shift that fits best.

    Args:
        estimated_T: measured curve.
        true_T: true curve, equally long.
        max_lag: largest shift to try, in frames.

    Returns:
        Pearson correlation at the best lag (0 if a curve is constant), and that lag in frames;
        positive if the measured curve is late.

    Raises:
        MismatchError: if the lengths differ, or are below `max_lag + 3`.
    """
    length = true_T.shape[0]
    if estimated_T.shape != true_T.shape or length < max_lag + 3:
        raise MismatchError(
            f"got curves of {tuple(estimated_T.shape)} and {tuple(true_T.shape)} frames; they "
            f"must be equally long and at least {max_lag + 3} frames for lags up to {max_lag}"
        )
    best = (-2.0, 0)
    # Small lags come first: of equally good lags the smallest is returned.
    for lag in sorted(range(-max_lag, max_lag + 1), key=abs):
        late_T = estimated_T[max(lag, 0) : length + min(lag, 0)]
        early_T = true_T[max(-lag, 0) : length - max(lag, 0)]
        correlation = _correlate(late_T, early_T)
        if correlation > best[0] + 1e-6:
            best = (correlation, lag)
    return best


def _correlate(left_T: Tensor, right_T: Tensor) -> float:
    left_T, right_T = left_T.double(), right_T.double()
    left_T, right_T = left_T - left_T.mean(), right_T - right_T.mean()
    scale = float(left_T.norm() * right_T.norm())
    return float(left_T @ right_T) / scale if scale > 1e-9 else 0.0
