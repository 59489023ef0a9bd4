"""The sampler on data whose velocity is known in closed form.

Toy: every latent value is independent and normal, N(MEAN, SPREAD^2), so at noise level s the best
prediction of the clean value is E[x0 | x] = m + g (x - (1 - s) m) with
g = (1 - s) d^2 / ((1 - s)^2 d^2 + s^2), and the probability flow carries the noise z to m + d z.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from turbotalk_core.errors import MismatchError
from turbotalk_core.request import Update
from turbotalk_core.sampling.guidance import Guidance
from turbotalk_core.sampling.sampler import sample
from turbotalk_core.sampling.schedule import distilled_sigmas, reference_sigmas
from turbotalk_core.types import AudioTokens, Conditioning

MEAN = 0.5
SHAPE = (1, 16, 4, 2, 2)
NO_MOTION = torch.zeros(1, 16, 0, 2, 2)
TOKENS = AudioTokens(tokens_FND=torch.zeros(4, 1, 1))


class Gaussian:
    """Ideal network for N(MEAN, spread^2); records its inputs."""

    def __init__(self, spread: float) -> None:
        self.spread = spread
        self.seen: list[Tensor] = []
        self.sigmas: list[float] = []

    def gain(self, sigma: float) -> float:
        variance = self.spread**2
        return (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)

    def __call__(
        self, latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> Tensor:
        self.seen.append(latents_BCFHW)
        self.sigmas.append(sigma)
        denoised = MEAN + self.gain(sigma) * (latents_BCFHW - (1 - sigma) * MEAN)
        return (latents_BCFHW - denoised) / sigma


class Counter:
    """Counter of units that stops before a given call."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.units = 0
        self.asked = 0
        self.stop_before = stop_before

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        self.units += units

    def check_stop(self) -> None:
        if self.asked == self.stop_before:
            raise InterruptedError
        self.asked += 1


def _noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def _sample(
    denoiser: Any, sigmas: Tensor, *, counter: Counter | None = None, **changed: Any
) -> Tensor:
    counter = counter or Counter()
    settings: dict[str, Any] = {
        "conditioning": Conditioning(reference_BCFHW=torch.zeros(1, 20, 4, 2, 2)),
        "tokens": TOKENS,
        "guidance": Guidance(guidance_scale=1, audio_guidance_scale=1, null_tokens=TOKENS),
        "update": "euler",
        "motion_latents_BCFHW": NO_MOTION,
        "generator": torch.Generator().manual_seed(1),
        "progress": counter,
        "check_stop": counter.check_stop,
    }
    return sample(denoiser, _noise(), sigmas, **(settings | changed))


