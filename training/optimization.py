"""What every training loop here shares: the learning rate, weights averaged and extrapolated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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


def extrapolate(
    begin: Mapping[str, Tensor], end: Mapping[str, Tensor], factor: float
) -> dict[str, Tensor]:
    """Go on along the straight line that training went.

    Args:
        begin: weights before.
        end: weights after, in float32, with the same names.
        factor: 1 gives ``end``, 2 goes as far again.

    Returns:
        begin + factor (end - begin), in float32.

    Source: ExPO, arXiv 2404.16792.
    """
    return {name: begin[name].float().lerp(weight, factor) for name, weight in end.items()}


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal, for matrices [rows, columns].

    Like ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, but in float32 and with equal
    shapes batched: that one computes in bfloat16, which many CPUs only emulate.

    Args:
        matrices: weights of two axes.
        rate: learning rate; scaled so that an update has the size of one of AdamW.
        weight_decay: decoupled, as AdamW's.
        momentum: of the gradient, Nesterov's form.

    Source: Jordan et al., Muon (2024): five Newton-Schulz iterations
    x <- a x + (b y + c y^2) x with y = x x^T; Moonlight (2502.16982): the factor
    0.2 sqrt(max(rows, columns)).
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    NUM_ITERATIONS = 5

    def __init__(
        self,
        matrices: Sequence[Tensor],
        rate: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": rate, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(matrices, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights that have a gradient.

        Args:
            closure: not supported.
        """
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                direction = self.orthogonalize(
                    torch.stack([self._follow(weight, group["momentum"]) for weight in weights])
                )
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for weight, update in zip(weights, direction, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-scale)

    def _follow(self, weight: nn.Parameter, momentum: float) -> Tensor:
        assert weight.grad is not None
        buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)

    @classmethod
    def orthogonalize(cls, matrices: Tensor) -> Tensor:
        """Bring all singular values of some matrices near 1.

        Args:
            matrices: [count, rows, columns].

        Returns:
            The same shape.
        """
        a, b, c = cls.COEFFICIENTS
        is_tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.transpose(1, 2) if is_tall else matrices
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(cls.NUM_ITERATIONS):
            y = x @ x.transpose(1, 2)
            x = a * x + (b * y + c * y @ y) @ x
        return x.transpose(1, 2) if is_tall else x


class Optimizers:
    """Muon for the matrices and convolution kernels of a network, AdamW for everything else.

    Muon is an optimiser of matrices; a kernel is one, [out, in * height * width], and is stepped
    through a view of that shape. The embedded VAE learns in far fewer updates with it than with
    AdamW alone.

    Args:
        matrices: weights of two or more axes inside the network.
        others: embeddings, heads, gains and biases.
        matrix_rate: peak learning rate of Muon, scaled to AdamW's step size.
        other_rate: peak learning rate of AdamW.
        weight_decay: of both.

    Source: Jordan et al., Muon (2024); Moonlight (2502.16982) for the scale.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        *,
        matrix_rate: float,
        other_rate: float,
        weight_decay: float,
    ) -> None:
        self._matrices = list(matrices)
        self._views = [nn.Parameter(weight.detach().flatten(1)) for weight in matrices]
        self._parameters = [*matrices, *others]
        self._rates = (matrix_rate, other_rate)
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            Muon(self._views, matrix_rate, weight_decay),
            torch.optim.AdamW(others, other_rate, betas=(0.9, 0.99), weight_decay=weight_decay),
        )

    def step(self, factor: float, limit: float = 1.0) -> None:
        """Update from the gradients and forget them.

        Args:
            factor: share of the peak learning rates.
            limit: largest gradient norm; longer ones are scaled down.

        Raises:
            FloatingPointError: a gradient is not finite.
        """
        clip_gradients(self._parameters, limit)
        for view, weight in zip(self._views, self._matrices, strict=True):
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        for weight in self._parameters:
            weight.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """Give what ``load_state_dict`` takes."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Go on from a state."""
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)


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
