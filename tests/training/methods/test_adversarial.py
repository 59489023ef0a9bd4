"""Progressive adversarial distillation: Eq. 4-11 as computed, and the training of a student."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tests.training.tiny_networks import make_batch, make_engines, make_model, take_step
from training.engine.divergence import Guard, GuardSettings
from training.engine.engine import EngineSettings, PlainEngine
from training.engine.rng import Draws
from training.methods.adversarial import Adversarial
from training.methods.method import Learning, draw_noise
from training.methods.rollout import denoise_no_grad, last_step
from training.methods.timesteps import even_timesteps, to_sigmas
from training.models.batch import Batch
from training.models.lora import adapters_off, list_adapters
from training.models.networks import Discriminator, TalkingModel
from turbotalk_core.errors import RecipeError, ScheduleError, TrainingError

LORA = Learning(trains="lora", learning_rate=1e-3, rank=2, alpha=2)
METHOD = Adversarial(num_steps=2, discriminator=LORA, warmup="off")
FROZEN_COPY = replace(METHOD, four_step="frozen", discriminator=Learning(learning_rate=1e-3))


def _experienced(engines: Mapping[str, PlainEngine]) -> None:
    """Set the discriminator's last layer and its LoRA layers to values other than zero."""
    discriminator = engines["discriminator"].module
    assert isinstance(discriminator, Discriminator)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        discriminator.logit.weight.normal_(generator=generator)
        for _, layer in list_adapters(discriminator):
            layer.lora_up.normal_(0, 0.3, generator=generator)


def _state(engine: PlainEngine) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in engine.module.state_dict().items()}


def _gradients(method: Adversarial, role: str, *, experienced: bool = True) -> dict[str, Tensor]:
    """Compute the gradient of a role's update at the first step."""
    engines = make_engines(method)
    if experienced:
        _experienced(engines)
    for update in method.updates(0, make_batch(), engines, Draws(0, 0, 0)):
        if update.role != role:
            continue
        for name, engine in engines.items():
            engine.set_trainable(yes=name == role)
        for make_loss in update.losses:
            make_loss().backward()
    parameters = engines[role].module.named_parameters()
    return {name: p.grad for name, p in parameters if p.grad is not None}


@pytest.mark.parametrize("method", [METHOD, FROZEN_COPY])
def test_one_step_updates_discriminator_and_student(method: Adversarial) -> None:
    engines = make_engines(method)
    before = {role: _state(engine) for role, engine in engines.items()}
    terms = take_step(method, engines, make_batch())
    moved = {
        role: {k for k, t in _state(engine).items() if not t.equal(before[role][k])}
        for role, engine in engines.items()
    }
    assert "logit.weight" in moved["discriminator"]
    assert len(moved["student"]) > 30
    if method is FROZEN_COPY:
        assert not moved["four_step"]
    else:
        base = {f"backbone.{name}" for name in make_model().state_dict()}
        assert not base & moved["discriminator"]
    logits = {"real_logit", "student_logit", "four_step_logit", "logit_gap", "four_step_gap"}
    measures = {"last_sigma"} | {
        f"{x}_{y}" for x in ("real", "student", "four_step") for y in ("motion", "mean", "std")
    }
    penalties = {"penalty_real", "penalty_student", "penalty_four_step"}
    both = logits | {"accuracy", "adversarial_loss", "loss"}
    assert {name for name in terms if name.startswith("discriminator/")} == {
        f"discriminator/{name}" for name in both | measures | penalties
    }
    assert {name for name in terms if name.startswith("student/")} == {
        f"student/{name}" for name in both | {"self_compare_loss"}
    }
    assert all(math.isfinite(term) for term in terms.values())


def test_at_first_the_discriminator_knows_nothing() -> None:
    terms = take_step(METHOD, make_engines(METHOD), make_batch(), steps_optimizers=False)
    assert terms["discriminator/loss"] == pytest.approx(math.log(2))
    assert terms["student/loss"] == pytest.approx((1 + 50) * math.log(2))
    for name in ("real", "student", "four_step"):
        assert terms[f"discriminator/{name}_logit"] == 0
        assert terms[f"discriminator/penalty_{name}"] == 0


