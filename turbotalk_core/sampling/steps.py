"""Steps between noise levels: the path of flow matching, and the update rules of sampling.

The path is straight: noisy = (1 - sigma) * denoised + sigma * noise, so that
velocity = noise - denoised. Both update rules end exactly at the predicted clean latents when the
next level is 0.
Axes: B batch, C channels, F latent frames, H height, W width.
Source: Wan 2.1; TurboTalk section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_noise(denoised: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the latents at a noise level: (1 - sigma) * denoised + sigma * noise.

    Args:
        denoised: clean latents, of any shape.
        noise: of the same shape.
        sigma: in [0, 1]; a number, or a tensor that broadcasts.

    Returns:
        Noisy latents.
    """
    return (1 - sigma) * denoised + sigma * noise


def denoised_from_velocity(noisy: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the clean latents that a velocity predicts: noisy - sigma * velocity.

    Args:
        noisy: latents at noise level sigma, of any shape.
        velocity: predicted for them.
        sigma: in [0, 1]; a number, or a tensor that broadcasts.

    Returns:
        Latents at sigma 0.
    """
    return noisy - sigma * velocity


def euler_step(
    latents_BCFHW: Tensor, velocity_BCFHW: Tensor, sigma: float, next_sigma: float
) -> Tensor:
    """Take one Euler step along the velocity: x + (sigma' - sigma) v.

    Args:
        latents_BCFHW: x, latents at noise level sigma.
        velocity_BCFHW: v, the velocity predicted for them.
        sigma: present noise level, in (0, 1].
        next_sigma: sigma', next noise level, in [0, sigma).

    Returns:
        Latents at noise level next_sigma.

    Source: InfiniteTalk, wan/multitalk.py (the update after each call).
    """
    return latents_BCFHW + (next_sigma - sigma) * velocity_BCFHW


def renoise_step(
    latents_BCFHW: Tensor,
    velocity_BCFHW: Tensor,
    sigma: float,
    next_sigma: float,
    generator: torch.Generator,
) -> Tensor:
    """Predict the clean latents, then add fresh noise at the next noise level.

    Unlike an Euler step, which keeps the noise that the latents already contain, this replaces it
    by a new draw. The few-step student was distilled with this update.

    Args:
        latents_BCFHW: latents at noise level sigma.
        velocity_BCFHW: the velocity predicted for them.
        sigma: present noise level, in (0, 1].
        next_sigma: next noise level, in [0, sigma).
        generator: source of the fresh noise: one float32 draw of the latents' shape, or none if
            next_sigma is 0.

    Returns:
        Latents at noise level next_sigma.

    Source: TurboTalk, Eq. 4.
    """
    denoised_BCFHW = denoised_from_velocity(latents_BCFHW, velocity_BCFHW, sigma)
    if next_sigma == 0:
        return denoised_BCFHW
    noise_BCFHW = torch.randn(
        latents_BCFHW.shape, generator=generator, device=generator.device, dtype=torch.float32
    )
    return add_noise(denoised_BCFHW, noise_BCFHW.to(latents_BCFHW), next_sigma)
