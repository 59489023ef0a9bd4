"""Mouth curves follow the sound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tests.training.syllables import RATE, make_syllables
from training.avatars.mouth import mouth_curve
from turbotalk_core.errors import AudioError
from turbotalk_core.geometry import FPS

FRAME = RATE // FPS


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
