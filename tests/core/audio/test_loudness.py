"""Loudness against the closed form of ITU-R BS.1770-4 (a full-scale 997 Hz sine is -3.01 LKFS),
and against pyloudnorm.
"""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyloudnorm import Meter

from turbotalk_core.audio.loudness import LoudnessMeter, measure_loudness, normalize_loudness

TOLERANCE = 0.1  # LU, EBU Tech 3341: what a loudness meter may be off


def _sine(seconds: float, amplitude: float) -> torch.Tensor:
    times_S = torch.arange(round(16_000 * seconds), dtype=torch.float64) / 16_000
    return (amplitude * torch.sin(2 * math.pi * 997 * times_S)).float()


@pytest.mark.parametrize("amplitude", [0.01, 0.3, 3.0])
def test_a_sine_of_any_level_ends_at_the_target(amplitude: float) -> None:
    result_S = normalize_loudness(_sine(2.0, amplitude))
    expected_S = _sine(2.0, 10 ** ((-23 + 3.01) / 20))
    torch.testing.assert_close(result_S, expected_S, rtol=0, atol=1e-3)


def test_the_target_may_be_chosen() -> None:
    ratio = (
        normalize_loudness(_sine(2.0, 0.5), target_lufs=-17.0).abs().max()
        / normalize_loudness(_sine(2.0, 0.5)).abs().max()
    )
    assert ratio.item() == pytest.approx(10 ** (6 / 20), rel=1e-5)


def test_a_pause_does_not_count() -> None:
    voice_S = _sine(2.0, 0.5)
    paused_S = normalize_loudness(torch.cat([voice_S, torch.zeros(64_000)]))
    # Only the gating blocks across the edge tell the two apart.
    assert paused_S.abs().max().item() == pytest.approx(
        normalize_loudness(voice_S).abs().max().item(), rel=0.1
    )


@pytest.mark.parametrize(
    "waveform_S",
    [torch.zeros(48_000), 1e-6 * _sine(2.0, 1.0), _sine(0.399, 0.5), _sine(1 / 16_000, 1.0)],
    ids=["silence", "under the gate", "under 0.4 s", "one sample"],
)
def test_what_has_no_loudness_passes_unchanged(waveform_S: torch.Tensor) -> None:
    assert torch.equal(normalize_loudness(waveform_S), waveform_S)


def test_the_loudness_of_a_sine_is_told() -> None:
    assert measure_loudness(_sine(2.0, 1.0)) == pytest.approx(-3.01, abs=TOLERANCE)
    assert measure_loudness(_sine(2.0, 0.1)) == pytest.approx(-23.01, abs=TOLERANCE)
    assert measure_loudness(torch.zeros(32_000)) is None
    assert measure_loudness(_sine(0.3, 1.0)) is None


@pytest.mark.slow
@given(
    sample_rate=st.sampled_from([8_000, 16_000, 22_050, 44_101]),
    hundredths=st.integers(1, 300),
    more=st.integers(0, 40),
    decibels=st.integers(-80, 10),
    lengths=st.lists(st.integers(1, 20_000), min_size=1, max_size=5),
)
def test_block_by_block_it_is_what_pyloudnorm_measures(
    sample_rate: int, hundredths: int, more: int, decibels: int, lengths: list[int]
) -> None:
    num_samples = sample_rate * hundredths // 100 + more
    waveform_S = torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))
    waveform_S *= 10 ** (decibels / 20)
    waveform_S[num_samples // 3 : num_samples // 2] *= 1e-3  # a pause
    meter, start = LoudnessMeter(sample_rate), 0
    while start < num_samples:
        for length in lengths:
            meter.add(waveform_S[start : start + length])
            start += length
    if num_samples < 0.4 * sample_rate:
        assert meter.measure() is None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of pyloudnorm, about silence
        lufs = Meter(sample_rate).integrated_loudness(waveform_S.double().numpy())
    expected = pytest.approx(lufs, abs=1e-9) if math.isfinite(lufs) else None
    assert meter.measure() == expected
    assert measure_loudness(waveform_S, sample_rate) == meter.measure()  # to the last bit
