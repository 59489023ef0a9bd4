"""Distribution matching: order and losses of updates, and convergence to the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny_networks import make_batch, make_engines, make_model, take_step
from training.engine.engine import EngineSettings, PlainEngine
from training.engine.rng import Draws
from training.methods.dmd import Dmd
from training.methods.method import Learning, draw_noise
from training.methods.rollout import denoise_no_grad, draw_exit, last_step
from training.models.batch import Batch
from training.models.networks import TalkingModel, predict_denoised
from turbotalk_core.errors import RecipeError, ScheduleError

METHOD = Dmd(student_every=1)


def _state(engine: PlainEngine) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in engine.module.state_dict().items()}


def test_one_step_updates_student_and_fake_score_and_not_the_teacher() -> None:
    engines = make_engines(METHOD)
    before = {role: _state(engine) for role, engine in engines.items()}
    terms = take_step(METHOD, engines, make_batch())
    moved = {
        role: sum(not t.equal(before[role][k]) for k, t in _state(engine).items())
        for role, engine in engines.items()
    }
    assert moved["teacher"] == 0
    assert moved["student"] > 30
    assert moved["fake_score"] > 30
    assert set(terms) == {
        "student/loss",
        "student/dmd_loss",
        "student/dmd_direction",
        "student/teacher_distance",
        "fake_score/loss",
        "fake_score/fake_score_loss",
        *(f"fake_score/{x}_{y}" for x in ("student", "real") for y in ("motion", "mean", "std")),
    }
    assert all(math.isfinite(term) for term in terms.values())


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_each_role_may_learn_by_lora(role: str) -> None:
    method = replace(METHOD, **{role: Learning(trains="lora", learning_rate=1e-3, rank=2, alpha=2)})
    engines = make_engines(method)
    take_step(method, engines, make_batch())
    state = _state(engines[role])
    assert all(torch.equal(state[name], t) for name, t in make_model().state_dict().items())
    assert any(t.any() for name, t in state.items() if name.endswith("lora_up"))


def test_the_fake_score_is_updated_each_step_and_the_student_at_the_end_of_every_fifth() -> None:
    method = replace(METHOD, student_every=5, num_steps=1)
    engines, batch = make_engines(method), make_batch()
    roles = []
    for step in range(10):
        terms = take_step(method, engines, batch, step, steps_optimizers=False)
        roles.append(sorted({name.partition("/")[0] for name in terms}))
    assert roles == (4 * [["fake_score"]] + [["fake_score", "student"]]) * 2


def test_the_student_goes_from_the_fake_score_s_prediction_to_the_guided_teacher_s() -> None:
    """The student's gradient is that of its sample along (fake - real) / mean |sample - real|."""
    engines, batch = make_engines(METHOD, lambda role: make_model(len(role))), make_batch()
    draws = Draws(0, 0, 0)
    student, fake, teacher = (engines[role].module for role in ("student", "fake_score", "teacher"))
    assert isinstance(teacher, TalkingModel)
    sigmas = METHOD.sigmas()
    last = draw_exit(4, draws.shared("exit step"))
    noise = draw_noise(batch.latents_BCFHW, draws.own("noise"))
    noisy = denoise_no_grad(student, sigmas[: last + 1], batch, noise, draws.own("renoise"))
    sample = last_step(student, noisy, sigmas[last], batch)
    with torch.no_grad():
        sigma_B = METHOD._draw_score_sigmas(batch, draws, "score noise level")
        shown = batch.add_noise(sample, draw_noise(sample, draws.own("score noise")), sigma_B)
        # InfiniteTalk's own way of writing it: uncond + T (cond - no text) + A (no text - uncond)
        both, voice, neither = (
            teacher(shown, sigma_B, batch, uses_text=uses_text, uses_audio=uses_audio)
            for uses_text, uses_audio in ((True, True), (False, True), (False, False))
        )
        velocity = neither + 5 * (both - voice) + 4 * (voice - neither)
        real = shown - sigma_B.view(-1, 1, 1, 1, 1) * velocity
        unlike = predict_denoised(fake, shown, sigma_B, batch) - real
        direction = torch.zeros_like(unlike)
        for i, num_pinned in enumerate((1, 3)):
            distance = (sample - real)[i, :, num_pinned:].abs().mean()
            direction[i, :, num_pinned:] = unlike[i, :, num_pinned:] / distance
        direction /= batch.free_B1F11.expand_as(sample).sum()
    weights = [p for p in student.parameters() if p.requires_grad]
    expected = torch.autograd.grad(sample, weights, direction, allow_unused=True)
    update = next(METHOD.updates(0, batch, engines, draws))
    (make_loss,) = update.losses
    got = torch.autograd.grad(make_loss(), weights, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "audio", "has_text", "calls"),
    [(5, 4, True, 3), (5, 4, False, 2), (1, 4, True, 2), (1, 1, True, 1), (5, 1, False, 1)],
)
def test_the_teacher_is_asked_no_more_than_guidance_needs(
    text: float, audio: float, has_text: bool, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = replace(METHOD, guidance_scale=text, audio_guidance_scale=audio)
    batch = make_batch()
    if not has_text:
        batch = replace(batch, text_BND=None, null_text_BND=None)
    engines = make_engines(method)
    count = _count(monkeypatch, engines["teacher"].module)
    take_step(method, engines, batch, steps_optimizers=False)
    assert count() == calls


def _count(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> Callable[[], int]:
    calls: list[None] = []
    forward = module.forward

    def spy(*inputs: Any, **named: Any) -> Any:
        calls.append(None)
        return forward(*inputs, **named)

    monkeypatch.setattr(module, "forward", spy)
    return lambda: len(calls)


def test_all_ranks_make_as_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    engines, batch = make_engines(METHOD), make_batch()
    seen = set()
    for step in range(8):
        counts = set()
        for slot in range(3):
            with monkeypatch.context() as patch:
                count = _count(patch, engines["student"].module)
                for update in METHOD.updates(step, batch, engines, Draws(0, step, slot)):
                    for make_loss in update.losses:
                        make_loss()
                counts.add(count())
        assert len(counts) == 1
        seen |= counts
    assert len(seen) > 2  # the exit step does vary


def test_what_the_student_and_the_fake_score_say_of_given_latents_is_of_no_account() -> None:
    """The bias of the last layer affects every place; here all frames but one are pinned."""
    batch = make_batch(num_pinned=(3,))

    def gradient(batch: Batch) -> list[Tensor]:
        engines = make_engines(METHOD, lambda role: make_model(len(role)))
        gradients = []
        for update in METHOD.updates(0, batch, engines, Draws(0, 0, 0)):
            module = engines[update.role].module
            assert isinstance(module, TalkingModel)
            for make_loss in update.losses:
                velocities: list[Tensor] = []
                hook = module.dit.register_forward_hook(
                    lambda *call, kept=velocities: kept.append(call[-1])
                )
                loss = make_loss()
                hook.remove()
                gradients.append(torch.autograd.grad(loss, velocities[-1])[0])
        return gradients

    for gradient_BCFHW in gradient(batch):
        assert gradient_BCFHW[:, :, 3:].any()
        assert not gradient_BCFHW[:, :, :3].any()


def test_score_levels_between_no_bounds_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"lowest_score_sigma 0.9 and highest_score_sigma 0.5"):
        Dmd(lowest_score_sigma=0.9, highest_score_sigma=0.5)


def test_a_schedule_that_is_none_is_refused() -> None:
    with pytest.raises(ScheduleError, match="got 4 steps and 2 timesteps"):
        Dmd(timesteps=(1000, 500))
    assert Dmd(num_steps=2, timesteps=(1000, 750), shift=1.0).sigmas() == [1, 0.75]


class Gaussian(nn.Module):
    """Ideal prediction for latents that are independent normals, from their noise."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())

    def forward(self, noisy: Tensor, sigma_B: Tensor, batch: Batch, **_: Any) -> Tensor:
        sigma = sigma_B.view(-1, 1, 1, 1, 1)
        variance = (2 * self.log_std).exp()
        gain = (1 - sigma) * variance / ((1 - sigma).square() * variance + sigma.square())
        denoised = self.mean + gain * (noisy - (1 - sigma) * self.mean)
        return (noisy - denoised) / sigma


class OneStep(nn.Module):
    """Student whose samples are its noise, scaled and shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.0))
        self.std = nn.Parameter(torch.tensor(1.0))

    def forward(self, noisy: Tensor, sigma_B: Tensor, batch: Batch) -> Tensor:
        del batch
        return (noisy - (self.mean + self.std * noisy)) / sigma_B.view(-1, 1, 1, 1, 1)


def test_a_student_comes_to_the_teacher_s_distribution() -> None:
    """Its mean and its spread: a student that sought the likeliest sample would lose the spread."""
    method = replace(METHOD, audio_guidance_scale=1.0, guidance_scale=1.0, num_steps=1)
    student, teacher = OneStep(), Gaussian(2.0, 0.5)
    networks = {"student": student, "fake_score": Gaussian(0.0, 1.0), "teacher": teacher}
    teacher.requires_grad_(False)
    engines = {
        role: PlainEngine(network, EngineSettings(learning_rate=0.03, betas=(0.0, 0.9)))
        for role, network in networks.items()
    }
    batch = make_batch(4, num_pinned=(1,))
    means, stds = [], []
    for step in range(250):
        take_step(method, engines, batch, step)
        means.append(student.mean.item())
        stds.append(student.std.item())
    assert math.fsum(means[-80:]) / 80 == pytest.approx(2.0, abs=0.1)
    assert math.fsum(stds[-80:]) / 80 == pytest.approx(0.5, abs=0.1)
