"""Loudness against the closed form of ITU-R BS.1770-4: a full-scale 997 Hz sine is -3.01 LKFS."""

import math

import pytest
import torch

from turbotalk_core.audio.loudness import measure_loudness, normalize_loudness

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
