"""Update rules on one step, against their formulas."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.sampling.convert import add_noise, denoised_from_velocity
from turbotalk_core.sampling.steps import euler_step, renoise_step

SHAPE = (1, 16, 2, 2, 2)


def _draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


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
