"""Conversions between predictions, which all describe the same straight path."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.sampling.convert import (
    add_noise,
    denoised_from_velocity,
    noise_from_velocity,
    velocity_from_denoised,
)

SIGMAS = st.floats(0.01, 1)
SEEDS = st.integers(0, 2**32)


@given(sigma=SIGMAS, seed=SEEDS)
def test_the_true_velocity_leads_to_both_ends(sigma: float, seed: int) -> None:
    denoised, noise = torch.randn(
        2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    noisy = add_noise(denoised, noise, sigma)
    torch.testing.assert_close(denoised_from_velocity(noisy, noise - denoised, sigma), denoised)
    torch.testing.assert_close(noise_from_velocity(noisy, noise - denoised, sigma), noise)
    torch.testing.assert_close(velocity_from_denoised(noisy, denoised, sigma), noise - denoised)


@given(sigma=SIGMAS, seed=SEEDS)
def test_any_velocity_survives_the_round_trip(sigma: float, seed: int) -> None:
    noisy, velocity = torch.randn(
        2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    denoised = denoised_from_velocity(noisy, velocity, sigma)
    noise = noise_from_velocity(noisy, velocity, sigma)
    torch.testing.assert_close(velocity_from_denoised(noisy, denoised, sigma), velocity)
    torch.testing.assert_close(add_noise(denoised, noise, sigma), noisy)


def test_sigma_may_differ_within_a_batch() -> None:
    denoised, noise = torch.zeros(2, 3), torch.ones(2, 3)
    noisy = add_noise(denoised, noise, torch.tensor([[0.25], [1.0]]))
    assert noisy.tolist() == [[0.25] * 3, [1.0] * 3]
