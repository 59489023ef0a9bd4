"""Guidance: the network calls, and their combination."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from turbotalk_core.sampling.guidance import (
    AdaptivePush,
    Guidance,
    begin_pushes,
    count_calls,
    guided_velocity,
    keep_push,
)
from turbotalk_core.types import AudioTokens, Conditioning

TEXT_BND = torch.full((1, 2, 3), 1.0)
NULL_TEXT_BND = torch.zeros(1, 2, 3)
TOKENS = AudioTokens(tokens_FND=torch.full((1, 1, 1), 1.0))
NULL_TOKENS = AudioTokens(tokens_FND=torch.zeros(1, 1, 1))
CONDITIONING = Conditioning(reference_BCFHW=torch.zeros(1, 20, 1, 2, 2), text_BND=TEXT_BND)

# What the toy network says to each pair of inputs; no two combinations of these agree by chance.
ANSWERS = {"c": 3.0, "d": 5.0, "a": 11.0, "n": 17.0}
SCALES = st.floats(0, 10)


class Answers:
    """Network that returns one number per kind of call, and records the kinds."""

    def __init__(self) -> None:
        self.calls = ""

    def __call__(
        self, latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> Tensor:
        assert conditioning.reference_BCFHW is CONDITIONING.reference_BCFHW
        has_text = conditioning.text_BND is TEXT_BND
        assert has_text or conditioning.text_BND is NULL_TEXT_BND
        has_voice = tokens is TOKENS
        assert has_voice or tokens is NULL_TOKENS
        kind = {(True, True): "c", (False, True): "d", (True, False): "a", (False, False): "n"}
        self.calls += kind[has_text, has_voice]
        return torch.full_like(latents_BCFHW, ANSWERS[self.calls[-1]])


def _guide(guidance_scale: float, audio_guidance_scale: float) -> tuple[float, str]:
    denoiser = Answers()
    guidance = Guidance(
        guidance_scale=guidance_scale,
        audio_guidance_scale=audio_guidance_scale,
        null_tokens=NULL_TOKENS,
        null_text_BND=NULL_TEXT_BND,
    )
    velocity = guided_velocity(
        denoiser, torch.zeros(1, 16, 1, 2, 2), 0.5, CONDITIONING, TOKENS, guidance
    )
    assert velocity.unique().numel() == 1
    return velocity.flatten()[0].item(), denoiser.calls


def test_without_guidance_one_call() -> None:
    assert _guide(1, 1) == (ANSWERS["c"], "c")


@given(audio_guidance_scale=SCALES.filter(lambda scale: scale != 1))
def test_audio_guidance_two_calls(audio_guidance_scale: float) -> None:
    velocity, calls = _guide(1, audio_guidance_scale)
    a, c = ANSWERS["a"], ANSWERS["c"]
    assert sorted(calls) == ["a", "c"]
    assert velocity == pytest.approx(a + audio_guidance_scale * (c - a), rel=1e-5, abs=1e-5)


@given(guidance_scale=SCALES.filter(lambda scale: scale != 1), audio_guidance_scale=SCALES)
def test_text_and_audio_guidance_three_calls(
    guidance_scale: float, audio_guidance_scale: float
) -> None:
    velocity, calls = _guide(guidance_scale, audio_guidance_scale)
    c, d, n = (ANSWERS[kind] for kind in "cdn")
    assert sorted(calls) == ["c", "d", "n"]
    expected = n + guidance_scale * (c - d) + audio_guidance_scale * (d - n)
    assert velocity == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(guidance_scale=SCALES | st.just(1.0), audio_guidance_scale=SCALES | st.just(1.0))
def test_calls_are_counted_before_they_are_made(
    guidance_scale: float, audio_guidance_scale: float
) -> None:
    assert count_calls(guidance_scale, audio_guidance_scale) == len(
        _guide(guidance_scale, audio_guidance_scale)[1]
    )


def _push(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_an_adaptive_push_is_at_right_angles_to_the_prediction() -> None:
    push, prediction = _push(1, 16, 2, 4, 4, seed=0), _push(1, 16, 2, 4, 4, seed=1)
    shaped = AdaptivePush()(push, prediction)
    assert shaped.dtype == push.dtype
    assert (shaped * prediction).sum().abs() < 1e-3
    along = (push * prediction).sum() / prediction.square().sum() * prediction
    torch.testing.assert_close(shaped, push - along)


def test_a_push_along_the_prediction_is_none() -> None:
    prediction = _push(1, 16, 2, 4, 4, seed=1)
    assert AdaptivePush()(0.3 * prediction, prediction).abs().max() < 1e-6


def test_a_push_has_a_largest_norm() -> None:
    push, prediction = torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 4, 1, 2, 2)
    push[:, 0], prediction[:, 1] = 1000, 1
    assert AdaptivePush()(push, prediction).norm().item() == pytest.approx(55)
    torch.testing.assert_close(AdaptivePush()(push / 1000, prediction), push / 1000)


def test_a_push_is_lessened_by_the_one_before() -> None:
    push, prediction = torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 4, 1, 2, 2)
    push[:, 0], prediction[:, 1] = 1, 1
    shape = AdaptivePush()
    sizes = [shape(push, prediction)[0, 0].mean().item() for _ in range(3)]
    assert sizes == pytest.approx([1, 1 - 0.75, 1 - 0.75 * (1 - 0.75)])


@pytest.mark.parametrize("scales", [(1.0, 3.0), (5.0, 4.0)])
def test_without_apg_pushes_are_made_as_they_are(scales: tuple[float, float]) -> None:
    guidance = Guidance(
        guidance_scale=scales[0], audio_guidance_scale=scales[1], null_tokens=NULL_TOKENS
    )
    assert begin_pushes(guidance) == (keep_push, keep_push)
    first, second = begin_pushes(replace(guidance, uses_apg=True))
    assert isinstance(first, AdaptivePush)
    assert isinstance(second, AdaptivePush)
    assert first is not second
