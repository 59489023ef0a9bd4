"""Hooks of the trainer, called at the start of a phase, around each step and at its end.

A hook extends a run without a subclass of the trainer. It may read all public attributes of the
trainer: recipe, folder, engines, builder, device and state. It must not change weights or draw from
torch's global generator, because a resumed run repeats only what the trainer itself does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.trainer.trainer import Trainer


class Hook:
    """Base class of hooks; its methods do nothing.

    Every rank calls every hook, in the order of the trainer's list; a hook that writes files checks
    ``ranks.rank()`` itself. An exception ends the run, which can then be resumed. A resumed run
    repeats the calls since the last checkpoint.
    """

    def on_phase_start(self, trainer: Trainer) -> None:
        """Run when the engines of a phase are built or loaded, before its first step.

        Args:
            trainer: the trainer; its ``state`` contains the phase. A resumed phase starts at
                ``phase_step > 0``. If only the end of the phase was missing, ``phase_step`` is the
                number of its steps.
        """

    def on_step_start(self, trainer: Trainer) -> None:
        """Run before the updates of a step.

        Args:
            trainer: the trainer; its ``state`` counts the completed steps.
        """

    def on_step_end(self, trainer: Trainer, terms: Mapping[str, float]) -> None:
        """Run after a step is complete and logged, before its checkpoint is written.

        So hooks have run for every step that a checkpoint contains.

        Args:
            trainer: the trainer; its ``state`` includes this step.
            terms: terms by ``role/term``, as in the log, the same on all ranks.
        """

    def on_phase_end(self, trainer: Trainer) -> None:
        """Run after the last checkpoint and the final weights of a phase are written.

        Args:
            trainer: the trainer; its ``builder`` loads these weights.
        """
