"""Divergence check: stops a run on a term that is not finite, or that stays too large.

The checked terms have been averaged over all ranks, so all ranks stop at the same step. The last
checkpoint is older than the bad step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from turbotalk_core.errors import TrainingError


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """Limits of the divergence check.

    Attributes:
        largest: absolute value that no term may exceed for ``patience`` steps in a row.
        limits: limits of single terms instead, by name, for example ``generator/gradient_norm``.
        patience: number of steps in a row, at least 1.
    """

    largest: float = 1e6
    limits: Mapping[str, float] = field(default_factory=dict)
    patience: int = 10


class Guard:
    """Divergence check of the terms of a run.

    Args:
        settings: limits.

    Attributes:
        streaks: for each term above its limit, for how many steps in a row; part of a checkpoint.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.streaks: dict[str, int] = {}

    def check(self, step: int, terms: Mapping[str, float]) -> None:
        """Raise an error on terms that are not finite, before they reach the weights.

        Args:
            step: number of the step in the run, for the message.
            terms: values by name, the same on all ranks.

        Raises:
            TrainingError: if one or more terms are not finite.
        """
        bad = [f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"step {step}: {', '.join(bad)}; the weights of this step are lost, the last "
                "checkpoint is sound. Lower the learning rate of that role or its clip_norm, and "
                "start again"
            )

    def watch(self, step: int, terms: Mapping[str, float]) -> None:
        """Raise an error on terms that stay too large.

        Args:
            step: number of the step in the run, for the message.
            terms: values of one whole step, by name.

        Raises:
            TrainingError: if a term was above its limit for ``patience`` steps in a row.
        """
        settings = self.settings
        limits = {name: settings.limits.get(name, settings.largest) for name in terms}
        self.streaks = {
            name: self.streaks.get(name, 0) + 1
            for name, value in terms.items()
            if abs(value) > limits[name]
        }
        for name, streak in self.streaks.items():
            if streak >= settings.patience:
                raise TrainingError(
                    f"step {step}: {name} = {terms[name]:.4g} has been above {limits[name]:.4g} "
                    f"for {streak} steps: the run diverges. Go back to an earlier checkpoint with "
                    "a lower learning rate, or raise guard.limits in the recipe if this is right"
                )
