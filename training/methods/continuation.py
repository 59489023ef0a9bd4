"""Continuation: a student learns to go on from the frames before a chunk without a step.

A student of few steps makes the first frames behind those it is given as it makes all others, and
so a little beside where they should be. Within a chunk nobody sees it; in a long video it is a seam
every three seconds. What comes next is nearly certain there, so it can be learnt from data alone,
without a judge. The student is shown real frames that are off as its own are at the end of a chunk,
and learns to begin where they are and to come back from there gradually. Everything else is to stay
as it was.

Axes: B batch, C channels, F latent frames, H height, W width.
Source: ours; the papers have no such phase.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.batch import Batch
from training.draws import Draws
from training.engine import Engine
from training.losses import flow_loss
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
from training.rollout import approach, finish
from turbotalk_core.geometry import MASK_CHANNELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation(FewSteps):
    """Settings of continuation.

    Attributes:
        student: how it learns.
        border: latent frames behind the given ones that are to continue these: the first in full,
            each later one less, and so many later the student is to do what it did.
        border_weight: how much the first of them counts, where all others count 1.
        drift: how far given frames may be off, in what the student is off at the end of a chunk;
            uniform from 0 to this for each chunk.
        anchored: share of chunks that begin with the reference image, as a request with
            ``anchors_chunks`` lets them.
    """

    student: Learning = Learning(learning_rate=4e-7)
    num_steps: Count = 1
    border: Count = 4
    border_weight: Positive = 4.0
    drift: Weight = 1.0
    anchored: Share = 0.5

    def roles(self) -> dict[str, RoleSpec]:
        """Name the networks it needs: the student, and the same as it was, frozen."""
        return {
            "student": RoleSpec(begins_with="student", learning=self.student),
            "before": RoleSpec(begins_with="student"),
        }

    def updates(
        self, step: int, batch: Batch, roles: Mapping[str, Engine], draws: Draws
    ) -> Iterator[Update]:
        """Make the one update of a step.

        Args:
            step: of the phase.
            batch: real chunks, of which some go on from given frames.
            roles: the engines.
            draws: of this step.

        Yields:
            The update.
        """
        sigmas = self.sigmas()
        noise = draw_noise(batch.latents_BCFHW, draws.own("noise"))
        anchored_B = torch.rand(batch.size, generator=draws.own("anchor")) < self.anchored
        drift_B = self.drift * torch.rand(batch.size, generator=draws.own("drift"))
        batch = anchor(batch, anchored_B.to(batch.pinned_BF.device))
        border_B1F11 = weigh_border(batch, self.border)
        log: dict[str, Tensor] = {}

        def make(engine: Engine, chunks: Batch, *, learns: bool = False) -> Tensor:
            noisy = approach(engine.module, sigmas, chunks, noise, draws.own("renoise"))
            return finish(engine if learns else engine.module, noisy, sigmas[-1], chunks)

        def loss() -> Tensor:
            with torch.no_grad():
                before = make(roles["before"], batch)
                error = (before - batch.latents_BCFHW) * drift_B.to(before).view(-1, 1, 1, 1, 1)
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
    """Let chunks that go on from given frames begin with the reference image.

    Args:
        batch: real chunks.
        chosen_B: which of them; those that begin with that image anyway do not change.

    Returns:
        The same chunks, as the pipeline shows them to the network where it anchors.
    """
    latents = batch.latents_BCFHW
    image = batch.reference_BCFHW[:, MASK_CHANNELS:, :1].to(latents)
    chosen = (chosen_B & _goes_on(batch)).view(-1, 1, 1, 1, 1)
    head = torch.where(chosen, image, latents[:, :, :1])
    return replace(batch, latents_BCFHW=torch.cat((head, latents[:, :, 1:]), 2))


def weigh_border(batch: Batch, length: int) -> Tensor:
    """Say how far each latent frame is to continue the given ones.

    Args:
        batch: chunks; those of which one frame is given begin a video and continue nothing.
        length: latent frames.

    Returns:
        1 for the first frame behind the given ones, falling linearly to 0 so many later, and 0
        elsewhere; float32, as ``Batch.free_B1F11``.
    """
    num_given_B = batch.pinned_BF.sum(1)
    places_F = torch.arange(batch.pinned_BF.shape[1], device=batch.pinned_BF.device)
    behind_BF = places_F - num_given_B[:, None]
    share_BF = (1 - behind_BF / length).clamp(min=0) * (behind_BF >= 0)
    return (share_BF * _goes_on(batch)[:, None])[:, None, :, None, None].float()


def drift(batch: Batch, error_BCFHW: Tensor) -> Batch:
    """Move the given frames by what is off in the last frames of a chunk.

    The first given frame stays: it is one picture, sharp and often the reference image.

    Args:
        batch: real chunks.
        error_BCFHW: of all latent frames.

    Returns:
        The same chunks with other given frames; those that begin a video do not change.
    """
    latents = batch.latents_BCFHW.clone()
    for row in torch.nonzero(_goes_on(batch)).flatten().tolist():
        num_given = int(batch.pinned_BF[row].sum())
        latents[row, :, 1:num_given] += error_BCFHW[row, :, 1 - num_given :]
    return replace(batch, latents_BCFHW=latents)


def _goes_on(batch: Batch) -> Tensor:
    """Of each chunk, whether it is given more than one frame to begin with."""
    return batch.pinned_BF.sum(1) > 1
