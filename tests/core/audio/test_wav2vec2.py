"""The audio encoder: sounds of any length, its own steps, and its seeded weights."""

import pytest
import torch

from tests.family import ENCODER_CONFIG
from turbotalk_core.audio.wav2vec2 import build_audio_encoder
from turbotalk_core.errors import MismatchError


def test_new_weights_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = (
        build_audio_encoder(ENCODER_CONFIG, seed=seed).model for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(1), expected)
    key = "feature_projection.projection.weight"
    assert torch.equal(first.state_dict()[key], second.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


@pytest.mark.parametrize("num_samples", [1, 399, 400, 640, 1_000])
def test_the_shortest_sounds_are_heard(num_samples: int) -> None:
    encoder = build_audio_encoder(ENCODER_CONFIG, seed=0)
    result = encoder.encode(torch.ones(num_samples), 3)
    assert result.shape == (3, 2, 16)
    assert result.isfinite().all()


def test_silence_is_heard_the_same_in_every_frame_far_from_the_edges() -> None:
    result = build_audio_encoder(ENCODER_CONFIG, seed=0).encode(torch.zeros(32_000), 50)
    torch.testing.assert_close(result[20], result[30], rtol=1e-4, atol=1e-5)


def test_without_a_frame_count_the_encoder_keeps_its_own_steps() -> None:
    encoder = build_audio_encoder(ENCODER_CONFIG, seed=0)
    states = encoder.hidden_states(torch.zeros(2, 16_000), None)
    assert [tuple(state.shape) for state in states] == [(2, 49, 16)] * 3


@pytest.mark.parametrize(
    ("waveform", "num_frames"),
    [(torch.zeros(1, 640), 1), (torch.zeros(0), 1), (torch.zeros(640), 0)],
)
def test_what_cannot_be_heard_is_refused(waveform: torch.Tensor, num_frames: int) -> None:
    encoder = build_audio_encoder(ENCODER_CONFIG, seed=0)
    with pytest.raises(MismatchError, match="mono samples"):
        encoder.encode(waveform, num_frames)
