"""The update rules: from the latents at one noise level to those at the next.

Both end exactly at the predicted clean latents when the next level is 0.
Axes: B batch, C channels, F latent frames, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .convert import add_noise, denoised_from_velocity


def euler_step(
    latents_BCFHW: Tensor, velocity_BCFHW: Tensor, sigma: float, next_sigma: float
) -> Tensor:
    """Follow the velocity to the next noise level: x + (sigma' - sigma) v.

    Args:
        latents_BCFHW: at noise level sigma.
        velocity_BCFHW: predicted for them.
        sigma: in (0, 1].
        next_sigma: in [0, sigma).

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
    """Predict the clean latents, then add fresh noise of the next level.

    Args:
        latents_BCFHW: at noise level sigma.
        velocity_BCFHW: predicted for them.
        sigma: in (0, 1].
        next_sigma: in [0, sigma).
        generator: gives one draw of the latents' shape, float32; none when next_sigma is 0.

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
