"""Colours: known values of Lab, and what matching leaves and changes."""

import pytest
import torch
from torch import Tensor

from turbotalk_core.chunking.color import lab_to_rgb, match_color, rgb_to_lab


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _clip(*colour: float) -> Tensor:
    return torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1, 1)


@pytest.mark.parametrize(
    ("rgb", "lab"),  # CIE Lab of sRGB's corners, D65
    [
        ((0, 0, 0), (0, 0, 0)),
        ((1, 1, 1), (100, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.74, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
    ],
)
def test_lab_of_known_colours(rgb: tuple[float, ...], lab: tuple[float, ...]) -> None:
    result = rgb_to_lab(_clip(*rgb))
    torch.testing.assert_close(result, _clip(*lab), atol=0.02, rtol=0)
    torch.testing.assert_close(lab_to_rgb(result), _clip(*rgb), atol=1e-3, rtol=0)


def test_there_and_back() -> None:
    rgb = (_draw(2, 3, 4, 5, 6) + 1) / 2
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(rgb)), rgb, atol=1e-3, rtol=0)


def test_colours_outside_are_clipped() -> None:
    assert lab_to_rgb(_clip(100, 90, 90)).max() == 1
    assert lab_to_rgb(_clip(0, -90, 90)).min() == 0


def test_a_frame_of_the_reference_stays() -> None:
    frames = _draw(1, 3, 1, 6, 8)
    torch.testing.assert_close(match_color(frames, frames[:, :, 0], 1.0), frames, atol=2e-3, rtol=0)


def test_a_flat_frame_becomes_the_mean_colour() -> None:
    reference = 0.5 * _draw(1, 3, 6, 8)
    matched = match_color(_clip(0.3, -0.2, 0.9).expand(1, 3, 2, 4, 4), reference, 1.0)
    lab = rgb_to_lab((matched + 1) / 2)
    expected = rgb_to_lab((reference.unsqueeze(2) + 1) / 2).mean((3, 4), keepdim=True)
    torch.testing.assert_close(lab, expected.expand_as(lab), atol=0.1, rtol=0)


def test_frames_are_matched_each_by_itself() -> None:
    frames, reference = _draw(1, 3, 3, 6, 8), _draw(1, 3, 4, 4, seed=1)
    together = match_color(frames, reference, 0.7)
    alone = torch.cat([match_color(f, reference, 0.7) for f in frames.split(1, 2)], 2)
    assert torch.equal(together, alone)


def test_strength_blends() -> None:
    frames, reference = _draw(1, 3, 1, 6, 8), _draw(1, 3, 4, 4, seed=1)
    assert match_color(frames, reference, 0.0) is frames
    half, full = (match_color(frames, reference, strength) for strength in (0.5, 1.0))
    torch.testing.assert_close(half, (frames + full) / 2)
