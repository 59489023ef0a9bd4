"""What every training loop here shares: learning-rate schedule, weight averaging, seeding."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def cosine_factor(
    step: int, num_steps: int, *, num_warmup_steps: int, floor: float = 0.02
) -> float:
    """The learning rate at a step, as a share of its peak.

    Args:
        step: 0 for the first update.
        num_steps: of the whole run.
        num_warmup_steps: updates of linear warm-up.
        floor: share left at the end.

    Returns:
        A factor in (0, 1].
    """
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Ema:
    """A running average of weights, which is what a run ships.

    The decay grows from the first updates on, so that early weights are forgotten.

    Args:
        module: its parameters are averaged.
        decay: upper bound of the decay per update.
    """

    def __init__(self, module: nn.Module, decay: float = 0.998) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {
            name: weight.detach().clone() for name, weight in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's weights after an optimiser step."""
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (self.num_updates + 10))
        for name, weight in module.named_parameters():
            self.weights[name].lerp_(weight, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's weights with the average."""
        for name, weight in module.named_parameters():
            weight.copy_(self.weights[name])


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale gradients down to a total norm.

    Args:
        parameters: of one optimiser.
        limit: largest norm allowed.

    Returns:
        The norm before clipping.

    Raises:
        FloatingPointError: the norm is NaN or infinite; the run must not go on.
    """
    norm = float(nn.utils.clip_grad_norm_(list(parameters), limit))
    if not math.isfinite(norm):
        raise FloatingPointError("the gradient is not finite; lower the learning rate")
    return norm