@pytest.mark.parametrize("update", ["euler", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_one_possible_picture_is_found_in_any_number_of_steps(update: Update, steps: int) -> None:
    latents = _sample(Gaussian(0), distilled_sigmas(steps, 5), update=update)
    torch.testing.assert_close(latents, torch.full(SHAPE, MEAN), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("update", ["euler", "renoise"])
def test_one_step_from_pure_noise_is_the_prediction(update: Update) -> None:
    # At sigma 1 the network knows nothing of the picture, so the prediction is the mean.
    latents = _sample(Gaussian(0.7), torch.tensor([1.0, 0.0]), update=update)
    torch.testing.assert_close(latents, torch.full(SHAPE, MEAN), rtol=1e-5, atol=1e-5)


def test_euler_follows_the_flow_to_first_order() -> None:
    exact = MEAN + 0.7 * _noise()
    errors = [
        (_sample(Gaussian(0.7), torch.linspace(1, 0, steps + 1)) - exact).abs().max().item()
        for steps in (50, 100, 200)
    ]
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert 1.8 < coarse / fine < 2.2


def test_renoise_is_its_recursion() -> None:
    denoiser = Gaussian(0.7)
    sigmas = distilled_sigmas(3, 5)
    latents = _sample(denoiser, sigmas, update="renoise")
    generator = torch.Generator().manual_seed(1)
    expected = _noise()
    for sigma, next_sigma in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        expected = MEAN + denoiser.gain(sigma) * (expected - (1 - sigma) * MEAN)
        if next_sigma:
            fresh = torch.randn(SHAPE, generator=generator)
            expected = (1 - next_sigma) * expected + next_sigma * fresh
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_the_network_is_told_each_level_once() -> None:
    denoiser = Gaussian(0.7)
    sigmas = reference_sigmas(6, 7)
    _sample(denoiser, sigmas)
    assert denoiser.sigmas == sigmas[:-1].tolist()


@pytest.mark.parametrize("update", ["euler", "renoise"])
@pytest.mark.parametrize("num_pinned", [1, 3])
def test_motion_latents_are_clean_in_every_call_and_at_the_end(
    update: Update, num_pinned: int
) -> None:
    motion = _noise(5)[:, :, :num_pinned]
    denoiser = Gaussian(0.7)
    latents = _sample(denoiser, distilled_sigmas(4, 5), update=update, motion_latents_BCFHW=motion)
    assert len(denoiser.seen) == 4
    for shown in (*denoiser.seen, latents):
        assert torch.equal(shown[:, :, :num_pinned], motion)
    free = _sample(Gaussian(0.7), distilled_sigmas(4, 5), update=update)
    assert torch.equal(latents[:, :, num_pinned:], free[:, :, num_pinned:])


def test_motion_latents_may_come_in_another_dtype() -> None:
    motion = _noise(5)[:, :, :1]
    latents = _sample(Gaussian(0.7), distilled_sigmas(2, 5), motion_latents_BCFHW=motion.bfloat16())
    assert latents.dtype == torch.float32
    assert torch.equal(latents[:, :, :1], motion.bfloat16().float())


def test_the_given_noise_is_left_alone() -> None:
    noise = _noise()
    before = noise.clone()
    counter = Counter()
    sample(
        Gaussian(0.7),
        noise,
        distilled_sigmas(2, 5),
        conditioning=Conditioning(reference_BCFHW=torch.zeros(1, 20, 4, 2, 2)),
        tokens=TOKENS,
        guidance=Guidance(guidance_scale=1, audio_guidance_scale=1, null_tokens=TOKENS),
        update="euler",
        motion_latents_BCFHW=_noise(5)[:, :, :1],
        generator=torch.Generator(),
        progress=counter,
        check_stop=counter.check_stop,
    )
    assert torch.equal(noise, before)


@pytest.mark.parametrize(("scales", "calls"), [((1, 1), 1), ((1, 4), 2), ((5, 4), 3)])
def test_each_network_call_is_one_unit_of_work(scales: tuple[int, int], calls: int) -> None:
    counter, denoiser = Counter(), Gaussian(0.7)
    guidance = Guidance(
        guidance_scale=scales[0], audio_guidance_scale=scales[1], null_tokens=TOKENS
    )
    _sample(denoiser, distilled_sigmas(4, 5), counter=counter, guidance=guidance)
    assert counter.units == counter.asked == len(denoiser.seen) == 4 * calls


@pytest.mark.parametrize("stop_before", [0, 1, 4])
def test_a_stop_between_two_calls_lets_no_later_one_run(stop_before: int) -> None:
    counter, denoiser = Counter(stop_before), Gaussian(0.7)
    guidance = Guidance(guidance_scale=1, audio_guidance_scale=4, null_tokens=TOKENS)
    with pytest.raises(InterruptedError):
        _sample(denoiser, distilled_sigmas(4, 5), counter=counter, guidance=guidance)
    assert len(denoiser.seen) == counter.units == stop_before


@pytest.mark.parametrize("shape", [(1, 16, 4, 2, 2), (1, 16, 1, 4, 2), (1, 8, 1, 2, 2)])
def test_motion_latents_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match="motion latents of shape"):
        _sample(Gaussian(0.7), distilled_sigmas(1, 5), motion_latents_BCFHW=torch.zeros(shape))
