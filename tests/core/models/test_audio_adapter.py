"""Audio tokens, and the regions in which audio attention uses them."""

import pytest
import torch
from torch import Tensor

from turbotalk_core.errors import MismatchError
from turbotalk_core.models.audio_adapter import (
    FIRST_WINDOW,
    LATER_WINDOW,
    AudioAdapterConfig,
    AudioCrossAttention,
    AudioProjection,
)
from turbotalk_core.models.wan import WanModel


def _first_attention(dit: WanModel) -> AudioCrossAttention:
    attention = dit.blocks[0].audio_cross_attn
    assert isinstance(attention, AudioCrossAttention)
    return attention


def test_each_frame_hears_its_own_tokens(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    attention = _first_attention(dit)
    hidden, tokens = dit_io["mid.block0.audio_attn_in"], dit_io["mid.audio_tokens"]
    other = tokens.clone()
    other[:, 1] += 1
    with torch.no_grad():
        changed_BND = attention(hidden, other) != attention(hidden, tokens)
    changed_F = changed_BND.unflatten(1, (tokens.shape[1], -1)).flatten(2).any(2)[0]
    assert changed_F.tolist() == [False, True, False]


def test_the_only_token_of_a_frame_is_heard_whatever_the_question() -> None:
    torch.manual_seed(0)
    attention = AudioCrossAttention(dim=12, num_heads=3, token_dim=5)
    tokens_BFND = torch.randn(2, 3, 1, 5)
    with torch.no_grad():
        value_BFD = attention.kv_linear(tokens_BFND)[:, :, 0, 12:]
        expected = attention.proj(value_BFD).repeat_interleave(4, dim=1)
        torch.testing.assert_close(attention(torch.randn(2, 12, 12), tokens_BFND), expected)


def test_an_encoder_of_another_size_is_refused() -> None:
    projection = AudioProjection(AudioAdapterConfig(frame_width=96, hidden_dim=4, token_dim=6))
    with pytest.raises(MismatchError, match=r"gives 104 values.*13 layers of 8.*takes 96"):
        projection(torch.zeros(1, FIRST_WINDOW, 13, 8), torch.zeros(1, 2, LATER_WINDOW, 13, 8))


def test_only_the_product_of_layers_and_width_counts() -> None:
    projection = AudioProjection(
        AudioAdapterConfig(frame_width=12, hidden_dim=4, num_tokens=2, token_dim=6)
    )
    first, later = torch.ones(1, FIRST_WINDOW, 3, 4), torch.ones(1, 0, LATER_WINDOW, 3, 4)
    tokens = projection(first, later)
    assert tokens.shape == (1, 1, 2, 6)
    assert torch.equal(projection(first.view(1, 5, 2, 6), later.view(1, 0, 8, 2, 6)), tokens)
