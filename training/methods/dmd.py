"""Distribution matching distillation (DMD): a few-step student from a many-step teacher (stage 1).

Noise is added to a sample of the student. The guided teacher and a fake score both predict the
clean sample. The fake score is trained on the student's samples alone, so it estimates the score
of the student's distribution. The student moves from the fake score's prediction towards the
teacher's. Student and fake score both start from the teacher.

Axes: B batch, C channels, F latent frames, H height, W width.
Source: TurboTalk, section 3.2; DMD2 (2405.14867); Self-Forcing (2506.08009).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from training.engine.engine import Engine
from training.engine.rng import Draws
from training.methods.losses import dmd_direction, dmd_loss, flow_loss, free_mean
from training.methods.method import (
    Count,
    FewSteps,
    Learning,
    Positive,
    RoleSpec,
    Share,
    Update,
    Weight,
    describe_latents,
    draw_noise,
)
from training.methods.rollout import denoise_no_grad, draw_exit, last_step
from training.methods.timesteps import draw_sigmas
from training.models.batch import Batch
from training.models.networks import predict_denoised
from turbotalk_core.errors import RecipeError
from turbotalk_core.sampling.guidance import guide
from turbotalk_core.sampling.steps import denoised_from_velocity


@dataclass(frozen=True, slots=True, kw_only=True)
class Dmd(FewSteps):
    """Settings of distribution matching distillation.

    Every step updates the fake score once. Every ``student_every``-th step updates the student
    before that. So the fake score has ``student_every`` updates for one of the student, which keeps
    it close to the student's current distribution.

    Attributes:
        student: training settings; rate [read: a third-party note: "about 4e-7"].
        fake_score: training settings [inferred: five times the student's rate].
        student_every: the student is updated once in so many steps [read: Self-Forcing, DMD2: 5].
        guidance_scale: text guidance of the teacher, in InfiniteTalk's convention, where 1 is off:
            uncond + s (cond - uncond). Self-Forcing and FastGen write s - 1.
        audio_guidance_scale: audio guidance of the teacher. With both the teacher makes three
            calls, with audio guidance alone two. 5 and 4 [read: InfiniteTalk's defaults].
        score_shift: flow shift of the noise levels at which the two scores are compared.
        lowest_score_sigma: smallest of these noise levels [read: Self-Forcing].
        highest_score_sigma: largest of these noise levels [read: Self-Forcing].
    """

    student: Learning = Learning(learning_rate=4e-7)
    fake_score: Learning = Learning(learning_rate=2e-6)
    num_steps: Count = 4
    student_every: Count = 5
    guidance_scale: Weight = 5.0
    audio_guidance_scale: Weight = 4.0
    score_shift: Positive = 5.0
    lowest_score_sigma: Share = 0.02
    highest_score_sigma: Share = 0.98

    def __post_init__(self) -> None:
        self.sigmas()
        if self.lowest_score_sigma >= self.highest_score_sigma:
            raise RecipeError(
                f"got lowest_score_sigma {self.lowest_score_sigma:g} and highest_score_sigma "
                f"{self.highest_score_sigma:g}; noise levels are drawn between them, so make the "
                "first one smaller"
            )

    def roles(self) -> dict[str, RoleSpec]:
        """Return its roles: student, fake score, and the frozen teacher."""
        return {
            "student": RoleSpec(
                begins_with="teacher", learning=self.student, every=self.student_every
            ),
            "fake_score": RoleSpec(begins_with="teacher", learning=self.fake_score),
            "teacher": RoleSpec(begins_with="teacher"),
        }

    def updates(
        self, step: int, batch: Batch, roles: Mapping[str, Engine], draws: Draws
    ) -> Iterator[Update]:
        """Make the updates of one step: the student's in its turn, and the fake score's.

        Args:
            step: number of the step in the phase.
            batch: conditions; of the real samples only the given latent frames are used.
            roles: engines by role.
            draws: random streams of this step.

        Yields:
            The updates.
        """
        sigmas = self.sigmas()
        last = draw_exit(len(sigmas), draws.shared("exit step"))
        noise = draw_noise(batch.latents_BCFHW, draws.own("noise"))
        # The rollout ends at a drawn step. So each step of the student is trained on the inputs
        # that its own earlier steps produce at inference, not on noised real latents, which do not
        # occur there.
        noisy = denoise_no_grad(
            roles["student"].module, sigmas[: last + 1], batch, noise, draws.own("renoise")
        )
        if (step + 1) % self.student_every == 0:
            made: list[Tensor] = []
            log: dict[str, Tensor] = {}

            def student_loss() -> Tensor:
                sample = last_step(roles["student"], noisy, sigmas[last], batch)
                made.append(sample.detach())
                return self._student_loss(sample, batch, roles, draws, log)

            yield Update(role="student", losses=[student_loss], log=log)
            # Made before the update: nearly the same distribution, and one rollout is saved.
            (sample,) = made
        else:
            with torch.no_grad():
                sample = last_step(roles["student"].module, noisy, sigmas[last], batch)
        fake_log: dict[str, Tensor] = {}

        # Flow matching on the student's own samples: the minimum is their posterior mean at each
        # noise level, which by Tweedie's formula is the score of the student's distribution.
        def fake_loss() -> Tensor:
            noise = draw_noise(sample, draws.own("fake noise"))
            sigma_B = self._draw_score_sigmas(batch, draws, "fake noise level")
            velocity = roles["fake_score"](batch.add_noise(sample, noise, sigma_B), sigma_B, batch)
            value = flow_loss(velocity, noise - sample, batch.free_B1F11, batch.weight_BHW)
            fake_log["fake_score_loss"] = value.detach()
            fake_log.update(describe_latents("student", sample))
            fake_log.update(describe_latents("real", batch.latents_BCFHW))
            return value

        yield Update(role="fake_score", losses=[fake_loss], log=fake_log)

    def _student_loss(
        self,
        sample: Tensor,
        batch: Batch,
        roles: Mapping[str, Engine],
        draws: Draws,
        log: dict[str, Tensor],
    ) -> Tensor:
        # The gradient of KL(student || teacher), averaged over noise levels, in a sample x is the
        # difference of the two scores at the noised x. With the predicted clean sample x0 a score
        # is ((1 - sigma) x0 - x) / sigma^2, so that difference is the one of the clean samples,
        # fake - real, up to a positive factor. Noise makes both distributions overlap; without it
        # the scores would be undefined where one of them has no mass. Nothing is differentiated
        # through the two networks: for the student the direction is a constant (see dmd_loss).
        with torch.no_grad():
            clean, free = sample.detach(), batch.free_B1F11
            noise = draw_noise(clean, draws.own("score noise"))
            sigma_B = self._draw_score_sigmas(batch, draws, "score noise level")
            noisy = batch.add_noise(clean, noise, sigma_B)
            fake = predict_denoised(roles["fake_score"].module, noisy, sigma_B, batch)
            real = self._predict_guided(roles["teacher"], noisy, sigma_B, batch)
            direction = dmd_direction(clean, fake, real, free)
            log["dmd_direction"] = free_mean(direction.abs(), free)
            log["teacher_distance"] = free_mean((clean - real).abs(), free)
        loss = dmd_loss(sample, direction, free)
        log["dmd_loss"] = loss.detach()
        return loss

    def _predict_guided(
        self, teacher: Engine, noisy: Tensor, sigma_B: Tensor, batch: Batch
    ) -> Tensor:
        def predict(uses_text: bool, uses_audio: bool) -> Tensor:
            return teacher.module(noisy, sigma_B, batch, uses_audio=uses_audio, uses_text=uses_text)

        # Without a text, both text predictions are equal: guidance would need a call for nothing.
        scale = self.guidance_scale if batch.has_text else 1.0
        velocity = guide(predict, scale, self.audio_guidance_scale)
        return denoised_from_velocity(noisy, velocity, sigma_B.view(-1, 1, 1, 1, 1))

    def _draw_score_sigmas(self, batch: Batch, draws: Draws, purpose: str) -> Tensor:
        sigma_B = draw_sigmas(
            batch.size,
            self.score_shift,
            draws,
            purpose,
            low=self.lowest_score_sigma,
            high=self.highest_score_sigma,
        )
        return sigma_B.to(batch.latents_BCFHW.device)
