"""Classifier-free guidance for text and audio, with optional adaptive projection (APG).

There are four predictions, one for each combination of the network's inputs:

    c: text and audio    d: null text and audio    a: text and null audio    n: both null

With scales T for the text and A for the audio, v = c + (A - 1) (c - a) if T is 1, else
v = c + (T - 1) (c - d) + (A - 1) (d - n). Each difference (a "push") is the effect of one
condition: a scale above 1 extrapolates along it, and 1 leaves it as predicted.
Null audio is the audio tokens of windows of zeros; the tokens themselves are not zero.
Source: InfiniteTalk, wan/multitalk.py.

Axes: B batch, C channels, F latent frames, H height, W width, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..protocols import Denoiser
from ..types import AudioTokens, Conditioning

APG_MOMENTUM = -0.75  # InfiniteTalk, wan/multitalk.py: for both pushes
APG_LIMIT = 55.0  # InfiniteTalk, wan/multitalk.py: largest L2 norm of a push


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """Guidance scales and null inputs.

    Attributes:
        guidance_scale: text guidance scale, >= 0; 1 is off.
        audio_guidance_scale: audio guidance scale, >= 0; 1 is off.
        null_text_BND: embedding of the negative prompt, or None for the null text (all zeros).
        null_tokens: audio tokens of null audio.
        uses_apg: whether each push is shaped by an ``AdaptivePush``.
    """

    guidance_scale: float
    audio_guidance_scale: float
    null_tokens: AudioTokens
    null_text_BND: Tensor | None = None
    uses_apg: bool = False


class AdaptivePush:
    """Adaptive projected guidance (APG) of one push through the steps of one chunk.

    A push is the difference of two predictions. Three operations are applied to it in turn:

    1. Reverse momentum: 0.75 times the result of this operation in the step before is subtracted,
       so that a direction that persists from step to step counts less.
    2. Rescaling: the norm is limited to ``APG_LIMIT``.
    3. Projection: the component parallel to the prediction is removed. That component only
       scales the prediction up, which causes oversaturation.

    Source: Sadat et al., Eliminating Oversaturation and Artifacts of High Guidance Scales (2024).
    """

    def __init__(self) -> None:
        """Start without momentum, as a chunk does."""
        self._average_BCFHW: Tensor | None = None

    def __call__(self, push_BCFHW: Tensor, prediction_BCFHW: Tensor) -> Tensor:
        """Shape a push.

        Args:
            push_BCFHW: difference of two predictions of the network.
            prediction_BCFHW: the prediction that the push will be added to.

        Returns:
            The shaped push, orthogonal to the prediction, in the shape and dtype of ``push_BCFHW``.
        """
        if self._average_BCFHW is not None:
            push_BCFHW = push_BCFHW + APG_MOMENTUM * self._average_BCFHW
        self._average_BCFHW = push_BCFHW
        push = push_BCFHW.flatten(1)
        push = push * (APG_LIMIT / push.norm(dim=1, keepdim=True)).clamp_max(1)
        # In float64: at low noise the removed component is nearly all of the push, so the rest is
        # a small difference of large numbers.
        along = torch.nn.functional.normalize(prediction_BCFHW.flatten(1).double(), dim=1)
        push = push.double()
        across = push - (push * along).sum(1, keepdim=True) * along
        return across.view_as(push_BCFHW).to(push_BCFHW.dtype)


def keep_push(push_BCFHW: Tensor, prediction_BCFHW: Tensor) -> Tensor:
    """Return a push unchanged: guidance without APG."""
    return push_BCFHW


Pushes = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""Functions that shape the text push and the audio push before they are added."""


def begin_pushes(guidance: Guidance) -> Pushes:
    """Return the functions that shape the pushes of one chunk, with fresh state if APG is on."""
    return (AdaptivePush(), AdaptivePush()) if guidance.uses_apg else (keep_push, keep_push)


def count_calls(guidance_scale: float, audio_guidance_scale: float) -> int:
    """Return the number of network calls per step for a pair of guidance scales.

    Args:
        guidance_scale: text guidance scale; 1 is off.
        audio_guidance_scale: audio guidance scale; 1 is off.

    Returns:
        1 without guidance, 2 with audio guidance alone, 3 with text guidance. With both scales at
        1 the reference makes 2 calls; their combination equals the one call made here.
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
    """Predict the velocity with guidance.

    Args:
        denoiser: the network; called ``count_calls`` times.
        latents_BCFHW: latents at noise level sigma.
        sigma: noise level, in (0, 1].
        conditioning: the conditioning, with the text.
        tokens: audio tokens of the voice.
        guidance: scales and null inputs.
        pushes: result of ``begin_pushes``; the same through all steps of a chunk, as APG keeps its
            momentum there.

    Returns:
        Guided velocity, in the shape of the latents.
    """
    null_conditioning = replace(conditioning, text_BND=guidance.null_text_BND)

    def predict(with_text: bool, with_audio: bool) -> Tensor:
        inputs = conditioning if with_text else null_conditioning
        return denoiser(
            latents_BCFHW, sigma, inputs, tokens if with_audio else guidance.null_tokens
        )

    return guide(predict, guidance.guidance_scale, guidance.audio_guidance_scale, pushes)


def guide(
    predict: Callable[[bool, bool], Tensor],
    guidance_scale: float,
    audio_guidance_scale: float,
    pushes: Pushes = (keep_push, keep_push),
) -> Tensor:
    """Combine a network's predictions with and without text and audio.

    Args:
        predict: a network call; its arguments are whether the text and whether the voice are
            among the inputs, instead of the null ones. Called ``count_calls`` times.
        guidance_scale: text guidance scale, >= 0; 1 is off.
        audio_guidance_scale: audio guidance scale, >= 0; 1 is off.
        pushes: functions that shape the text push and the audio push.

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
