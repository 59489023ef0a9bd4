"""Mouth curves follow the sound, and are measured correctly in pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from training.data.avatars import draw_avatar
from training.data.motion import draw_motion
from training.data.mouth import MouthCurve, estimate_aperture, mouth_curve, sync
from training.data.portrait import render
from turbotalk_core.errors import AudioError, MismatchError
from turbotalk_core.geometry import FPS

RATE = 16000
FRAME = RATE // FPS


def make_syllables(seconds: float, seed: int = 0) -> torch.Tensor:
    """Make a buzzing tone whose loudness and brightness vary as in speech."""
    generator = torch.Generator().manual_seed(seed)
    count = round(seconds * RATE)
    times = torch.arange(count) / RATE
    knots = torch.rand(2, 1, 2 + int(6 * seconds), generator=generator)
    loudness, brightness = functional.interpolate(knots, count, mode="linear")[:, 0]
    low, high = torch.sin(2 * torch.pi * 300 * times), torch.sin(2 * torch.pi * 2500 * times)
    return 0.3 * 10 ** (1.6 * loudness - 1.6) * (low + 0.6 * brightness * high)


def test_silence_is_a_closed_mouth() -> None:
    mouth = mouth_curve(torch.zeros(2 * RATE))
    assert mouth.opening_T.shape == (50,)
    assert torch.equal(mouth.opening_T, torch.zeros(50))
    assert torch.equal(mouth.aperture_T, torch.zeros(50))
    torch.testing.assert_close(mouth.width_T, torch.full((50,), 0.5))


def test_louder_part_is_more_open() -> None:
    tone = torch.sin(2 * torch.pi * 400 * torch.arange(3 * RATE) / RATE)
    gain = torch.cat([torch.full((RATE,), g) for g in (0.0, 0.1, 0.5)])
    opening_T = mouth_curve(tone * gain).opening_T
    assert opening_T[5:20].max() == 0
    assert 0.1 < opening_T[30:45].min() <= opening_T[30:45].max() < opening_T[55:70].min() - 0.2


@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 20.0))
def test_recording_level_does_not_matter(gain: float) -> None:
    sound = make_syllables(2.0)
    plain, louder = mouth_curve(sound), mouth_curve(gain * sound)
    torch.testing.assert_close(plain.opening_T, louder.opening_T, atol=1e-3, rtol=0)
    torch.testing.assert_close(plain.width_T, louder.width_T, atol=1e-3, rtol=0)


def test_bright_sound_is_wide_and_dull_sound_is_round() -> None:
    times = torch.arange(RATE) / RATE
    dull = mouth_curve(torch.sin(2 * torch.pi * 300 * times))
    bright = mouth_curve(torch.sin(2 * torch.pi * 2500 * times))
    assert dull.width_T[5:20].max() < 0.1
    assert bright.width_T[5:20].min() > 0.9
    torch.testing.assert_close(dull.rounding_T, 1 - dull.width_T)


@pytest.mark.parametrize("shift", [5, 10])
def test_later_sound_is_later_mouth(shift: int) -> None:
    # Whole loudness blocks of silence, gated out, leave the gain as it was.
    sound = functional.pad(make_syllables(3.0), (2 * RATE, 2 * RATE))
    plain = mouth_curve(sound).opening_T
    late = mouth_curve(functional.pad(sound, (shift * FRAME, 0))).opening_T
    torch.testing.assert_close(late[shift:], plain, atol=1e-3, rtol=0)


def test_frames_past_the_sound_are_closed() -> None:
    opening_T = mouth_curve(make_syllables(1.0), num_frames=40).opening_T
    assert opening_T.shape == (40,)
    assert opening_T[27:].max() == 0


@pytest.mark.parametrize(
    ("sound", "rate"),
    [(torch.zeros(2, 100), RATE), (torch.zeros(RATE), 4000), (torch.zeros(100), RATE)],
)
def test_unusable_sound_is_refused(sound: torch.Tensor, rate: int) -> None:
    with pytest.raises(AudioError):
        mouth_curve(sound, rate)


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
