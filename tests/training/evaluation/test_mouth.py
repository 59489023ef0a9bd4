"""The mouth is read back from pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from tests.training.syllables import RATE, make_syllables
from training.avatars.avatars import draw_avatar
from training.avatars.motion import draw_motion
from training.avatars.mouth import MouthCurve, mouth_curve
from training.avatars.portrait import render
from training.evaluation.mouth import estimate_aperture, sync
from turbotalk_core.errors import MismatchError
from turbotalk_core.geometry import FPS

FRAME = RATE // FPS


def make_clip(seed: int) -> tuple[torch.Tensor, MouthCurve]:
    mouth = mouth_curve(make_syllables(2.0, seed))
    avatar = draw_avatar("heldout", seed)
    motion = draw_motion(avatar, "heldout", seed, 50, mouth.opening_T)
    return render(avatar, motion, mouth), mouth


@pytest.mark.parametrize("seed", range(12))
def test_mouth_is_read_from_true_renders(seed: int) -> None:
    frames_CTHW, mouth = make_clip(seed)
    correlation, lag = sync(estimate_aperture(frames_CTHW), mouth.aperture_T)
    assert correlation >= 0.98
    assert lag == 0


def test_mouth_is_read_through_blur_and_noise() -> None:
    frames_CTHW, mouth = make_clip(3)
    blurred = functional.avg_pool2d(frames_CTHW, 3, stride=1, padding=1)
    noise = 0.03 * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0))
    assert sync(estimate_aperture(blurred + noise), mouth.aperture_T)[0] > 0.95


@pytest.mark.slow
def test_closed_mouth_shows_next_to_no_mouth_colour() -> None:
    closed = mouth_curve(torch.zeros(2 * FRAME))
    wide = MouthCurve(opening_T=torch.ones(2), width_T=torch.ones(2), rounding_T=torch.zeros(2))
    for seed in range(24):
        avatar = draw_avatar("train", seed)
        motion = draw_motion(avatar, "train", seed, 2, closed.opening_T)
        # Where red cloth meets a blue wall the lens mixes a little of the mouth's colour.
        shown = estimate_aperture(render(avatar, motion, closed)).max()
        assert shown < 0.1 * estimate_aperture(render(avatar, motion, wide)).min()


def test_estimator_wants_colour_frames() -> None:
    with pytest.raises(MismatchError):
        estimate_aperture(torch.zeros(1, 5, 128, 128))


@given(st.integers(-5, 5))
def test_sync_finds_the_lag(lag: int) -> None:
    curve = torch.randn(60, generator=torch.Generator().manual_seed(1))
    correlation, found = sync(3 * curve[10 - lag : 50 - lag] + 2, curve[10:50])
    assert found == lag
    assert correlation == pytest.approx(1.0, abs=1e-6)


def test_sync_of_a_frozen_mouth_is_zero() -> None:
    assert sync(torch.ones(20), torch.arange(20.0)) == (0.0, 0)


def test_sync_refuses_unequal_curves() -> None:
    with pytest.raises(MismatchError):
        sync(torch.zeros(20), torch.zeros(21))
