"""Progressive adversarial distillation: a one-step student from a four-step one (stage 2).

Phases of 3, 2 and 1 steps, each starting from the one before. The student generates whole videos
with all its steps, with a gradient through the last step alone. A discriminator is trained to score
real videos above the student's. Self-compare adds a second goal for the student: to score at least
as high as the four-step model, which is within reach from the start of a phase.

Axes: B batch, C channels, F latent frames, H height, W width, K samples.
Source: TurboTalk, section 3.3, Eq. 4-11 and Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from training.engine.engine import Engine
from training.engine.rng import Draws
from training.methods.losses import (
    AdversarialLoss,
    difference_penalty,
    discriminator_loss,
    linearize,
    relativistic_loss,
    student_loss,
)
from training.methods.method import (
    Count,
    Learning,
    Natural,
    Positive,
    RoleSpec,
    Update,
    Weight,
    describe_latents,
    draw_noise,
    round_as_stored,
)
from training.methods.rollout import denoise_no_grad, last_step
from training.methods.timesteps import (
    choose_timesteps,
    draw_last_timestep,
    draw_sigmas,
    even_timesteps,
    place_last_timestep,
    to_sigmas,
)
from training.models.batch import Batch
from training.models.lora import adapters_off
from training.models.networks import Discriminator
from turbotalk_core.errors import RecipeError, ScheduleError

FOUR_STEPS = 4  # TurboTalk: steps of stage 1's student, the reference of self-compare
FLOOR_SIZE = 1e-3  # perturbation whose response is rounding, not slope
FLOOR_DRAWS = 2  # perturbations of each sample in a measurement of that floor

Samples = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adversarial:
    """Settings of one phase of adversarial distillation.

    Every step updates the discriminator once; every ``student_every``-th step updates the student
    once after it.

    Attributes:
        student: training settings; rate [read: a third-party note: "about 4e-7"].
        discriminator: training settings: LoRA layers on the four-step model and its heads, or all
            weights [inferred: 2e-6 for all weights, ten times that with LoRA].
        num_steps: number of the student's steps in this phase.
        timesteps: timesteps before the shift; None for even parts of 1000.
        before: last timestep of the phase before; None for that of a student with one step more.
        shift: flow shift of the schedules, which inference must share.
        warmup: dynamic timestep sampling, Eq. 9: the last timestep is drawn between ``before`` and
            its final value (uniform), up to a bound that moves there (curriculum), or has its
            final value from the start (off).
        warmup_steps: length of the warm-up in steps of the phase [read: TurboTalk: 500].
        student_every: the student is updated once in so many steps; 1 [inferred: APT].
        discriminator_warmup: steps at the start of the phase in which the discriminator alone is
            updated. A student that moves earlier follows the gradient of a network that cannot
            distinguish anything yet. Other warm-ups of the student begin after it.
        loss: form of the discriminator's and the student's adversarial terms.
        self_compare_weight: lambda of Eq. 11 [read: 50]; with 0 there is no four-step model.
        four_step: network of the four-step samples. ``adapters_off``: the discriminator's backbone
            without its LoRA layers, which is the four-step model, at no cost in memory
            [inferred]. ``frozen``: a copy of the model.
        four_step_weight: weight of a term by which the discriminator scores four-step samples
            above the student's [inferred: 0, Eq. 8 has none].
        penalty_weight: gamma of Eq. 8, for all finite-difference penalties [inferred: APT's 100].
        penalty_size: s of Eq. 7, the size of the added noise [inferred: APT's 0.1].
        penalty_every: the penalties are computed in one of so many steps, with so many times the
            weight [inferred: lazy regularisation of StyleGAN2, 1912.04958]; in the others the
            discriminator is called half as often.
        penalty_floor_every: steps between two measurements of the penalties' rounding error, see
            ``_measure_floor``; 0 for none.
        discriminator_shift: flow shift of the noise level that is passed to the discriminator;
            with 1 the level is uniform [inferred: APT2].
        scores_noisy: whether samples are noised to that level before they are scored, as in DMD2
            and AAD-1, or scored clean, as in APT [inferred: clean].
        memory_light: whether the discriminator's loss is backpropagated one sample at a time. The
            gradient is the same; each sample except the last needs a second network call.
    """

    student: Learning = Learning(learning_rate=4e-7)
    discriminator: Learning = Learning(trains="lora", learning_rate=2e-5)
    num_steps: Count
    timesteps: tuple[float, ...] | None = None
    before: Positive | None = None
    shift: Positive = 5.0
    warmup: Literal["uniform", "curriculum", "off"] = "uniform"
    warmup_steps: Natural = 500
    student_every: Count = 1
    discriminator_warmup: Natural = 0
    loss: AdversarialLoss = "r3gan"
    self_compare_weight: Weight = 50.0
    four_step: Literal["adapters_off", "frozen"] = "adapters_off"
    four_step_weight: Weight = 0.0
    penalty_weight: Weight = 100.0
    penalty_size: Positive = 0.1
    penalty_every: Count = 1
    penalty_floor_every: Natural = 100
    discriminator_shift: Positive = 1.0
    scores_noisy: bool = False
    memory_light: bool = True

    def __post_init__(self) -> None:
        trains = self.discriminator.trains
        if self._compares and self.four_step == "adapters_off" and trains != "lora":
            raise RecipeError(
                f"got a discriminator that trains {trains!r} and four-step samples from its "
                "backbone; only with LoRA is there a four-step model left in it: set "
                "discriminator.trains to lora, or four_step to frozen"
            )
        self.sigmas(self._old_timestep())

    @property
    def _compares(self) -> bool:
        return self.self_compare_weight > 0 or self.four_step_weight > 0

    def _timesteps(self) -> tuple[float, ...]:
        return choose_timesteps(self.num_steps, self.timesteps)

    def _old_timestep(self) -> float:
        if self.before is not None:
            return self.before
        return even_timesteps(self.num_steps + 1)[-1]

    def sigmas(self, last_timestep: float | None = None) -> list[float]:
        """Compute the noise levels at which the student is called.

        Args:
            last_timestep: last timestep of the schedule; None for its final value.

        Returns:
            Sigmas, descending, without the final 0.

        Raises:
            ScheduleError: if timesteps and shift form no valid schedule, or the last timestep is
                above its final value.
        """
        timesteps = self._timesteps()
        if last_timestep is not None:
            if last_timestep > timesteps[-1]:
                raise ScheduleError(
                    f"got a last timestep of {last_timestep:g} before this phase, whose own is "
                    f"{timesteps[-1]:g}; fewer steps end at a higher one: set before to at most "
                    "that"
                )
            timesteps = place_last_timestep(timesteps, last_timestep)
        return to_sigmas(timesteps, self.shift)

    def roles(self) -> dict[str, RoleSpec]:
        """Return the networks it needs.

        Returns:
            Student and discriminator, which both start from stage 1's student, and for ``frozen``
            the four-step model. In later phases all continue.
        """
        roles = {
            "student": RoleSpec(
                begins_with="student",
                learning=self.student,
                starts_at=self.discriminator_warmup,
                every=self.student_every,
            ),
            "discriminator": RoleSpec(
                begins_with="student", learning=self.discriminator, is_discriminator=True
            ),
        }
        if self._compares and self.four_step == "frozen":
            roles["four_step"] = RoleSpec(begins_with="student")
        return roles

    def updates(
        self, step: int, batch: Batch, roles: Mapping[str, Engine], draws: Draws
    ) -> Iterator[Update]:
        """Make the updates of one step: the discriminator's, and the student's in its turn.

        Args:
            step: number of the step in the phase.
            batch: real samples and conditions.
            roles: engines by role.
            draws: random streams of this step.

        Yields:
            The updates.
        """
        last_timestep = self.draw_timestep(step, draws.shared("last timestep"))
        sigmas = self.sigmas(last_timestep)
        noise = draw_noise(batch.latents_BCFHW, draws.own("noise"))
        # The discriminator's update does not change the student, so the student's latents before
        # its last step and the four-step samples serve both updates. Only the student's last step
        # has a gradient (Eq. 5): the steps before it decide where it starts, and a graph through
        # all of them would cost a network call's memory per step.
        student = roles["student"]
        noisy = denoise_no_grad(student.module, sigmas, batch, noise, draws.own("renoise"))
        with torch.no_grad():
            sample = last_step(student.module, noisy, sigmas[-1], batch)
        samples = {"real": batch.latents_BCFHW, "student": sample}
        if self._compares:
            samples["four_step"] = self._make_four_step(batch, noise, roles, draws)
        log = {"last_sigma": torch.tensor(sigmas[-1], device=sample.device)}
        for name, latents in samples.items():
            log |= describe_latents(name, latents)
        discriminator = roles["discriminator"]
        if self._measures_floor(step):
            log |= self._measure_floor(samples, batch, discriminator, draws)
        weight = 0.0 if step % self.penalty_every else self.penalty_weight * self.penalty_every
        losses = self._discriminator_losses(samples, batch, discriminator, weight, draws, log)
        yield Update(role="discriminator", losses=losses, log=log)
        turn = step - self.discriminator_warmup + 1
        if turn > 0 and turn % self.student_every == 0:
            log = {}

            # The student's last step is made again here, with a graph: its weights have not moved,
            # so the sample is the one that the discriminator was just updated on.
            def loss() -> Tensor:
                made = {**samples, "student": last_step(student, noisy, sigmas[-1], batch)}
                return self._student_loss(made, batch, roles["discriminator"], draws, log)

            yield Update(role="student", losses=[loss], log=log)

    def draw_timestep(self, step: int, generator: torch.Generator) -> float | None:
        """Draw the last timestep, Eq. 9.

        Args:
            step: number of the step in the phase.
            generator: random stream that is the same on all ranks.

        Returns:
            A timestep before the shift, or None for its final value.
        """
        step = max(0, step - self.discriminator_warmup)
        if self.warmup == "off" or step >= self.warmup_steps:
            return None
        progress = 1.0 if self.warmup == "uniform" else (step + 1) / self.warmup_steps
        return draw_last_timestep(self._old_timestep(), self._timesteps()[-1], generator, progress)

    @torch.no_grad()
    def _make_four_step(
        self, batch: Batch, noise: Tensor, roles: Mapping[str, Engine], draws: Draws
    ) -> Tensor:
        # With the student's noise: Eq. 10 needs no pairs, but pairs lower the variance [inferred].
        sigmas = to_sigmas(even_timesteps(FOUR_STEPS), self.shift)
        if self.four_step == "frozen":
            model = roles["four_step"].module
        else:
            discriminator = roles["discriminator"].module
            assert isinstance(discriminator, Discriminator)
            model = discriminator.backbone
        with adapters_off(model):
            noisy = denoise_no_grad(model, sigmas, batch, noise, draws.own("four-step renoise"))
            return last_step(model, noisy, sigmas[-1], batch)

    def _present(
        self, samples: Samples, batch: Batch, draws: Draws, purpose: str
    ) -> tuple[Samples, Tensor]:
        """Return samples as they are scored, and the noise level for the discriminator."""
        purposed = f"{purpose} noise level"
        sigma_B = draw_sigmas(batch.size, self.discriminator_shift, draws, purposed)
        sigma_B = sigma_B.to(batch.latents_BCFHW.device)
        # Real samples are stored in float16. Rounding alone would reveal them to a discriminator
        # that computes in float32.
        samples = {name: round_as_stored(latents) for name, latents in samples.items()}
        if not self.scores_noisy:
            return samples, sigma_B
        noise = draw_noise(batch.latents_BCFHW, draws.own(f"{purpose} noise"))
        return {k: batch.add_noise(x, noise, sigma_B) for k, x in samples.items()}, sigma_B

    def _discriminator_losses(
        self,
        samples: Samples,
        batch: Batch,
        discriminator: Engine,
        penalty_weight: float,
        draws: Draws,
        log: dict[str, Tensor],
    ) -> Iterator[Callable[[], Tensor]]:
        """Yield Eq. 8, as a whole or one sample at a time."""
        scored, sigma_B = self._present(samples, batch, draws, "discriminator")
        inputs = dict(scored)
        if penalty_weight > 0:
            for name, latents in scored.items():
                noise = draw_noise(latents, draws.own(f"perturbation of {name}"))
                # Eq. 7 penalises (D(x) - D(x + s noise))^2: a finite difference in a random
                # direction, which in the mean over directions is s^2 times the squared norm of
                # D's gradient in x (R1, R2). A double backward pass, which R1 itself needs, is
                # thereby avoided. It perturbs the very tensor that is scored, so the difference
                # is that of one point; pinned frames are conditions, not samples, and stay.
                perturbed = latents + self.penalty_size * noise * batch.free_B1F11
                inputs[f"perturbed {name}"] = perturbed
        elif self.four_step_weight == 0:
            inputs.pop("four_step", None)  # no term of the loss uses it
        names, rows = list(inputs), list(inputs.values())
        loss = partial(self._discriminator_loss, names, penalty_weight, log)
        if not self.memory_light:

            def whole() -> Tensor:
                return loss(torch.stack([discriminator(x, sigma_B, batch) for x in rows]))

            yield whole
            return
        # The loss couples all logits (relativistic terms, penalties), but its gradient in the
        # weights is the sum over samples of dL/dlogit times dlogit/dweights. So all logits are
        # computed first, mostly without a graph; the loss is differentiated in the logits alone,
        # and each sample is backpropagated by itself with its share as a constant weight. Only
        # one graph of the discriminator is alive at a time. The last sample is called with a graph
        # at once, so it needs no second call.
        *earlier, last = rows
        found: list[Tensor] = []

        def share(logit_B: Tensor, value: Tensor, weight_B: Tensor) -> Tensor:
            weighted = (logit_B * weight_B).sum()
            # The values of the parts add up to the loss, their gradients to its gradient.
            return weighted - weighted.detach() + value / len(rows)

        def begin() -> Tensor:
            with torch.no_grad():
                logits = [discriminator.module(x, sigma_B, batch) for x in earlier]
            logit_B = discriminator(last, sigma_B, batch)
            found[:] = linearize(loss, torch.stack([*logits, logit_B.detach()]))
            return share(logit_B, found[0], found[1][-1])

        def go_on(number: int) -> Tensor:
            logit_B = discriminator(earlier[number], sigma_B, batch)
            return share(logit_B, found[0], found[1][number])

        yield begin
        for number in range(len(earlier)):
            yield partial(go_on, number)

    def _discriminator_loss(
        self,
        names: Sequence[str],
        penalty_weight: float,
        log: dict[str, Tensor],
        logits_KB: Tensor,
    ) -> Tensor:
        logits = dict(zip(names, logits_KB.unbind(), strict=True))
        real, student = logits["real"], logits["student"]
        loss = discriminator_loss(real, student, self.loss)
        log["adversarial_loss"] = loss.detach()
        log |= _compare_logits(logits)
        if self.four_step_weight > 0:
            loss = loss + self.four_step_weight * relativistic_loss(logits["four_step"], student)
        for name in names:
            if f"perturbed {name}" in logits:
                penalty = difference_penalty(logits[name], logits[f"perturbed {name}"])
                log[f"penalty_{name}"] = penalty.detach()
                loss = loss + penalty_weight * penalty
        return loss

    def _measures_floor(self, step: int) -> bool:
        # Not at the first step, where a new discriminator returns 0 for everything.
        every = self.penalty_floor_every
        return self.penalty_weight > 0 and every > 0 and step % every == min(1, every - 1)

    @torch.no_grad()
    def _measure_floor(
        self, samples: Samples, batch: Batch, discriminator: Engine, draws: Draws
    ) -> dict[str, Tensor]:
        """Measure the part of the penalties that is rounding of the discriminator.

        A perturbation of almost nothing changes the logits by their rounding error, which a larger
        perturbation has as well. The same noise is used in both sizes, so their ratio depends
        neither on the scale of the logits nor on the samples.
        """
        scored, sigma_B = self._present(samples, batch, draws, "discriminator")
        totals = {"penalty_floor": [], "penalty_response": []}
        for name, latents in scored.items():
            logit_B = discriminator.module(latents, sigma_B, batch)
            for number in range(FLOOR_DRAWS):
                noise = draw_noise(latents, draws.own(f"floor of {name} {number}"))
                noise = noise * batch.free_B1F11
                for term, size in zip(totals, (FLOOR_SIZE, self.penalty_size), strict=True):
                    perturbed_B = discriminator.module(latents + size * noise, sigma_B, batch)
                    totals[term].append(difference_penalty(logit_B, perturbed_B))
        return {term: torch.stack(found).mean() for term, found in totals.items()}

    def _student_loss(
        self,
        samples: Samples,
        batch: Batch,
        discriminator: Engine,
        draws: Draws,
        log: dict[str, Tensor],
    ) -> Tensor:
        """Compute Eq. 11; the discriminator is frozen, and only the student's logit has a graph."""
        scored, sigma_B = self._present(samples, batch, draws, "student")
        logits: dict[str, Tensor] = {}
        for name, latents in scored.items():
            with torch.set_grad_enabled(name == "student"):
                logits[name] = discriminator.module(latents, sigma_B, batch)
        loss = student_loss(logits["real"], logits["student"], self.loss)
        log["adversarial_loss"] = loss.detach()
        log |= _compare_logits(logits)
        # A student that is far from real samples gets little direction from them. The four-step
        # samples are a nearer target, and as they begin with the student's noise they differ from
        # its samples by the missing steps alone.
        if self.self_compare_weight > 0:
            compared = relativistic_loss(logits["student"], logits["four_step"])
            log["self_compare_loss"] = compared.detach()
            loss = loss + self.self_compare_weight * compared
        return loss


def _compare_logits(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return mean logits, their gaps, and how often real samples score above the student's."""
    means = {
        f"{name}_logit": logits[name].detach().mean()
        for name in ("real", "student", "four_step")
        if name in logits
    }
    means["logit_gap"] = means["real_logit"] - means["student_logit"]
    if "four_step" in logits:
        means["four_step_gap"] = means["four_step_logit"] - means["student_logit"]
    means["accuracy"] = (logits["real"] > logits["student"]).float().mean()
    return means
