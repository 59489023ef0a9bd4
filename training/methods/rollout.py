"""Rollout of a student: clean latents from noise, with a gradient through the last step alone.

Backward simulation in DMD and the full rollout of the adversarial method are the same procedure:
steps without gradient, then one step with gradient. DMD stops at a randomly drawn step, the
adversarial method at the end of the schedule.

Axes: B batch, C channels, F latent frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from training.models.batch import Batch
from training.models.networks import predict_denoised
from turbotalk_core.sampling.steps import renoise_step


def draw_exit(num_steps: int, generator: torch.Generator) -> int:
    """Draw the step at which a rollout ends.

    Args:
        num_steps: number of the student's steps.
        generator: random stream that is the same on all ranks. Ranks with different numbers of
            network calls would wait for each other for ever.

    Returns:
        An index, uniform in 0 .. num_steps - 1.

    Source: Self-Forcing [read].
    """
    return int(torch.randint(num_steps, (), generator=generator))


@torch.no_grad()
def denoise_no_grad(
    model: Callable[..., Tensor],
    sigmas: Sequence[float],
    batch: Batch,
    noise_BCFHW: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Denoise from noise to the last of the given noise levels, Eq. 4, without gradient (Eq. 5).

    Args:
        model: a ``TalkingModel``; called once per level but the last.
        sigmas: noise levels, descending from 1, without the final 0.
        batch: conditions, and the given latent frames, which are clean at every level.
        noise_BCFHW: standard normal noise.
        generator: random stream for the fresh noise of each step.

    Returns:
        Latents at the last level, the shape of the noise.

    Source: Eq. 4-5 [read: TurboTalk's words]; fresh noise at each step [inferred: Self-Forcing,
    FlashTalk].
    """
    # Given frames are pinned before and after every call: in training they are clean at every noise
    # level, and an update would otherwise move or renoise them.
    latents = batch.pin(noise_BCFHW)
    for sigma, next_sigma in pairwise(sigmas):
        velocity = model(latents, _fill(sigma, batch), batch)
        # To the clean estimate and back to the next level with fresh noise, not along the ODE: a
        # few-step student is trained to predict clean samples at each level from such inputs, and
        # fresh noise overwrites the errors of the step before instead of carrying them on. The step
        # is the sampler's own; it waits for the device once, when it copies the noise.
        latents = batch.pin(renoise_step(latents, velocity, sigma, next_sigma, generator))
    return latents


def last_step(
    model: Callable[..., Tensor], latents_BCFHW: Tensor, sigma: float, batch: Batch
) -> Tensor:
    """Predict clean latents from those at the last noise level: the step with a gradient.

    Args:
        model: a ``TalkingModel``, or the engine around a trained one.
        latents_BCFHW: latents at the last level, from ``denoise_no_grad``.
        sigma: their noise level.
        batch: conditions, and the given latent frames.

    Returns:
        Clean latents, the same shape; the given frames are put in and pass no gradient.
    """
    return predict_denoised(model, latents_BCFHW, _fill(sigma, batch), batch)


def _fill(sigma: float, batch: Batch) -> Tensor:
    return torch.full((batch.size,), sigma, device=batch.latents_BCFHW.device)
