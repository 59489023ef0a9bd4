"""Normalization statistics against sums over all stretches, and normalization by them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.family import ENCODER_CONFIG
from turbotalk_core.audio.normalization import RunningStats
from turbotalk_core.audio.wav2vec2 import Wav2Vec2Encoder, build_audio_encoder
from turbotalk_core.types import SoundMoments


def _noise(num_samples: int) -> Tensor:
    return 0.2 + torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))


def _measure(samples_S: Tensor, lengths: list[int], num_silent: int = 0) -> SoundMoments:
    meter, start = RunningStats(10, 5), 0
    while start < samples_S.shape[0]:
        for length in lengths:
            meter.add(samples_S[start : start + length])
            start += length
    return meter.measure(samples_S.shape[0] + num_silent, gain=3.0)


@given(
    st.integers(10, 2_000),
    st.lists(st.integers(0, 300), min_size=1, max_size=4).filter(any),
)
def test_moments_are_those_of_all_stretches(num_samples: int, lengths: list[int]) -> None:
    samples_S = _noise(num_samples)
    moments = _measure(samples_S, lengths)
    stretches_TK = 3 * samples_S.double().unfold(0, 10, 5)
    torch.testing.assert_close(moments.mean_K, stretches_TK.mean(0))
    expected_KK = torch.cov(stretches_TK.T, correction=0).reshape(10, 10)
    torch.testing.assert_close(moments.covariance_KK, expected_KK, rtol=1e-6, atol=1e-9)


def test_silence_around_a_voice_counts() -> None:
    samples_S = _noise(2_000)
    moments = _measure(samples_S, [700], num_silent=6_000)
    padded_S = torch.cat((samples_S, torch.zeros(6_000)))
    expected = _measure(padded_S, [700])
    torch.testing.assert_close(moments.mean_K, expected.mean_K, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(moments.covariance_KK, expected.covariance_KK, rtol=1e-2, atol=1e-2)


def test_what_is_shorter_than_a_stretch_has_none() -> None:
    moments = _measure(torch.ones(9), [4])
    assert not moments.mean_K.any()
    assert not moments.covariance_KK.any()


def _first_layer(encoder: Wav2Vec2Encoder) -> Any:
    return encoder.model.feature_extractor.conv_layers[0]


@pytest.fixture(scope="module")
def encoder() -> Wav2Vec2Encoder:
    encoder = build_audio_encoder(ENCODER_CONFIG, seed=0)
    norm = _first_layer(encoder).layer_norm
    with torch.no_grad():  # at first gains are 1 and offsets 0, which would hide a mistake
        norm.weight.normal_(generator=torch.Generator().manual_seed(1))
        norm.bias.normal_(generator=torch.Generator().manual_seed(2))
    return encoder


def test_told_its_own_moments_an_encoder_hears_the_same(encoder: Wav2Vec2Encoder) -> None:
    assert encoder.first_kernel == (10, 5)
    samples_S = _noise(16_000)
    plain_TLD = encoder.encode(samples_S, 25)
    told_TLD = encoder.encode(samples_S, 25, _measure(samples_S / 3, [16_000]))
    assert not torch.equal(told_TLD, plain_TLD)
    torch.testing.assert_close(told_TLD, plain_TLD, rtol=1e-4, atol=1e-4)
    assert torch.equal(encoder.encode(samples_S, 25), plain_TLD)  # and is as before


def test_told_those_of_the_whole_a_part_sounds_as_it_does_there(encoder: Wav2Vec2Encoder) -> None:
    def first_layer(samples_S: Tensor, moments: SoundMoments | None) -> Tensor:
        normalized = []
        activation = _first_layer(encoder).activation
        hook = activation.register_forward_pre_hook(lambda _, seen: normalized.append(seen[0]))
        encoder.encode(samples_S, 10, moments)
        hook.remove()
        return normalized[0]

    samples_S = _noise(32_000)
    samples_S[16_000:] *= 1e-3
    whole_BCT = first_layer(samples_S, None)[:, :, 4_000:]
    told_BCT = first_layer(samples_S[20_000:], _measure(samples_S / 3, [5_000]))
    torch.testing.assert_close(told_BCT, whole_BCT, rtol=1e-4, atol=1e-4)
    alone_BCT = first_layer(samples_S[20_000:], None)
    assert alone_BCT.std() > 100 * told_BCT.std(dim=2).mean()
