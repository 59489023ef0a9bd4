"""Pushing a prediction away from what the network would say without text, or without the voice.

Four predictions are told apart by what the network is given:

    c: text and voice    d: null text and voice    a: text and null voice    n: neither

With scales T for the text and A for the voice, v = a + A (c - a) where T is 1, else
v = n + T (c - d) + A (d - n). Null voice is the tokens that the adapter makes of windows full of
zeros; they are not zero. Source: InfiniteTalk, wan/multitalk.py.

Axes: B batch, C channels, F latent frames, H height, W width, N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..ports import Denoiser
from ..types import AudioTokens, Conditioning


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How hard to push, and away from what.

    Attributes:
        guidance_scale: push towards the text, >= 0; 1 is off.
        audio_guidance_scale: push towards the voice, >= 0; 1 is off.
        null_text_BND: embedding of the negative prompt, or None for the null text (all zeros).
        null_tokens: tokens of no voice.
    """

    guidance_scale: float
    audio_guidance_scale: float
    null_tokens: AudioTokens
    null_text_BND: Tensor | None = None


def count_calls(guidance_scale: float, audio_guidance_scale: float) -> int:
    """Count the network calls per step that a pair of guidance scales needs.

    Args:
        guidance_scale: 1 is off.
        audio_guidance_scale: 1 is off.

    Returns:
        1 without guidance, 2 with audio guidance alone, 3 with text guidance. With both scales 1
        the reference makes 2 calls, whose combination is exactly the one made here.
    """
    if guidance_scale != 1:
        return 3
    return 1 if audio_guidance_scale == 1 else 2


def guided_velocity(
    denoiser: Denoiser,
    latents_BCFHW: Tensor,
    sigma: float,
    conditioning: Conditioning,
    tokens: AudioTokens,
    guidance: Guidance,
) -> Tensor:
    """Predict the velocity, guided.

    Args:
        denoiser: called ``count_calls`` times.
        latents_BCFHW: at noise level sigma.
        sigma: in (0, 1].
        conditioning: with the text.
        tokens: of the voice.
        guidance: scales and null inputs.

    Returns:
        Velocity, the shape of the latents.
    """
    text_audio = denoiser(latents_BCFHW, sigma, conditioning, tokens)
    num_calls = count_calls(guidance.guidance_scale, guidance.audio_guidance_scale)
    if num_calls == 1:
        return text_audio
    if num_calls == 2:
        text_only = denoiser(latents_BCFHW, sigma, conditioning, guidance.null_tokens)
        return text_only + guidance.audio_guidance_scale * (text_audio - text_only)
    null_conditioning = replace(conditioning, text_BND=guidance.null_text_BND)
    audio_only = denoiser(latents_BCFHW, sigma, null_conditioning, tokens)
    neither = denoiser(latents_BCFHW, sigma, null_conditioning, guidance.null_tokens)
    return (
        neither
        + guidance.guidance_scale * (text_audio - audio_only)
        + guidance.audio_guidance_scale * (audio_only - neither)
    )
