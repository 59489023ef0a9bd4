"""Diversity of the clips generated from one input.

A portrait and a voice leave most of the motion undetermined, so other noise should lead to other
motion. Clips of one input are compared with each other. For reference, so are true renders of the
same avatar that start in the same pose, speak the same utterance and move differently.

Axes: C channels, T video frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.avatars.avatars import draw_avatar
from training.avatars.motion import Motion, draw_motion
from training.avatars.mouth import MouthCurve
from training.avatars.portrait import render

COARSE = 4  # pixels; differences that are finer than this are grain, not motion
REDRAW_STRIDE = 10_000_019  # motion seeds of redraws begin above those of all pairs
NUM_MOTIONS = 256  # motions for the regression of later poses on the pose at the start
LIMITS = {"lids_T": (0.0, 1.0), "gaze_x_T": (-1.0, 1.0), "gaze_y_T": (-1.0, 1.0)}


def measure_spread(clips_CTHW: Sequence[Tensor]) -> float:
    """Measure the differences between clips of one input.

    Args:
        clips_CTHW: at least two clips, equally long, in [-1, 1].

    Returns:
        Mean absolute difference over all pairs of clips, frames and squares of ``COARSE`` pixels;
        the full range of a pixel is 1.
    """
    coarse = [F.avg_pool2d(frames_CTHW, COARSE) for frames_CTHW in clips_CTHW]
    distances = [(left - right).abs().mean() for left, right in combinations(coarse, 2)]
    return float(torch.stack(distances).mean()) / 2


def redraw(split: str, seed: int, mouth: MouthCurve, count: int, size: int = 128) -> list[Tensor]:
    """Render an avatar with other motions that start from the same first frame.

    Let m(t) be a motion curve of another seed, and p the start of the original curve. With r(t),
    the regression of a curve at t on its value at 0, m(t) + r(t) (p - m(0)) is a sample of the
    curve conditioned on its start; for a Gaussian process this is exact (Matheron's rule). r is 1
    at the start, and falls as the correlation with the start decays.

    Args:
        split: ``train`` or ``heldout``.
        seed: seed of the avatar and its original motion.
        mouth: mouth curve of the utterance.
        count: number of clips.
        size: height and width in pixels.

    Returns:
        Clips [3, T, H, W] in [-1, 1]; all begin with the first frame of the original.
    """
    avatar = draw_avatar(split, seed)
    num_frames = mouth.opening_T.shape[0]

    def draw(motion_seed: int) -> Motion:
        return draw_motion(avatar, split, motion_seed, num_frames, mouth.opening_T)

    own = draw(seed)
    motions = [draw(seed + REDRAW_STRIDE * number) for number in range(1, NUM_MOTIONS + 1)]
    return [
        render(avatar, _begin_at(own, motions[number], motions), mouth, size)
        for number in range(count)
    ]


def _begin_at(own: Motion, other: Motion, motions: Sequence[Motion]) -> Motion:
    curves = {}
    for curve in fields(Motion):
        name = curve.name
        drawn_MT = torch.stack([getattr(motion, name) for motion in motions])
        drawn_MT = drawn_MT - drawn_MT.mean(0)
        start_M1 = drawn_MT[:, :1]
        # A curve that always starts at the same value needs no shift; its regression is 0.
        regression_T = (drawn_MT * start_M1).sum(0) / start_M1.square().sum().clamp_min(1e-12)
        curve_T = getattr(other, name)
        begun_T = curve_T + regression_T * (getattr(own, name)[0] - curve_T[0])
        curves[name] = begun_T.clamp(*LIMITS[name]) if name in LIMITS else begun_T
    return Motion(**curves)