@pytest.mark.parametrize("method", [METHOD, FROZEN_COPY, replace(METHOD, loss="hinge")])
def test_a_sample_at_a_time_is_the_whole_loss(method: Adversarial) -> None:
    light, plain = (
        _gradients(replace(method, memory_light=is_light), "discriminator")
        for is_light in (True, False)
    )
    assert light.keys() == plain.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in plain.values())
    torch.testing.assert_close(light, plain, rtol=2e-3, atol=1e-5)
    losses = []
    for is_light in (True, False):
        engines = make_engines(method)
        _experienced(engines)
        changed = replace(method, memory_light=is_light)
        terms = take_step(changed, engines, make_batch(), steps_optimizers=False)
        losses.append(terms["discriminator/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _spy_on_scores(
    monkeypatch: pytest.MonkeyPatch, discriminator: nn.Module
) -> list[tuple[Tensor, Tensor, Tensor]]:
    scores: list[tuple[Tensor, Tensor, Tensor]] = []
    forward = discriminator.forward

    def spy(latents: Tensor, sigma_B: Tensor, batch: Batch) -> Tensor:
        logit_B = forward(latents, sigma_B, batch)
        scores.append((latents.detach(), sigma_B, logit_B.detach()))
        return logit_B

    monkeypatch.setattr(discriminator, "forward", spy)
    return scores


@pytest.mark.parametrize("scores_noisy", [False, True])
def test_the_losses_are_equations_6_to_11(
    scores_noisy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = replace(
        METHOD,
        memory_light=False,
        scores_noisy=scores_noisy,
        self_compare_weight=7.0,
        penalty_weight=3.0,
        penalty_size=0.2,
    )
    engines, batch = make_engines(method), make_batch()
    _experienced(engines)
    scores = _spy_on_scores(monkeypatch, engines["discriminator"].module)
    terms = take_step(method, engines, batch, steps_optimizers=False)
    latents, sigmas, logits = zip(*scores, strict=True)
    real, student, four_step, *perturbed = logits[:6]
    expected = softplus(student - real).mean()
    for logit, other in zip((real, student, four_step), perturbed, strict=True):
        expected = expected + 3 * (logit - other).square().mean()
    assert terms["discriminator/loss"] == pytest.approx(expected.item(), rel=1e-5)
    # Each penalty perturbs what was scored, at the same level, and leaves given latents.
    assert all(torch.equal(sigma_B, sigmas[0]) for sigma_B in sigmas[:6])
    for scored, other in zip(latents[:3], latents[3:6], strict=True):
        added = (other - scored)[batch.free_B1F11.expand_as(scored) == 1]
        assert added.std().item() == pytest.approx(0.2, rel=0.05)
        assert torch.equal(batch.pin(other), other)
    real, student, four_step = logits[6:]
    expected = softplus(real - student).mean() + 7 * softplus(four_step - student).mean()
    assert terms["student/loss"] == pytest.approx(expected.item(), rel=1e-5)
    is_clean = torch.equal(latents[0], batch.latents_BCFHW)
    assert is_clean != scores_noisy


def test_the_four_step_samples_are_the_four_step_model_s() -> None:
    """What both updates compare with is a rollout of what the discriminator began with."""
    engines, batch, draws = make_engines(METHOD), make_batch(), Draws(0, 0, 0)
    _experienced(engines)
    made = METHOD._make_four_step(
        batch, draw_noise(batch.latents_BCFHW, draws.own("noise")), engines, draws
    )
    sigmas = to_sigmas(even_timesteps(4), METHOD.shift)
    with torch.no_grad():
        noise = draw_noise(batch.latents_BCFHW, draws.own("noise"))
        noisy = denoise_no_grad(make_model(), sigmas, batch, noise, draws.own("four-step renoise"))
        expected = last_step(make_model(), noisy, sigmas[-1], batch)
    torch.testing.assert_close(made, expected)
    copies = make_engines(FROZEN_COPY)
    noise = draw_noise(batch.latents_BCFHW, draws.own("noise"))
    torch.testing.assert_close(FROZEN_COPY._make_four_step(batch, noise, copies, draws), expected)


def test_the_student_s_gradient_is_that_of_its_last_step() -> None:
    """Dl/dx through the discriminator, and dx/dw with the earlier steps held."""
    gradients = _gradients(METHOD, "student")
    engines, batch, draws = make_engines(METHOD), make_batch(), Draws(0, 0, 0)
    _experienced(engines)
    student, discriminator = engines["student"].module, engines["discriminator"].module
    sigmas = METHOD.sigmas()
    assert sigmas == pytest.approx([1, 5 / 6])
    noise = draw_noise(batch.latents_BCFHW, draws.own("noise"))
    noisy = denoise_no_grad(student, sigmas, batch, noise, draws.own("renoise"))
    sample = last_step(student, noisy, sigmas[-1], batch)
    samples = {
        "student": sample,
        "four_step": METHOD._make_four_step(batch, noise, engines, draws),
    }
    scored, sigma_B = METHOD._present(samples, batch, draws, "student")
    with torch.no_grad():
        real = discriminator(batch.latents_BCFHW, sigma_B, batch)
        four_step = discriminator(scored["four_step"], sigma_B, batch)
    logit = discriminator(scored["student"], sigma_B, batch)
    loss = softplus(real - logit).mean() + 50 * softplus(four_step - logit).mean()
    names = [name for name, _ in student.named_parameters()]
    expected = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    assert gradients.keys() == {n for n, g in zip(names, expected, strict=True) if g is not None}
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(gradients.get(name), gradient, rtol=1e-3, atol=1e-6)


def test_given_latents_have_no_part_in_the_student_s_gradient() -> None:
    engines, batch = make_engines(METHOD), make_batch(num_pinned=(3,))
    _experienced(engines)
    model = engines["student"].module
    assert isinstance(model, TalkingModel)
    velocities: list[Tensor] = []
    model.dit.register_forward_hook(lambda *call: velocities.append(call[-1]))
    discriminators, students = METHOD.updates(0, batch, engines, Draws(0, 0, 0))
    assert (discriminators.role, students.role) == ("discriminator", "student")
    (make_loss,) = students.losses
    (gradient,) = torch.autograd.grad(make_loss(), velocities[-1])
    assert gradient[:, :, 3:].any()
    assert not gradient[:, :, :3].any()


@pytest.mark.parametrize(
    ("num_steps", "low", "high"), [(3, 250, 1000 / 3), (2, 1000 / 3, 500), (1, 500, 1000)]
)
def test_the_last_timestep_comes_from_the_phase_before(
    num_steps: int, low: float, high: float
) -> None:
    method = Adversarial(num_steps=num_steps, warmup_steps=100)
    drawn = []
    for step in range(100):
        ranks = {
            method.draw_timestep(step, Draws(0, step, slot).shared("last timestep"))
            for slot in range(4)
        }
        assert len(ranks) == 1
        (timestep,) = ranks
        assert timestep is not None
        drawn.append(timestep)
    assert low < min(drawn) < low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) < max(drawn) <= high
    assert method.draw_timestep(100, Draws(0, 100, 0).shared("last timestep")) is None
    assert len(method.sigmas()) == num_steps


def test_a_curriculum_goes_from_one_end_to_the_other() -> None:
    method = Adversarial(num_steps=1, warmup="curriculum", warmup_steps=100)
    for step in range(0, 100, 7):
        timestep = method.draw_timestep(step, Draws(0, step, 0).shared("last timestep"))
        assert timestep is not None
        assert 500 < timestep <= 500 + 500 * (step + 1) / 100


def test_one_step_warms_up_with_a_bridge_and_ends_with_pure_noise() -> None:
    method = Adversarial(num_steps=1, discriminator=LORA, warmup_steps=1, shift=1.0)
    engines, batch = make_engines(method), make_batch()
    for step, num_calls in ((0, 2), (1, 1)):
        strengths: list[float] = []
        student = engines["student"].module
        hook = student.register_forward_pre_hook(
            lambda *call, kept=strengths: kept.append(call[1][1][0].item())
        )
        next(method.updates(step, batch, engines, Draws(0, step, 0)))
        hook.remove()
        assert len(strengths) == num_calls
        assert strengths[0] == 1
        if num_calls == 2:
            assert 0.5 < strengths[1] < 1


def test_without_self_compare_there_is_no_four_step_model() -> None:
    method = replace(METHOD, self_compare_weight=0.0, discriminator=Learning(learning_rate=1e-3))
    assert method.roles().keys() == {"student", "discriminator"}
    terms = take_step(method, make_engines(method), make_batch())
    assert not any("four_step" in name or "self_compare" in name for name in terms)


def test_without_penalties_nothing_is_perturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    method = replace(METHOD, penalty_weight=0.0, memory_light=False)
    engines = make_engines(method)
    scores = _spy_on_scores(monkeypatch, engines["discriminator"].module)
    take_step(method, engines, make_batch(), steps_optimizers=False)
    # Real and student's; then, for the student, these and the four-step model's.
    assert len(scores) == 2 + 3


def test_the_discriminator_may_tell_four_step_samples_from_the_student_s() -> None:
    engines = make_engines(METHOD)
    _experienced(engines)
    without, with_term = (
        take_step(
            replace(METHOD, four_step_weight=w), engines, make_batch(), steps_optimizers=False
        )
        for w in (0.0, 2.0)
    )
    assert with_term["discriminator/loss"] > without["discriminator/loss"]


def _count_scores(method: Adversarial, step: int, monkeypatch: pytest.MonkeyPatch) -> int:
    engines = make_engines(method)
    scores = _spy_on_scores(monkeypatch, engines["discriminator"].module)
    next(method.updates(step, make_batch(), engines, Draws(0, step, 0)))
    for update in method.updates(step, make_batch(), engines, Draws(0, step, 0)):
        if update.role == "discriminator":
            for make_loss in update.losses:
                make_loss()
    return len(scores)


@pytest.mark.slow
def test_lazy_penalties_are_rarer_and_as_much_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    method = replace(METHOD, memory_light=False, penalty_floor_every=0)
    lazy = replace(method, penalty_every=4)
    assert [_count_scores(lazy, step, monkeypatch) for step in range(5)] == [6, 2, 2, 2, 6]
    losses = []
    for changed in (replace(method, penalty_weight=400.0), lazy):
        engines = make_engines(changed)
        _experienced(engines)
        losses.append(take_step(changed, engines, make_batch(), steps_optimizers=False))
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_discriminator_is_ahead_of_the_student() -> None:
    method = replace(METHOD, discriminator_warmup=3, student_every=2, warmup="curriculum")
    method = replace(method, warmup_steps=4)
    engines = make_engines(method)
    before = _state(engines["student"])
    roles = []
    for step in range(7):
        terms = take_step(method, engines, make_batch(), step)
        roles.append("".join(sorted({name[0] for name in terms})))
        if step < 4:
            assert all(t.equal(before[k]) for k, t in _state(engines["student"]).items())
    assert roles == ["d", "d", "d", "d", "ds", "d", "ds"]
    specs = method.roles()
    assert (specs["student"].starts_at, specs["student"].every) == (3, 2)
    assert (specs["discriminator"].starts_at, specs["discriminator"].every) == (0, 1)
    # The student's own warm-up begins with its first step.
    for step, late in ((0, 0), (3, 0), (5, 2)):
        generator = Draws(0, step, 0).shared("last timestep")
        expected = replace(method, discriminator_warmup=0).draw_timestep(late, generator)
        assert method.draw_timestep(step, Draws(0, step, 0).shared("last timestep")) == expected


def test_generated_samples_are_rounded_as_the_real_ones_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = replace(METHOD, penalty_weight=0.0, memory_light=False)
    engines = make_engines(method)
    scores = _spy_on_scores(monkeypatch, engines["discriminator"].module)
    take_step(method, engines, make_batch(), steps_optimizers=False)
    assert len(scores) == 5
    for latents, _, _ in scores:
        assert latents.dtype == torch.float32
        assert torch.equal(latents, latents.half().float())


class TestRounding:
    """Penalties are differences of nearby logits, which rounding must not decide."""

    def _terms(self, size: float, *, bfloat16: bool, step: int = 1) -> dict[str, float]:
        method = replace(METHOD, penalty_size=size)
        engines = make_engines(method)
        _experienced(engines)
        if bfloat16:
            engines["discriminator"].module.bfloat16()
        (update, *_) = method.updates(step, make_batch(), engines, Draws(0, step, 0))
        return {f"discriminator/{name}": float(term) for name, term in update.log.items()}

    def test_autocast_does_not_round_a_discriminator(self) -> None:
        engines, batch = make_engines(METHOD), make_batch()
        _experienced(engines)
        discriminator, sigma_B = engines["discriminator"].module, torch.tensor([0.9, 0.3])
        exact = discriminator(batch.latents_BCFHW, sigma_B, batch)
        with torch.autocast("cpu", torch.bfloat16):
            logit_B = discriminator(batch.latents_BCFHW, sigma_B, batch)
            # The four-step samples are the network's work under autocast, as before.
            assert isinstance(discriminator, Discriminator)
            rounded = discriminator.backbone(batch.latents_BCFHW, sigma_B, batch)
        assert torch.equal(logit_B, exact)
        clean = discriminator.backbone(batch.latents_BCFHW, sigma_B, batch)
        assert not torch.equal(rounded, clean)

    def test_the_floor_is_measured_and_judged(self) -> None:
        guard = Guard(GuardSettings())
        exact = self._terms(0.1, bfloat16=False)
        share = exact["discriminator/penalty_floor"] / exact["discriminator/penalty_response"]
        assert share == pytest.approx(1e-4, rel=0.5)  # (1e-3 / 0.1)^2: slope, no rounding
        guard.watch(2, exact)
        rounded = self._terms(0.004, bfloat16=True)
        with pytest.raises(TrainingError, match=r"step 2: .* is rounding.*larger penalty_size"):
            guard.watch(2, rounded)
        Guard(GuardSettings(most_rounding=10.0)).watch(2, rounded)

    def test_it_is_measured_from_time_to_time(self) -> None:
        def measures(step: int, **changes: Any) -> bool:
            return replace(METHOD, **changes)._measures_floor(step)

        assert [step for step in range(302) if measures(step)] == [1, 101, 201, 301]
        assert all(measures(step, penalty_floor_every=1) for step in range(3))
        assert not any(measures(step, penalty_floor_every=0) for step in range(3))
        assert not any(measures(step, penalty_weight=0.0) for step in range(3))


@pytest.mark.slow
def test_the_student_is_updated_as_often_as_is_said() -> None:
    method = replace(METHOD, student_every=2, num_steps=1)
    engines = make_engines(method)
    roles = []
    for step in range(4):
        terms = take_step(method, engines, make_batch(), step, steps_optimizers=False)
        roles.append({name.partition("/")[0] for name in terms})
    assert roles == 2 * [{"discriminator"}, {"discriminator", "student"}]


def test_a_four_step_model_needs_somewhere_to_be() -> None:
    with pytest.raises(RecipeError, match=r"trains 'full'.*four_step to frozen"):
        replace(METHOD, discriminator=Learning(learning_rate=1e-3))


@pytest.mark.parametrize("settings", [{"before": 600.0}, {"timesteps": (1000.0, 500.0, 200.0)}])
def test_a_phase_that_is_none_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match=r"before this phase|3 timesteps"):
        replace(METHOD, **settings)


