"""Fixtures for several tests of the training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
import torch

from training.avatars.avatars import draw_avatar
from training.avatars.motion import draw_motion
from training.avatars.mouth import mouth_curve
from training.avatars.portrait import paint
from training.avatars.synthetic import SyntheticClip

MISSING = "espeak-ng is not installed; these tests speak with it (apt-get install espeak-ng)"


@pytest.fixture
def _espeak() -> None:
    if shutil.which("espeak-ng") is None:
        if os.environ.get("CI") == "true":
            pytest.fail(MISSING)
        pytest.skip(MISSING)


def _draw_humming_clip(split: str, seed: int, num_frames: int) -> SyntheticClip:
    times_S = torch.arange(640 * num_frames) / 16_000
    swell_S = (0.5 - 0.5 * torch.cos((9 + seed % 5) * times_S)) ** 2
    waveform_S = 0.3 * swell_S * torch.sin(2 * torch.pi * 300 * times_S)
    mouth = mouth_curve(waveform_S)
    avatar = draw_avatar(split, seed)
    motion = draw_motion(avatar, split, seed, num_frames, mouth.opening_T)
    painting = paint(avatar, motion, mouth, 48)
    return SyntheticClip(
        frames_CTHW=painting.frames_CTHW,
        waveform_S=waveform_S,
        sample_rate=16_000,
        mouth=mouth,
        still_mask_HW=painting.still_mask_HW,
    )


@pytest.fixture(scope="session")
def draw_humming_clip() -> Callable[[str, int, int], SyntheticClip]:
    """Draw a small avatar, 48 pixels, with a tone that swells and fades, without espeak-ng."""
    return _draw_humming_clip
