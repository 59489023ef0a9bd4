"""Resampling against tones, counting, and itself in one piece."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torchaudio.functional as AF
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_sound import Chopped
from turbotalk_core.audio.io import from_samples
from turbotalk_core.audio.resample import Resampled, read_mono_16k, resample, to_mono_16k
from turbotalk_core.errors import AudioError
from turbotalk_core.types import Waveform

RATES = [1_000, 8_000, 11_025, 16_000, 44_100, 44_101, 48_000, 96_000]


@pytest.mark.parametrize("sample_rate", [8_000, 11_025, 16_000, 22_050, 44_100, 44_101, 192_000])
def test_resampling_keeps_a_tone_in_time(sample_rate: int) -> None:
    def tone(rate: int) -> torch.Tensor:
        return 0.5 * torch.sin(2 * math.pi * 300 * torch.arange(rate) / rate)

    result_S = to_mono_16k(Waveform(samples_CS=tone(sample_rate)[None], sample_rate=sample_rate))
    assert result_S.shape == (16_000,)
    inside = slice(200, -200)
    torch.testing.assert_close(result_S[inside], tone(16_000)[inside], rtol=0, atol=2e-3)


@given(st.integers(1, 3), st.integers(1, 5_000), st.sampled_from([8_000, 16_000, 24_000, 48_000]))
def test_length_follows_from_the_rate(
    num_channels: int, num_samples: int, sample_rate: int
) -> None:
    waveform = Waveform(samples_CS=torch.zeros(num_channels, num_samples), sample_rate=sample_rate)
    assert to_mono_16k(waveform).shape == (math.ceil(16_000 * num_samples / sample_rate),)


def test_channels_are_averaged() -> None:
    waveform = from_samples(torch.tensor([[1.0, 0.0], [0.0, 0.5]]), 16_000)
    assert to_mono_16k(waveform).tolist() == [0.5, 0.25]


@pytest.mark.parametrize("reduce", [to_mono_16k, read_mono_16k])
def test_a_rate_without_speech_is_refused(reduce: Callable[[Waveform], object]) -> None:
    with pytest.raises(AudioError, match="999 Hz"):
        reduce(Waveform(samples_CS=torch.zeros(1, 999), sample_rate=999))


@pytest.mark.parametrize("sample_rate", [1, 999, 384_001, 2**31 - 1])
def test_a_rate_that_no_recorder_has_is_refused(sample_rate: int) -> None:
    with pytest.raises(AudioError, match=f"{sample_rate} Hz"):
        resample(torch.zeros(10), sample_rate, 16_000)
    sound = Chopped(torch.zeros(1, 10), (3,), sample_rate)
    with pytest.raises(AudioError, match=f"{sample_rate} Hz"):
        next(Resampled(sound=sound, sample_rate=48_000).blocks())


@pytest.mark.parametrize(
    ("sample_rate", "wanted_rate"),
    [
        (8_000, 16_000),
        (11_025, 16_000),
        (16_000, 8_000),
        (16_000, 44_100),
        (16_000, 48_000),
        (22_050, 16_000),
        (24_000, 16_000),
        (32_000, 16_000),
        (44_100, 16_000),
        (44_100, 48_000),
        (48_000, 16_000),
        (48_000, 44_100),
        (96_000, 16_000),
        (384_000, 16_000),
        (1_009, 997),  # coprime
        (16_001, 16_000),
        (44_101, 16_000),
    ],
)
def test_it_is_what_torchaudio_does(sample_rate: int, wanted_rate: int) -> None:
    samples_CS = _noise(sample_rate + 17, sample_rate, channels=2).samples_CS
    ratio = Fraction(sample_rate, wanted_rate).limit_denominator(1_000)
    expected_CS = AF.resample(samples_CS, ratio.numerator, ratio.denominator)
    for samples, expected in ((samples_CS, expected_CS), (samples_CS[0], expected_CS[0])):
        result = resample(samples, sample_rate, wanted_rate)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_no_sample_of_a_long_sound_is_lost() -> None:
    """In float32 the length of this sound would be rounded down."""
    num_samples = 1 + 441 * 4_000
    assert resample(torch.zeros(num_samples), 44_100, 16_000).shape == (160 * 4_000 + 1,)


def _noise(num_samples: int, sample_rate: int, channels: int = 1) -> Waveform:
    generator = torch.Generator().manual_seed(num_samples)
    samples_CS = 0.1 * torch.randn(channels, num_samples, generator=generator)
    return Waveform(samples_CS=samples_CS, sample_rate=sample_rate)


@pytest.mark.slow
@given(
    st.sampled_from(RATES), st.integers(1, 25_000), st.sampled_from([0, 10, 20]), st.integers(1, 6)
)
def test_block_by_block_is_the_same_as_at_once(
    sample_rate: int, more: int, seconds: int, channels: int
) -> None:
    waveform = _noise(sample_rate * seconds // (1 + sample_rate // 20_000) + more, sample_rate)
    waveform = Waveform(
        samples_CS=waveform.samples_CS.expand(channels, -1), sample_rate=sample_rate
    )
    sound, whole_S = read_mono_16k(waveform), to_mono_16k(waveform)
    blocks_S = torch.cat(list(sound.blocks()), dim=1)[0]
    assert sound.num_samples == blocks_S.shape[0] == whole_S.shape[0]
    torch.testing.assert_close(blocks_S, whole_S, rtol=0, atol=1e-7)


@pytest.mark.slow
@given(st.sampled_from(RATES), st.sampled_from([8_000, 44_100, 48_000]), st.data())
def test_a_sample_is_the_same_from_wherever_reading_began(
    sample_rate: int, wanted_rate: int, data: st.DataObject
) -> None:
    waveform = _noise(21 * min(sample_rate, 16_000) + 5, sample_rate, channels=2)
    sound = Resampled(sound=waveform, sample_rate=wanted_rate)
    whole_CS = torch.cat(list(sound.blocks()), dim=1)
    assert whole_CS.shape == (2, sound.num_samples)
    start = data.draw(st.integers(0, sound.num_samples))
    rest_CS = torch.cat([torch.zeros(2, 0), *sound.blocks(start)], dim=1)
    assert torch.equal(rest_CS, whole_CS[:, start:])
