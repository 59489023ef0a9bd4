"""Continuation: training a few-step student to join the given frames without a visible seam.

A few-step student makes the first frames after the given ones like all others, with a small error.
Between chunks of a long video this error shows as a seam every three seconds. These frames are
nearly determined by the given ones, so a regression on real data suffices, without a discriminator.
The given frames are perturbed by the student's own error at the end of a chunk, as they are in a
long video. The student learns to start from the perturbed frames and to return to the data
gradually. Elsewhere its target is its output before this phase, so nothing else changes.

Axes: B batch, C channels, F latent frames, H height, W width.
Source: ours; the papers have no such phase.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.engine.engine import Engine
from training.engine.rng import Draws
from training.methods.losses import flow_loss
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
from training.methods.rollout import denoise_no_grad, last_step
from training.models.batch import Batch, to_device
from turbotalk_core.geometry import MASK_CHANNELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation(FewSteps):
    """Settings of continuation.

    Attributes:
        student: training settings of the student.
        border: length of the border, in latent frames after the given ones. The target moves
            linearly over it, from continuing the given frames to the student's earlier output.
        border_weight: loss weight of the first border frame; the weight of frames outside is 1.
        drift: largest perturbation of the given frames, as a multiple of the student's error at the
            end of a chunk; drawn uniformly from 0 to this for each chunk.
        anchored: fraction of chunks that start with the reference image, as in a request with
            ``anchors_chunks``.
    """

    student: Learning = Learning(learning_rate=4e-7)
    num_steps: Count = 1
    border: Count = 4
    border_weight: Positive = 4.0
    drift: Weight = 1.0
    anchored: Share = 0.5

    def roles(self) -> dict[str, RoleSpec]:
        """Return its roles: the student, and a frozen copy of its initial state."""
        return {
            "student": RoleSpec(begins_with="student", learning=self.student),
            "before": RoleSpec(begins_with="student"),
        }

    def updates(
        self, step: int, batch: Batch, roles: Mapping[str, Engine], draws: Draws
    ) -> Iterator[Update]:
        """Make the single update of a step.

        Args:
            step: number of the step in the phase.
            batch: real chunks, some of which continue from given frames.
            roles: engines by role.
            draws: random streams of this step.

        Yields:
            The update.
        """
        sigmas = self.sigmas()
        noise = draw_noise(batch.latents_BCFHW, draws.own("noise"))
        anchored_B = torch.rand(batch.size, generator=draws.own("anchor")) < self.anchored
        drift_B = self.drift * torch.rand(batch.size, generator=draws.own("drift"))
        drift_B = to_device(drift_B, batch.latents_BCFHW.device)
        batch = anchor(batch, to_device(anchored_B, batch.pinned_BF.device))
        border_B1F11 = weigh_border(batch, self.border)
        log: dict[str, Tensor] = {}

        def make(engine: Engine, chunks: Batch, *, learns: bool = False) -> Tensor:
            noisy = denoise_no_grad(engine.module, sigmas, chunks, noise, draws.own("renoise"))
            return last_step(engine if learns else engine.module, noisy, sigmas[-1], chunks)

        def loss() -> Tensor:
            with torch.no_grad():
                before = make(roles["before"], batch)
                error = (before - batch.latents_BCFHW) * drift_B.view(-1, 1, 1, 1, 1)
                shown = drift(batch, error)
                goal = batch.latents_BCFHW + error[:, :, -1:]
                target = before + border_B1F11 * (goal - before)
            sample = make(roles["student"], shown, learns=True)
            counts_B1F11 = batch.free_B1F11 * (1 + (self.border_weight - 1) * border_B1F11)
            value = flow_loss(sample, target, counts_B1F11, batch.weight_BHW)
            log["continuation_loss"] = value.detach()
            log["border_loss"] = flow_loss(sample.detach(), target, border_B1F11)
            log["border_before"] = flow_loss(before, batch.latents_BCFHW, border_B1F11)
            log.update(describe_latents("student", sample))
            return value

        yield Update(role="student", losses=[loss], log=log)


def anchor(batch: Batch, chosen_B: Tensor) -> Batch:
    """Replace the first latent frame of continuing chunks by the reference image.

    Args:
        batch: real chunks.
        chosen_B: True for the chunks to change; those that begin a video do not change.

    Returns:
        Chunks as the pipeline passes them to the network when it anchors.
    """
    latents = batch.latents_BCFHW
    image = batch.reference_BCFHW[:, MASK_CHANNELS:, :1].to(latents)
    chosen = (chosen_B & _goes_on(batch)).view(-1, 1, 1, 1, 1)
    head = torch.where(chosen, image, latents[:, :, :1])
    return replace(batch, latents_BCFHW=torch.cat((head, latents[:, :, 1:]), 2))


def weigh_border(batch: Batch, length: int) -> Tensor:
    """Compute the weight by which each latent frame should continue the given ones.

    Args:
        batch: chunks; those with one given frame begin a video and continue nothing.
        length: length of the border in latent frames.

    Returns:
        1 for the first frame after the given ones, falling linearly to 0 over ``length`` frames,
        and 0 elsewhere; float32, the shape of ``Batch.free_B1F11``.
    """
    num_given_B = batch.pinned_BF.sum(1)
    places_F = torch.arange(batch.pinned_BF.shape[1], device=batch.pinned_BF.device)
    behind_BF = places_F - num_given_B[:, None]
    share_BF = (1 - behind_BF / length).clamp(min=0) * (behind_BF >= 0)
    return (share_BF * _goes_on(batch)[:, None])[:, None, :, None, None].float()


def drift(batch: Batch, error_BCFHW: Tensor) -> Batch:
    """Add the error of the last frames of a chunk to its given frames.

    The first given frame does not change: it is a single image, sharp and often the reference
    image.

    Args:
        batch: real chunks.
        error_BCFHW: error of all latent frames.

    Returns:
        Chunks with perturbed given frames; those that begin a video do not change.
    """
    # Frame f of n given frames gets the error of frame F - n + f, so that the last gets the last.
    num_frames = batch.pinned_BF.shape[1]
    frames_F = torch.arange(num_frames, device=batch.pinned_BF.device)
    source_BF = (frames_F + num_frames - batch.pinned_BF.sum(1, keepdim=True)).clamp(
        max=num_frames - 1
    )
    moved = error_BCFHW.gather(2, source_BF[:, None, :, None, None].expand_as(error_BCFHW))
    given_BF = batch.pinned_BF & (frames_F > 0)
    latents = batch.latents_BCFHW
    drifted = torch.where(given_BF[:, None, :, None, None], latents + moved, latents)
    return replace(batch, latents_BCFHW=drifted)


def _goes_on(batch: Batch) -> Tensor:
    """Return for each chunk whether it has more than one given frame."""
    return batch.pinned_BF.sum(1) > 1
