"""Anti-aliased drawing of moving shapes on the frames of a clip.

A `Space` is a moving coordinate system. A `Patch` is the part of the picture that a shape of a
space can touch in any frame, with the coordinates of its pixels. Coverages are computed on a patch,
from signed distances or boundary curves, and blended onto the canvas in place. This module has no
knowledge of faces.

Picture units: the picture is 128 wide and high, whatever its number of pixels. Space units: set by
the scale. `v` points down. Axes: C channels, T video frames, H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PICTURE = 128.0
EDGE = 1.3  # Width of an edge in picture units, as in a camera's image; sharper edges would alias.

Colour = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """Pixels of a rectangle, with their coordinates in a space.

    Attributes:
        rows: rows of the picture.
        columns: columns of the picture.
        u_THW: coordinate to the right, in space units.
        v_THW: coordinate downwards, in space units.
        scale: picture units per space unit.
    """

    rows: slice
    columns: slice
    u_THW: Tensor
    v_THW: Tensor
    scale: float

    def cover(self, distance_THW: Tensor, edge: float = EDGE) -> Tensor:
        """Compute coverage from a signed distance in space units, negative inside the shape."""
        ramp = (distance_THW * (-self.scale / edge)).add_(0.5).clamp_(0, 1)
        return ramp.square().mul_(ramp.mul_(-2).add_(3))

    def band(self, top_THW: Tensor, bottom_THW: Tensor, edge: float = EDGE) -> Tensor:
        """Compute coverage between two curves `v = f(u)`; even a thin band keeps its area."""
        above = self.cover(top_THW - self.v_THW, edge)
        return above.sub_(self.cover(bottom_THW - self.v_THW, edge)).clamp_(min=0)

    def ellipse(self, u: float, v: float, a: float, b: float) -> Tensor:
        """Compute the signed distance to an ellipse, exact at its edge."""
        x, y = (self.u_THW - u) / a, (self.v_THW - v) / b
        squared = x.square() + y.square()
        slope = ((x / a).square_() + (y / b).square_()).sqrt_().mul_(2).clamp_(min=1e-3)
        return squared.sub_(1).div_(slope)

    def capsule(
        self, start: tuple[float, float], stop: tuple[float, float], radius: float
    ) -> Tensor:
        """Compute the signed distance to a line of a given radius."""
        du, dv = stop[0] - start[0], stop[1] - start[1]
        x, y = self.u_THW - start[0], self.v_THW - start[1]
        along = ((x * du + y * dv) / max(du * du + dv * dv, 1e-9)).clamp_(0, 1)
        return ((x - along * du).square_() + (y - along * dv).square_()).sqrt_().sub_(radius)

    def glow(self, u: float, v: float, a: float, b: float) -> Tensor:
        """Compute a soft spot, 1 in the middle of an ellipse and 0 from its edge outwards."""
        squared = ((self.u_THW - u) / a).square_() + ((self.v_THW - v) / b).square_()
        return (1 - squared).clamp_(min=0).square_()


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Coordinate system that moves over the picture.

    Attributes:
        x_T: position of the pivot in the picture, to the right, in picture units.
        y_T: position of the pivot in the picture, downwards, in picture units.
        u_T: coordinate of the pivot in the space, to the right.
        v_T: coordinate of the pivot in the space, downwards.
        roll_T: rotation in radians, clockwise.
        scale: picture units per space unit.
    """

    x_T: Tensor
    y_T: Tensor
    u_T: Tensor
    v_T: Tensor
    roll_T: Tensor
    scale: float

    def shift(self, du_T: Tensor, dv_T: Tensor) -> Space:
        """Return the space with its contents moved by an amount per frame, in space units."""
        return replace(self, u_T=self.u_T - du_T, v_T=self.v_T - dv_T)

    def patch(
        self, size: int, left: float, top: float, right: float, bottom: float
    ) -> Patch | None:
        """Return the pixels that a rectangle of this space touches in any frame; None for none."""
        cosine_T, sine_T = self.roll_T.cos(), self.roll_T.sin()
        u_T4 = torch.tensor([left, right, left, right]) - self.u_T[:, None]
        v_T4 = torch.tensor([top, top, bottom, bottom]) - self.v_T[:, None]
        x_T4 = self.x_T[:, None] + self.scale * (cosine_T[:, None] * u_T4 - sine_T[:, None] * v_T4)
        y_T4 = self.y_T[:, None] + self.scale * (sine_T[:, None] * u_T4 + cosine_T[:, None] * v_T4)
        pixel = PICTURE / size
        first_column = max(0, math.floor((float(x_T4.min()) - EDGE) / pixel))
        last_column = min(size, math.ceil((float(x_T4.max()) + EDGE) / pixel))
        first_row = max(0, math.floor((float(y_T4.min()) - EDGE) / pixel))
        last_row = min(size, math.ceil((float(y_T4.max()) + EDGE) / pixel))
        if first_column >= last_column or first_row >= last_row:
            return None
        x_W = (torch.arange(first_column, last_column) + 0.5) * pixel
        y_H = (torch.arange(first_row, last_row) + 0.5) * pixel
        x_TW, y_TH = (x_W - self.x_T[:, None]) / self.scale, (y_H - self.y_T[:, None]) / self.scale
        along_u_TW = cosine_T[:, None] * x_TW + self.u_T[:, None]
        along_v_TW = -sine_T[:, None] * x_TW + self.v_T[:, None]
        return Patch(
            rows=slice(first_row, last_row),
            columns=slice(first_column, last_column),
            u_THW=along_u_TW[:, None, :] + (sine_T[:, None] * y_TH)[:, :, None],
            v_THW=along_v_TW[:, None, :] + (cosine_T[:, None] * y_TH)[:, :, None],
            scale=self.scale,
        )


class Canvas:
    """Frames to draw on, with a record of which pixels were ever touched."""

    def __init__(self, background_CHW: Tensor, num_frames: int) -> None:
        """Fill every frame with the same background, colours in [0, 1]."""
        self.size = background_CHW.shape[-1]
        self.frames_CTHW = background_CHW[:, None].repeat(1, num_frames, 1, 1)
        self.touched_HW = torch.zeros(background_CHW.shape[1:], dtype=torch.bool)

    def lay(self, patch: Patch, coverage_THW: Tensor, colour: Colour | Tensor) -> None:
        """Blend a colour over a patch.

        Args:
            patch: pixels to blend over.
            coverage_THW: opacity, from 0 (nothing) to 1 (opaque).
            colour: one colour, or one per pixel `[3, T, H, W]`.
        """
        view_CTHW = self.frames_CTHW[:, :, patch.rows, patch.columns]
        for channel in range(3):
            value = colour[channel]
            target = value if isinstance(value, Tensor) else torch.tensor(value)
            view_CTHW[channel].lerp_(target.expand_as(coverage_THW), coverage_THW)
        self.touched_HW[patch.rows, patch.columns] |= (coverage_THW > 0).any(0)
