"""Speaker embeddings on a line, and assignment of video tokens to the most similar speaker."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from turbotalk_core.models.speaker_embedding import (
    STRETCH,
    draw_line,
    line_up,
    measure_likeness,
    place_tokens,
    speaker_tables,
    token_regions,
)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _halves() -> Tensor:
    """Left and right of 4 x 8 latent cells, and the lowest two rows as background."""
    regions_PHW = torch.zeros(3, 4, 8)
    regions_PHW[0, :2, :4] = regions_PHW[1, :2, 4:] = regions_PHW[2, 2:] = 1
    return regions_PHW


def test_a_token_has_the_region_of_its_upper_left_cell() -> None:
    cells = torch.arange(4 * 6).view(1, 4, 6)
    assert token_regions(cells).tolist() == [[0, 2, 4, 12, 14, 16]]


def test_likeness_is_mean_attention_to_a_region() -> None:
    q, k = _draw(2, 24, 3, 8), _draw(2, 24, 3, 8, seed=1)
    regions_PN = token_regions(_halves())
    likeness_BPN = measure_likeness(q, k, regions_PN)
    attention = torch.einsum("bnhd,bmhd->bhnm", q, k[:, :8]).div(math.sqrt(8)).softmax(-1)
    for index, region_N in enumerate(regions_PN):
        expected = attention[..., region_N.bool()].mean(-1).mean(1)
        torch.testing.assert_close(likeness_BPN[:, index], expected)


def test_an_empty_region_is_like_nothing() -> None:
    regions_PN = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    likeness_BPN = measure_likeness(_draw(1, 4, 1, 8), _draw(1, 4, 1, 8, seed=1), regions_PN)
    assert likeness_BPN.isfinite().all()
    assert not likeness_BPN[:, 2].any()
    assert (likeness_BPN[:, :2] > 0).all()


def test_two_speakers_stand_where_the_model_was_trained() -> None:
    assert line_up(2) == [0, 20, 10]


@pytest.mark.parametrize("num_speakers", [2, 3, 4, 7])
def test_nobody_stands_in_anothers_place(num_speakers: int) -> None:
    starts = line_up(num_speakers)
    assert len(starts) == num_speakers + 1
    gaps = torch.tensor(sorted(starts)).diff()
    assert (gaps == 10).all()
    assert min(starts) < starts[-1] < max(starts)  # the background, between speakers
    assert starts[:-1] == sorted(starts[:-1])


def test_a_token_stands_beside_whom_it_resembles_most() -> None:
    likeness_BPN = torch.tensor(
        [[[0.9, 0.1, 0.5, 0.2], [0.2, 0.8, 0.1, 0.4], [0.1, 0.2, 0.3, 0.7]]]
    )
    first, second, third, fourth = place_tokens(likeness_BPN)[0].tolist()
    assert first == pytest.approx(STRETCH)  # most like speaker 1 of all
    assert second == pytest.approx(20 + STRETCH)
    assert third == pytest.approx(STRETCH * (0.5 - 0.1) / (0.9 - 0.1))
    assert fourth == 12  # the middle of the background


def test_audio_tokens_stand_in_the_middle_of_their_speaker() -> None:
    line = draw_line(2, 6, 8, torch.device("cpu"))
    queries, keys = speaker_tables(torch.rand(2, 3, 5), line)
    assert queries[0].shape == (2, 5, 4)
    assert keys[0].shape == (6, 4)
    angles = torch.atan2(keys[1], keys[0])[:, 0]  # the first pair turns by the position itself
    expected = torch.tensor([2.0, 2.0, 2.0, 22.0, 22.0, 22.0])
    turns = (angles - expected) / (2 * math.pi)
    torch.testing.assert_close(turns, turns.round(), atol=1e-5, rtol=0)
