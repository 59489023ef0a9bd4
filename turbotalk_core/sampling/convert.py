"""The three predictions at a noise level, and what each is in terms of the others.

Flow matching's straight path: noisy = (1 - sigma) * denoised + sigma * noise, and
velocity = noise - denoised. Sigma is a number in [0, 1], or a tensor that broadcasts.
Source: Wan 2.1; TurboTalk section 3.
"""

from __future__ import annotations

from torch import Tensor


def add_noise(denoised: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Go to a noise level: (1 - sigma) * denoised + sigma * noise."""
    return (1 - sigma) * denoised + sigma * noise


def denoised_from_velocity(noisy: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """Go all the way to sigma 0: noisy - sigma * velocity."""
    return noisy - sigma * velocity


def noise_from_velocity(noisy: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """Go all the way to sigma 1: noisy + (1 - sigma) * velocity."""
    return noisy + (1 - sigma) * velocity


def velocity_from_denoised(noisy: Tensor, denoised: Tensor, sigma: float | Tensor) -> Tensor:
    """Give the slope of the path to a prediction: (noisy - denoised) / sigma, for sigma > 0."""
    return (noisy - denoised) / sigma
