"""Pushing a prediction away from what the network would say without text, or without the voice.

Four predictions are told apart by what the network is given:

    c: text and voice    d: null text and voice    a: text and null voice    n: neither

With scales T for the text and A for the voice, v = c + (A - 1) (c - a) where T is 1, else
v = c + (T - 1) (c - d) + (A - 1) (d - n). Null voice is the tokens that the adapter makes of
windows full of zeros; they are not zero. Source: InfiniteTalk, wan/multitalk.py.

Axes: B batch, C channels, F latent frames, H height, W width, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ports import Denoiser
from ..types import AudioTokens, Conditioning

APG_MOMENTUM = -0.75  # InfiniteTalk, wan/multitalk.py: of both pushes
APG_LIMIT = 55.0  # InfiniteTalk, wan/multitalk.py: largest norm of a push


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How hard to push, and away from what.

    Attributes:
        guidance_scale: push towards the text, >= 0; 1 is off.
        audio_guidance_scale: push towards the voice, >= 0; 1 is off.
        null_text_BND: embedding of the negative prompt, or None for the null text (all zeros).
        null_tokens: tokens of no voice.
        uses_apg: shape each push by an ``AdaptivePush``.
    """

    guidance_scale: float
    audio_guidance_scale: float
    null_tokens: AudioTokens
    null_text_BND: Tensor | None = None
    uses_apg: bool = False


class AdaptivePush:
    """Adaptive projected guidance of one push, through the steps of one chunk.

    Each push is lessened by three quarters of the one before, cut to a largest norm, and loses the
    part that only makes the prediction stronger, which is what oversaturates.

    Source: Sadat et al., Eliminating Oversaturation and Artifacts of High Guidance Scales (2024).
    """

    def __init__(self) -> None:
        """Begin a chunk."""
        self._average_BCFHW: Tensor | None = None

    def __call__(self, push_BCFHW: Tensor, prediction_BCFHW: Tensor) -> Tensor:
        """Shape a push.

        Args:
            push_BCFHW: from one prediction of the network to another.
            prediction_BCFHW: the prediction that is pushed.

        Returns:
            The push to make instead, at right angles to the prediction.
        """
        if self._average_BCFHW is not None:
            push_BCFHW = push_BCFHW + APG_MOMENTUM * self._average_BCFHW
        self._average_BCFHW = push_BCFHW
        push = push_BCFHW.flatten(1)
        push = push * (APG_LIMIT / push.norm(dim=1, keepdim=True)).clamp_max(1)
        # In double precision: the part taken away is nearly all of a push at low noise.
        along = torch.nn.functional.normalize(prediction_BCFHW.flatten(1).double(), dim=1)
        push = push.double()
        across = push - (push * along).sum(1, keepdim=True) * along
        return across.view_as(push_BCFHW).to(push_BCFHW.dtype)


def keep_push(push_BCFHW: Tensor, prediction_BCFHW: Tensor) -> Tensor:
    """Leave a push as it is: guidance without APG."""
    return push_BCFHW


Pushes = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""What shapes the push towards the text, and the one towards the voice, before they are made."""


def begin_pushes(guidance: Guidance) -> Pushes:
    """Give what shapes the pushes of one chunk."""
    return (AdaptivePush(), AdaptivePush()) if guidance.uses_apg else (keep_push, keep_push)


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
    pushes: Pushes = (keep_push, keep_push),
) -> Tensor:
    """Predict the velocity, guided.

    Args:
        denoiser: called ``count_calls`` times.
        latents_BCFHW: at noise level sigma.
        sigma: in (0, 1].
        conditioning: with the text.
        tokens: of the voice.
        guidance: scales and null inputs.
        pushes: of ``begin_pushes``, the same through all steps of a chunk.

    Returns:
        Velocity, the shape of the latents.
    """
    null_conditioning = replace(conditioning, text_BND=guidance.null_text_BND)

    def predict(reads: bool, hears: bool) -> Tensor:
        told = conditioning if reads else null_conditioning
        return denoiser(latents_BCFHW, sigma, told, tokens if hears else guidance.null_tokens)

    return guide(predict, guidance.guidance_scale, guidance.audio_guidance_scale, pushes)


def guide(
    predict: Callable[[bool, bool], Tensor],
    guidance_scale: float,
    audio_guidance_scale: float,
    pushes: Pushes = (keep_push, keep_push),
) -> Tensor:
    """Combine what a network says with and without text and voice.

    Args:
        predict: a network call, told whether it reads the text and whether it hears the voice;
            called ``count_calls`` times.
        guidance_scale: push towards the text, >= 0; 1 is off.
        audio_guidance_scale: push towards the voice, >= 0; 1 is off.
        pushes: shape the pushes.

    Returns:
        The guided prediction.
    """
    text_audio = predict(True, True)
    num_calls = count_calls(guidance_scale, audio_guidance_scale)
    if num_calls == 1:
        return text_audio
    shape_text, shape_audio = pushes
    if num_calls == 2:
        to_audio = shape_audio(text_audio - predict(True, False), text_audio)
        return text_audio + (audio_guidance_scale - 1) * to_audio
    audio_only = predict(False, True)
    neither = predict(False, False)
    to_text = shape_text(text_audio - audio_only, text_audio)
    to_audio = shape_audio(audio_only - neither, text_audio)
    return text_audio + (guidance_scale - 1) * to_text + (audio_guidance_scale - 1) * to_audio
