"""The straight path between noise and latents, and update rules against their formulas."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.sampling.steps import (
    add_noise,
    denoised_from_velocity,
    euler_step,
    renoise_step,
)

SHAPE = (1, 16, 2, 2, 2)
SIGMAS = st.floats(0.01, 1)
SEEDS = st.integers(0, 2**32)


def _draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def _draw_pair(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)


@given(sigma=SIGMAS, seed=SEEDS)
def test_the_true_velocity_leads_to_the_clean_latents(sigma: float, seed: int) -> None:
    denoised, noise = _draw_pair(seed)
    noisy = add_noise(denoised, noise, sigma)
    torch.testing.assert_close(denoised_from_velocity(noisy, noise - denoised, sigma), denoised)
    torch.testing.assert_close((noisy - denoised) / sigma, noise - denoised)
    torch.testing.assert_close(noisy + (1 - sigma) * (noise - denoised), noise)


@given(sigma=SIGMAS, seed=SEEDS)
def test_any_velocity_survives_the_round_trip(sigma: float, seed: int) -> None:
    noisy, velocity = _draw_pair(seed)
    denoised = denoised_from_velocity(noisy, velocity, sigma)
    torch.testing.assert_close((noisy - denoised) / sigma, velocity)
    noise = denoised + velocity
    torch.testing.assert_close(add_noise(denoised, noise, sigma), noisy)


def test_sigma_may_differ_within_a_batch() -> None:
    denoised, noise = torch.zeros(2, 3), torch.ones(2, 3)
    noisy = add_noise(denoised, noise, torch.tensor([[0.25], [1.0]]))
    assert noisy.tolist() == [[0.25] * 3, [1.0] * 3]


@given(sigma=st.floats(0.1, 1), part=st.floats(0, 0.99))
def test_euler_stays_on_the_straight_path(sigma: float, part: float) -> None:
    denoised, noise = _draw(0), _draw(1)
    next_sigma = part * sigma
    stepped = euler_step(add_noise(denoised, noise, sigma), noise - denoised, sigma, next_sigma)
    torch.testing.assert_close(
        stepped, add_noise(denoised, noise, next_sigma), rtol=1e-5, atol=1e-5
    )


def test_renoise_joins_the_prediction_with_one_fresh_draw() -> None:
    latents, velocity = _draw(0), _draw(1)
    stepped = renoise_step(latents, velocity, 0.8, 0.3, torch.Generator().manual_seed(9))
    denoised = denoised_from_velocity(latents, velocity, 0.8)
    assert torch.equal(stepped, add_noise(denoised, _draw(9), 0.3))


def test_both_end_at_the_prediction_and_draw_nothing_then() -> None:
    latents, velocity = _draw(0), _draw(1)
    generator = torch.Generator().manual_seed(9)
    untouched = generator.get_state()
    denoised = denoised_from_velocity(latents, velocity, 0.6)
    assert torch.equal(renoise_step(latents, velocity, 0.6, 0, generator), denoised)
    assert torch.equal(generator.get_state(), untouched)
    torch.testing.assert_close(euler_step(latents, velocity, 0.6, 0), denoised)