@pytest.mark.slow
def test_phases_go_on_from_one_another() -> None:
    """4 -> 3 -> 2 -> 1: the student and the discriminator move, the four-step model does not."""
    begin = {"student": make_model(), "discriminator": make_model()}
    networks: dict[str, nn.Module] = dict(begin)
    batch = make_batch()
    for num_steps in (3, 2, 1):
        method = Adversarial(num_steps=num_steps, discriminator=LORA, warmup_steps=1)
        engines = make_engines(method, networks.__getitem__, learning_rate=1e-3)
        for step in range(2):
            take_step(method, engines, batch, step)
        networks = {role: engine.module for role, engine in engines.items()}
    discriminator = networks["discriminator"]
    assert isinstance(discriminator, Discriminator)
    sigma_B = torch.tensor([0.5, 0.5])
    with torch.no_grad(), adapters_off(discriminator):
        four_step = discriminator.backbone(batch.latents_BCFHW, sigma_B, batch)
        assert torch.equal(four_step, make_model()(batch.latents_BCFHW, sigma_B, batch))
        student = networks["student"](batch.latents_BCFHW, sigma_B, batch)
        assert not torch.allclose(student, four_step)


class Colour(nn.Module):
    """Student of one weight, whose samples have one colour."""

    def __init__(self, colour: float) -> None:
        super().__init__()
        self.colour = nn.Parameter(torch.tensor(colour))

    def forward(self, noisy: Tensor, sigma_B: Tensor, batch: Batch) -> Tensor:
        del batch
        return (noisy - self.colour) / sigma_B.view(-1, 1, 1, 1, 1)


