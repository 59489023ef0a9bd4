"""Update rules from the latents at one noise level to those at the next.

Both return exactly the predicted clean latents if the next level is 0.
Axes: B batch, C channels, F latent frames, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .convert import add_noise, denoised_from_velocity


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
