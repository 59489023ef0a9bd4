"""Conversions between noisy latents, denoised latents, noise and velocity at a noise level.

Flow matching's straight path: noisy = (1 - sigma) * denoised + sigma * noise, and
velocity = noise - denoised, its derivative by sigma. As the path is a straight line, each
quantity follows from two others in closed form. Sigma is a number in [0, 1], or a tensor that
broadcasts.
Source: Wan 2.1; TurboTalk section 3.
"""

from __future__ import annotations

from torch import Tensor


def add_noise(denoised: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Compute the noisy latents at a noise level: (1 - sigma) * denoised + sigma * noise."""
    return (1 - sigma) * denoised + sigma * noise


def denoised_from_velocity(noisy: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """Compute the denoised latents (x0), the path at sigma 0: noisy - sigma * velocity."""
    return noisy - sigma * velocity


def noise_from_velocity(noisy: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """Compute the noise, the path at sigma 1: noisy + (1 - sigma) * velocity."""
    return noisy + (1 - sigma) * velocity


def velocity_from_denoised(noisy: Tensor, denoised: Tensor, sigma: float | Tensor) -> Tensor:
    """Compute the velocity of the path to a prediction: (noisy - denoised) / sigma, sigma > 0."""
    return (noisy - denoised) / sigma
