"""Hooks of the trainer: what else is done at the start of a phase, around steps and at its end.

A hook extends a run without a subclass of the trainer. It may read everything public of the
trainer: its recipe, folder, engines, builder, device and state. It must not change weights or draw
from torch's global generator, because a resumed run repeats only what the trainer itself does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.trainer.trainer import Trainer


class Hook:
    """Base class whose methods do nothing.

    Every rank calls every hook, in the order of the list that the trainer was given; a hook that
    writes files checks ``ranks.rank()`` itself. An exception ends the run and leaves it resumable.
    After a resume some calls are made again: those since the last checkpoint.
    """

    def on_phase_start(self, trainer: Trainer) -> None:
        """Run when the engines of a phase are built or loaded, before its first step.

        Args:
            trainer: its ``state`` names the phase. A resumed phase starts at ``phase_step > 0``,
                and one of which only the end was missing at the number of its steps.
        """

    def on_step_start(self, trainer: Trainer) -> None:
        """Run before the updates of a step.

        Args:
            trainer: its ``state`` counts the steps that were made before.
        """

    def on_step_end(self, trainer: Trainer, terms: Mapping[str, float]) -> None:
        """Run when a step is made and logged, before a checkpoint of it is written.

        So every step that a checkpoint contains has had its hooks.

        Args:
            trainer: its ``state`` counts this step.
            terms: by ``role/term``, as in the log, the same on all ranks.
        """

    def on_phase_end(self, trainer: Trainer) -> None:
        """Run when the last checkpoint of a phase and the weights that it ended with are written.

        Args:
            trainer: its ``builder`` loads these weights.
        """