class ColourJudge(nn.Module):
    """Discriminator that scores the mean colour with a slope, its only weight."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, latents: Tensor, sigma_B: Tensor, batch: Batch) -> Tensor:
        del sigma_B, batch
        return self.slope * latents.mean((1, 2, 3, 4))


@pytest.mark.parametrize("loss", ["r3gan", "gan", "hinge"])
def test_a_student_comes_to_the_real_samples(loss: Any) -> None:
    method = Adversarial(
        num_steps=1,
        loss=loss,
        warmup="off",
        self_compare_weight=0.0,
        penalty_weight=0.1,
    )
    settings = EngineSettings(learning_rate=0.05, betas=(0.0, 0.9))
    engines = {
        "student": PlainEngine(Colour(-1.0), settings),
        "discriminator": PlainEngine(ColourJudge(), settings),
    }
    batch = make_batch(num_pinned=(1,))
    batch = replace(batch, latents_BCFHW=torch.ones_like(batch.latents_BCFHW))
    colours = []
    for step in range(120):
        take_step(method, engines, batch, step)
        module = engines["student"].module
        assert isinstance(module, Colour)
        colours.append(module.colour.item())
    # It goes around the real colour, 1, as two players on a line do.
    assert colours[0] < -0.9
    assert sum(colours[60:]) / 60 == pytest.approx(1.0, abs=0.4)
