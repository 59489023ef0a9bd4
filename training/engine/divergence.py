"""Divergence check: counts steps with terms that are not finite, and stops a run that diverges.

The checked terms have been averaged over all ranks, so all ranks stop at the same step. The last
checkpoint is older than the bad step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt

from turbotalk_core.errors import TrainingError

SKIPS = "skipped steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """Limits of the divergence check.

    Attributes:
        largest: absolute value that no term may exceed for ``patience`` steps in a row.
        limits: limits of single terms instead, by name, for example ``generator/gradient_norm``.
        patience: number of steps in a row, at least 1.
        most_skips: number of steps in a row in which a term may be not finite. The weights of that
            role stay as they are in such a step. One more step ends the run; 0 allows none.
        most_rounding: largest share of rounding in the discriminator's penalties; see
            ``Adversarial.penalty_floor_every``.
    """

    largest: float = 1e6
    limits: Mapping[str, float] = field(default_factory=dict)
    patience: int = 10
    most_skips: Annotated[int, Ge(0)] = 5
    most_rounding: Annotated[float, Gt(0)] = 0.1


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

    def check(self, step: int, terms: Mapping[str, float]) -> bool:
        """Find terms that are not finite, before they reach the weights.

        Args:
            step: number of the step in the run, for the message.
            terms: values by name, the same on all ranks.

        Returns:
            Whether all terms are finite.

        Raises:
            TrainingError: if one or more are not, and so it was in the last ``most_skips`` steps.
        """
        bad = [f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value)]
        skipped = self.streaks.get(SKIPS, 0)
        if bad and skipped >= self.settings.most_skips:
            before = f", after {skipped} steps in a row that were left out" if skipped else ""
            raise TrainingError(
                f"step {step}: {', '.join(bad)}{before}; the last checkpoint is sound. Lower the "
                "learning rate of that role or the clip_norm, or change salt for other draws, and "
                "run the same command again: it goes on from there"
            )
        return not bad

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
        self._check_rounding(step, terms)
        over = [name for name, value in terms.items() if abs(value) > limits[name]]
        over += [SKIPS] * any(name.endswith("/skipped") for name in terms)
        self.streaks = {name: self.streaks.get(name, 0) + 1 for name in over}
        for name, streak in self.streaks.items():
            if name != SKIPS and streak >= settings.patience:
                raise TrainingError(
                    f"step {step}: {name} = {terms[name]:.4g} has been above {limits[name]:.4g} "
                    f"for {streak} steps: the run diverges. Go back to an earlier checkpoint with "
                    "a lower learning rate, or raise guard.limits in the recipe if this is right"
                )

    def _check_rounding(self, step: int, terms: Mapping[str, float]) -> None:
        for name, floor in terms.items():
            role, slash, term = name.rpartition("/")
            response = terms.get(f"{role}{slash}penalty_response", 0.0)
            if term == "penalty_floor" and floor > self.settings.most_rounding * response:
                raise TrainingError(
                    f"step {step}: {floor:.3g} of the penalties' {response:.3g} is rounding, more "
                    f"than a share of {self.settings.most_rounding:g}; the {role} would be trained "
                    "on noise. Set a larger penalty_size, with a penalty_weight smaller by its "
                    "square, or engine.precision to mixed or float32"
                )
