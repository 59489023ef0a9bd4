"""Where each of several speakers is in the picture.

Goes in: masks or boxes on the pixels of the source picture, or nothing but its size. Comes out:
regions on latent cells, and last the background. A room of one file beside image.
Axes: H height, W width, P speakers and last the background.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ImageError
from .geometry import PATCH, SPATIAL_STRIDE, cover_size

MARGIN = 0.05  # of a half's side, left free on each side; InfiniteTalk, face_scale


def box_mask(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> Tensor:
    """Draw a box.

    Args:
        size: height and width of the source picture, pixels.
        top: first row inside.
        left: first column inside.
        bottom: first row below.
        right: first column to the right.

    Returns:
        [H, W], 1 inside, else 0.

    Raises:
        ImageError: a box that is empty or not inside the picture.
    """
    height, width = size
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ImageError(
            f"got a box from row {top}, column {left} to row {bottom}, column {right} in a "
            f"{width}x{height} picture; it must lie inside and hold at least one pixel"
        )
    mask_HW = torch.zeros(size)
    mask_HW[top:bottom, left:right] = 1
    return mask_HW


def halve_picture(size: tuple[int, int]) -> list[Tensor]:
    """Give two speakers side by side the two halves of the picture, less a margin.

    Args:
        size: height and width of the source picture, pixels.

    Returns:
        Masks [H, W] of the left and of the right speaker.

    Source: InfiniteTalk, wan/multitalk.py (masks without boxes).
    """
    height, width = size
    half = width // 2
    top, bottom = int(height * MARGIN), int(height * (1 - MARGIN))
    left, right = half * MARGIN, half * (1 - MARGIN)
    return [
        box_mask(size, top, int(start + left), bottom, int(start + right)) for start in (0, half)
    ]


def fit_regions(masks: list[Tensor], height: int, width: int) -> Tensor:
    """Bring masks of the source picture to the latent cells of the video.

    They are resized and cut as the picture is, each cell taking one pixel's word.

    Args:
        masks: one per speaker, [H, W] of the source picture, above 0 inside.
        height: of the video, pixels.
        width: of the video, pixels.

    Returns:
        [P, height / 8, width / 8], 1 inside, else 0; last the background, where no speaker is.

    Raises:
        ImageError: fewer than two masks, masks of different sizes, or one of which no token of the
            video is left.
    """
    shapes = {tuple(mask.shape) for mask in masks}
    if len(masks) < 2 or len(shapes) > 1:
        raise ImageError(
            f"got {len(masks)} masks of sizes {sorted(shapes)}; give each of at least two speakers "
            "a mask of the picture's size"
        )
    speakers_PHW = (torch.stack(masks) > 0).float()
    rows, columns = speakers_PHW.shape[1:]
    covered = cover_size(rows, columns, height, width)
    resized = F.interpolate(speakers_PHW.unsqueeze(0), covered, mode="nearest")
    top, left = (covered[0] - height) // 2, (covered[1] - width) // 2
    cut = resized[:, :, top : top + height, left : left + width]
    cells = (height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
    speakers_PHW = F.interpolate(cut, cells, mode="nearest")[0]
    for number, region_HW in enumerate(speakers_PHW, 1):
        if not region_HW[::PATCH, ::PATCH].any():
            raise ImageError(
                f"nothing of the region of speaker {number} is left in the {width}x{height} video; "
                "draw it larger, or further from the edges that are cut"
            )
    background_HW = (speakers_PHW.sum(0) == 0).float()
    return torch.cat((speakers_PHW, background_HW.unsqueeze(0)))
