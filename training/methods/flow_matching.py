"""Flow matching: training or fine-tuning a teacher on data alone.

Each chunk is noised to one random level. In some chunks the audio or the text is replaced by its
null condition, which the teacher needs to learn for guidance.

Axes: B batch, C channels, F latent frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from training.engine.engine import Engine
from training.engine.rng import Draws
from training.methods.losses import flow_loss
from training.methods.method import (
    Learning,
    Positive,
    RoleSpec,
    Share,
    Update,
    describe_latents,
    draw_noise,
)
from training.methods.timesteps import draw_sigmas
from training.models.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowMatching:
    """Settings of flow matching.

    Attributes:
        teacher: training settings of the teacher.
        shift: flow shift of the noise levels; the larger, the more levels are near 1.
        audio_dropout: fraction of chunks with null audio.
        text_dropout: fraction of chunks with the null text, drawn independently.
    """

    teacher: Learning = Learning(learning_rate=1e-5, betas=(0.9, 0.999))
    shift: Positive = 7.0
    audio_dropout: Share = 0.1
    text_dropout: Share = 0.1

    def roles(self) -> dict[str, RoleSpec]:
        """Return its one role: the teacher."""
        return {"teacher": RoleSpec(begins_with="teacher", learning=self.teacher)}

    def updates(
        self, step: int, batch: Batch, roles: Mapping[str, Engine], draws: Draws
    ) -> Iterator[Update]:
        """Make the single update of a step.

        Args:
            step: number of the step in the phase.
            batch: real chunks.
            roles: engine of the teacher.
            draws: random streams of this step.

        Yields:
            The update.
        """
        log: dict[str, Tensor] = {}

        def loss() -> Tensor:
            clean = batch.latents_BCFHW
            noise = draw_noise(clean, draws.own("noise"))
            sigma_B = draw_sigmas(batch.size, self.shift, draws, "noise level").to(clean.device)
            velocity = roles["teacher"](
                batch.add_noise(clean, noise, sigma_B),
                sigma_B,
                batch,
                uses_audio=_keep(batch, self.audio_dropout, draws.own("audio dropout")),
                uses_text=_keep(batch, self.text_dropout, draws.own("text dropout")),
            )
            value = flow_loss(velocity, noise - clean, batch.free_B1F11, batch.weight_BHW)
            log["flow_loss"] = value.detach()
            log.update(describe_latents("real", clean))
            return value

        yield Update(role="teacher", losses=[loss], log=log)


def _keep(batch: Batch, dropout: float, generator: torch.Generator) -> Tensor:
    kept_B = torch.rand(batch.size, generator=generator) >= dropout
    return kept_B.to(batch.latents_BCFHW.device)
