"""When a run must stop: a term that is not a number, or one that has run away.

What it judges has been averaged over all ranks, so all ranks stop at the same place, and the last
checkpoint is from before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from turbotalk_core.errors import TrainingError


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """What is too much.

    Attributes:
        largest: size that no term may have for ``patience`` steps in a row.
        limits: the same of single terms, by name, for example ``generator/gradient_norm``.
        patience: steps in a row, at least 1.
    """

    largest: float = 1e6
    limits: Mapping[str, float] = field(default_factory=dict)
    patience: int = 10


class Guard:
    """Watches the terms of a run.

    Args:
        settings: what is too much.

    Attributes:
        streaks: of each term that is too large, for how many steps it has been; part of a
            checkpoint.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.streaks: dict[str, int] = {}

    def check(self, step: int, terms: Mapping[str, float]) -> None:
        """Refuse terms that are not finite, before they reach the weights.

        Args:
            step: of the run, for the message.
            terms: by name, the same on all ranks.

        Raises:
            TrainingError: one or more are not finite.
        """
        bad = [f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"step {step}: {', '.join(bad)}; the weights of this step are lost, the last "
                "checkpoint is sound. Lower the learning rate of that role or its clip_norm, and "
                "start again"
            )

    def watch(self, step: int, terms: Mapping[str, float]) -> None:
        """Refuse terms that stay too large.

        Args:
            step: of the run, for the message.
            terms: those of one whole step, by name.

        Raises:
            TrainingError: a term was above its limit for ``patience`` steps in a row.
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
