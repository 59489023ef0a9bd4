"""Clips of one input are told apart, and redraws go on otherwise from the same frame."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from training.avatars.synthetic import SyntheticClip
from training.evaluation.diversity import COARSE, measure_spread, redraw

NUM_FRAMES = 26
SEED = 3


@pytest.fixture(scope="module")
def clip(draw_humming_clip: Callable[[str, int, int], SyntheticClip]) -> SyntheticClip:
    return draw_humming_clip("heldout", SEED, NUM_FRAMES)


def test_equal_clips_are_at_no_distance() -> None:
    frames = torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    assert measure_spread([frames, frames, frames]) == 0


def test_the_spread_is_the_mean_over_all_pairs() -> None:
    flat = torch.zeros(3, 5, 16, 16)
    # Distances 0.4, 1.0 and 0.6 of a range of 2.
    assert measure_spread([flat, flat + 0.4, flat + 1.0]) == pytest.approx(1 / 3)


def test_grain_is_no_diversity() -> None:
    x = torch.arange(16)
    checks = ((x[:, None] + x) % 2 * 2.0 - 1).expand(3, 5, 16, 16)
    assert COARSE % 2 == 0
    assert measure_spread([checks, -checks]) == 0


def test_redraws_begin_alike_and_go_on_otherwise(clip: SyntheticClip) -> None:
    first, second = redraw("heldout", SEED, clip.mouth, 2, 48)
    own = clip.frames_CTHW
    assert first.shape == own.shape
    for left, right in ((first, own), (second, own), (first, second)):
        torch.testing.assert_close(left[:, 0], right[:, 0], atol=1e-4, rtol=0)
        early, late = ((left - right)[:, t].abs().mean() for t in (1, NUM_FRAMES - 1))
        assert 0 < early < late
    torch.testing.assert_close(redraw("heldout", SEED, clip.mouth, 1, 48)[0], first)
