"""Rollouts: the sampler's steps, and a gradient through the last one alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.training.tiny_networks import make_batch, make_model
from training.engine.rng import Draws
from training.methods.rollout import denoise_no_grad, draw_exit, last_step
from training.methods.timesteps import even_timesteps, to_sigmas
from training.models.batch import Batch
from turbotalk_core.models.denoiser import ProjectionAdapter, WanDenoiser
from turbotalk_core.protocols import Progress
from turbotalk_core.sampling.guidance import Guidance
from turbotalk_core.sampling.sampler import sample
from turbotalk_core.sampling.schedule import distilled_sigmas
from turbotalk_core.types import AudioWindows, Conditioning

SIGMAS = to_sigmas(even_timesteps(4), 5.0)


class Uncounted(Progress):
    """Progress callback that does nothing."""

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        del units, preview_HWC


class Factor(torch.nn.Module):
    """Network that multiplies its input by its weight, and counts its calls."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.calls: list[tuple[float, bool]] = []

    def forward(self, noisy_BCFHW: Tensor, sigma_B: Tensor, batch: Batch) -> Tensor:
        self.calls.append((sigma_B[0].item(), torch.is_grad_enabled()))
        for i in range(batch.size):
            num_pinned = int(batch.pinned_BF[i].sum())
            given = batch.latents_BCFHW[i, :, :num_pinned]
            assert torch.equal(noisy_BCFHW[i, :, :num_pinned], given)
        return self.weight * noisy_BCFHW


def _draw_noise(batch: Batch) -> Tensor:
    return torch.randn(batch.latents_BCFHW.shape, generator=torch.Generator().manual_seed(5))


def _roll(model: torch.nn.Module, sigmas: list[float], batch: Batch) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    noisy = denoise_no_grad(model, sigmas, batch, _draw_noise(batch), generator)
    return last_step(model, noisy, sigmas[-1], batch)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_rollout_is_what_the_sampler_makes(num_steps: int) -> None:
    model, batch = make_model(), make_batch(1, num_pinned=(1,))
    windows = AudioWindows(first_KLD=batch.first_BPKLD[0, 0], later_FKLD=batch.later_BPFKLD[0, 0])
    tokens = ProjectionAdapter(model.projection)(windows)
    expected = sample(
        WanDenoiser(model.dit),
        _draw_noise(batch),
        distilled_sigmas(num_steps, 5.0),
        conditioning=Conditioning(reference_BCFHW=batch.reference_BCFHW, text_BND=batch.text_BND),
        tokens=tokens,
        guidance=Guidance(guidance_scale=1, audio_guidance_scale=1, null_tokens=tokens),
        update="renoise",
        motion_latents_BCFHW=batch.latents_BCFHW[:, :, :1],
        generator=torch.Generator().manual_seed(7),
        progress=Uncounted(),
        check_stop=lambda: None,
    )
    with torch.no_grad():
        rolled = _roll(model, to_sigmas(even_timesteps(num_steps), 5.0), batch)
    torch.testing.assert_close(rolled, expected, rtol=1e-4, atol=1e-5)


def test_the_last_step_alone_has_a_gradient() -> None:
    model, batch = Factor(0.5), make_batch()
    result = _roll(model, SIGMAS, batch)
    assert model.calls == [(sigma, sigma == SIGMAS[-1]) for sigma in SIGMAS]
    result.sum().backward()
    # x0 = x - sigma w x: with x held, d x0 / d w = -sigma x, for what is not given.
    with torch.no_grad():
        noisy = denoise_no_grad(
            model, SIGMAS, batch, _draw_noise(batch), torch.Generator().manual_seed(7)
        )
    expected = -SIGMAS[-1] * (noisy * batch.free_B1F11).sum()
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, expected)


def test_given_latents_are_clean_from_the_first_call_to_the_result() -> None:
    batch = make_batch()
    result = _roll(Factor(0.5), SIGMAS, batch)
    assert torch.equal(result[0, :, :1], batch.latents_BCFHW[0, :, :1])
    assert torch.equal(result[1, :, :3], batch.latents_BCFHW[1, :, :3])
    assert not torch.isclose(result[0, :, 1:], batch.latents_BCFHW[0, :, 1:]).any()


def test_one_step_is_noise_minus_velocity() -> None:
    batch, noise = make_batch(), _draw_noise(make_batch())
    result = _roll(Factor(0.25), [1.0], batch)
    torch.testing.assert_close(result, batch.pin(0.75 * noise))


def test_all_ranks_end_at_the_same_step_and_every_step_is_drawn() -> None:
    exits = []
    for step in range(200):
        drawn = {draw_exit(4, Draws(0, step, slot).shared("exit step")) for slot in range(8)}
        assert len(drawn) == 1
        exits += drawn
    assert {exits.count(index) // 30 for index in range(4)} == {1}


def test_ranks_draw_other_noise() -> None:
    batch = make_batch()
    results = []
    for slot in range(2):
        draws = Draws(0, 0, slot)
        with torch.no_grad():
            noisy = denoise_no_grad(
                Factor(0.5), SIGMAS, batch, _draw_noise(batch), draws.own("renoise")
            )
        results.append(noisy)
    assert not torch.isclose(*results)[0, :, 1:].any()
