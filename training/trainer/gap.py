"""Logit gap of an adversarial phase: how often the discriminator saw a difference, and its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.recipe import GapSeenAndClosed

GAP = "discriminator/logit_gap"
SEEN = 0.05  # a discriminator whose logits differ by less has hardly learnt a difference


class GapWatch:
    """Logit gap of the steps of one phase; without this term all methods do nothing.

    Args:
        ends: condition that ends the phase; None for none.
        state: result of ``to_plain``, to continue from a checkpoint.
        num_alone: first steps of the phase, in which the discriminator is updated alone. They do
            not count for the condition, because only a student can close a gap.
    """

    def __init__(
        self,
        ends: GapSeenAndClosed | None = None,
        state: Mapping[str, Any] | None = None,
        num_alone: int = 0,
    ) -> None:
        state = state or {}
        self._ends = ends
        self._num_alone = num_alone
        self.num_steps: int = state.get("num_steps", 0)
        self.num_seen: int = state.get("num_seen", 0)
        self._recent: list[float] = list(state.get("recent", ()))
        self._was_seen: bool = state.get("was_seen", False)

    def to_plain(self) -> dict[str, Any]:
        """Return the state in plain values, for a checkpoint."""
        return {
            "num_steps": self.num_steps,
            "num_seen": self.num_seen,
            "recent": self._recent,
            "was_seen": self._was_seen,
        }

    def add(self, terms: Mapping[str, float]) -> dict[str, float]:
        """Count the gap of a step.

        Args:
            terms: terms of the step, the same on all ranks.

        Returns:
            ``discriminator/gap_share``, the share of the phase's steps so far with a gap above
            0.05; nothing if the step has no gap.
        """
        if GAP not in terms:
            return {}
        self.num_steps += 1
        self.num_seen += terms[GAP] > SEEN
        if self._ends is not None and self.num_steps > self._num_alone:
            self._recent = [*self._recent, terms[GAP]][-self._ends.window :]
            self._was_seen |= self._is_full and self._mean > self._ends.seen
        return {"discriminator/gap_share": self.num_seen / self.num_steps}

    @property
    def is_over(self) -> bool:
        """Whether the gap was seen and is closed."""
        ends = self._ends
        return ends is not None and self._was_seen and self._is_full and self._mean <= ends.closed

    @property
    def _is_full(self) -> bool:
        return self._ends is not None and len(self._recent) == self._ends.window

    @property
    def _mean(self) -> float:
        return sum(self._recent) / len(self._recent)

    def describe(self) -> str | None:
        """Describe the phase in a sentence; None without a gap."""
        if not self.num_steps:
            return None
        share = self.num_seen / self.num_steps
        text = f"the logit gap was above {SEEN} in {share:.0%} of {self.num_steps} steps"
        if share < 0.5:
            text += (
                "; in the others the student may have moved by noise. Give the phase more steps or "
                "discriminator_warmup, the discriminator a higher rate, or the penalties a smaller "
                "weight"
            )
        return text
