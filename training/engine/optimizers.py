"""Learning rates, optimisers and weight averages, shared by all training loops."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn


def rate_factor(
    step: int,
    num_steps: int,
    *,
    num_warmup_steps: int,
    kind: Literal["constant", "cosine"] = "cosine",
    floor: float = 0.02,
    reaches_floor: bool = False,
) -> float:
    """Compute the learning rate at a step, as a share of its peak.

    Args:
        step: number of the update, from 0.
        num_steps: updates of the whole run.
        num_warmup_steps: updates over which the rate grows linearly, from 1 / num_warmup_steps on.
        kind: constant after the warm-up, or a cosine that falls to ``floor``.
        floor: share at the end of the cosine.
        reaches_floor: whether the last update has the share ``floor``; else the update after it
            would.

    Returns:
        A factor in [0, 1]; 0 is reached only with a floor of 0.
    """
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    if kind == "constant":
        return 1.0
    progress = (step + reaches_floor - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Average:
    """Exponential moving average of weights, or of one rank's shards of them.

    Single updates of a stochastic optimiser scatter around their common direction. The average
    cancels most of the scatter, so a run exports the average.

    Args:
        shards: float32 weights or shards by name; copied.
        decay: share of the old average that each update keeps.
        start: updates before the average begins; until then it equals the weights.
        grows: whether the decay of update n is limited to n / (n + 10), so that early weights lose
            their influence fast and the average covers many updates only later.
    """

    def __init__(
        self, shards: Mapping[str, Tensor], decay: float, start: int = 0, *, grows: bool = False
    ) -> None:
        self.decay = decay
        self.start = start
        self.grows = grows
        self.num_updates = 0
        self.shards = {name: shard.detach().clone() for name, shard in shards.items()}

    @torch.no_grad()
    def update(self, shards: Mapping[str, Tensor]) -> None:
        """Add the weights after an optimiser step to the average."""
        self.num_updates += 1
        decay = self.decay if self.num_updates > self.start else 0.0
        if self.grows:
            decay = min(decay, self.num_updates / (self.num_updates + 10))
        for name, shard in shards.items():
            self.shards[name].lerp_(shard, 1 - decay)

    @torch.no_grad()
    def copy_to(self, shards: Mapping[str, Tensor]) -> None:
        """Overwrite weights with the average."""
        for name, shard in shards.items():
            shard.copy_(self.shards[name])


def extrapolate(
    begin: Mapping[str, Tensor], end: Mapping[str, Tensor], factor: float
) -> dict[str, Tensor]:
    """Extrapolate weights along the straight line from before training to after it.

    Args:
        begin: weights before training.
        end: weights after training, in float32, with the same names.
        factor: 1 for ``end``, 2 for twice the distance from ``begin``.

    Returns:
        begin + factor (end - begin), in float32.

    Source: ExPO, arXiv 2404.16792.
    """
    return {name: begin[name].float().lerp(weight, factor) for name, weight in end.items()}


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum and orthogonalised updates, for matrices [rows, columns].

    The gradient of a weight matrix usually has a few large singular values and many small ones, so
    a plain step moves the layer's output along a few directions only. Replacing all singular values
    by 1 keeps the directions and makes the steps along them equally large: of all updates whose
    spectral norm is bounded, this one reduces the linearised loss most.

    The singular vectors are never computed. For G = U S V^T, an odd polynomial in G acts on the
    singular values alone: p(G) = a G + b (G G^T) G + c (G G^T)^2 G = U p(S) V^T. Iterating
    p(s) = a s + b s^3 + c s^5 drives every s in (0, 1] towards 1. The coefficients are those of the
    source: the steep slope a at 0 increases small values fast. In return the values end between
    about 0.7 and 1.2 instead of at 1, which does not matter for a direction.

    Equivalent to ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, but in float32 and
    with equal shapes batched. Torch's Muon computes in bfloat16, which many CPUs only emulate.

    Args:
        matrices: weights with two axes.
        rate: learning rate; scaled so that an update is as large as one of AdamW.
        weight_decay: decoupled weight decay, as in AdamW.
        momentum: Nesterov momentum of the gradient.

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
                # A matrix [n, m] with singular values 1 has root mean square 1 / sqrt(max(n, m)).
                # The factor makes it 0.2, as is usual for an AdamW update, so that both optimisers
                # can use the same learning rate.
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for weight, update in zip(weights, direction, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-scale)

    def _follow(self, weight: nn.Parameter, momentum: float) -> Tensor:
        """Update the momentum buffer, and return the Nesterov gradient."""
        assert weight.grad is not None
        buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)

    @classmethod
    def orthogonalize(cls, matrices: Tensor) -> Tensor:
        """Return matrices with the same singular vectors and all singular values near 1.

        Args:
            matrices: [count, rows, columns].

        Returns:
            The same shape.
        """
        a, b, c = cls.COEFFICIENTS
        # x x^T of a wide matrix is the smaller of the two products.
        is_tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.transpose(1, 2) if is_tall else matrices
        # The Frobenius norm bounds the largest singular value, so all of them start in [0, 1],
        # where the iteration converges.
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(cls.NUM_ITERATIONS):
            y = x @ x.transpose(1, 2)
            x = a * x + (b * y + c * y @ y) @ x
        return x.transpose(1, 2) if is_tall else x


class Optimizers:
    """Muon for chosen matrices and convolution kernels, AdamW for all other weights.

    Muon optimises matrices. A convolution kernel is stepped through a view as the matrix
    [out, in * height * width]. With Muon the embedded VAE needs far fewer updates than with AdamW
    alone.

    Args:
        weights: weights by name. Their order determines the rounding of the gradient's norm.
        matrices: names of the weights that Muon steps; they have two or more axes.
        rate: peak learning rate of both optimisers.
        betas: betas of AdamW.
        weight_decay: weight decay of both optimisers.

    Source: Jordan et al., Muon (2024); Moonlight (2502.16982) for the scale.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        matrices: Collection[str] = (),
        *,
        rate: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self._weights = list(weights.values())
        self._rate = rate
        self._matrices = [weight for name, weight in weights.items() if name in matrices]
        # A view shares its storage with the weight, so a step of the view updates the weight.
        self._views = [
            weight if weight.ndim == 2 else nn.Parameter(weight.detach().flatten(1))
            for weight in self._matrices
        ]
        others = [weight for name, weight in weights.items() if name not in matrices]
        self.optimizers: list[torch.optim.Optimizer] = []
        if self._views:
            self.optimizers.append(Muon(self._views, rate, weight_decay))
        if others:
            adam = torch.optim.AdamW(others, rate, betas=betas, weight_decay=weight_decay)
            self.optimizers.append(adam)

    def step(self, factor: float, limit: float) -> float:
        """Update the weights from their gradients and clear the gradients.

        Args:
            factor: share of the peak learning rate.
            limit: largest norm of the whole gradient; a longer one is scaled down to it.

        Returns:
            The norm before clipping. If it is not finite, no weight has changed.
        """
        norm = float(nn.utils.clip_grad_norm_(self._weights, limit))
        if math.isfinite(norm):
            for view, weight in zip(self._views, self._matrices, strict=True):
                if view is not weight:
                    view.grad = None if weight.grad is None else weight.grad.flatten(1)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self._rate * factor
                optimizer.step()
        for weight in (*self._weights, *self._views):
            weight.grad = None
        return norm

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the states that ``load_state_dict`` reads, one per optimiser."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the states of ``state_dict``, with this object's own rates and betas."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            load_moments(optimizer, state)


def load_moments(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of an optimiser except its settings, which the recipe decides.

    Args:
        optimizer: optimiser of the same weights.
        state: result of its ``state_dict``.
    """
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    own = [saved | {k: v for k, v in group.items() if k != "params"} for saved, group in groups]
    optimizer.load_state_dict({**state, "param_groups": own})


def check_norm(norm: float) -> None:
    """Check the norm of a gradient.

    Args:
        norm: result of ``Optimizers.step``.

    Raises:
        FloatingPointError: if it is NaN or infinite; the run must stop.
    """
    if not math.isfinite(norm):
        raise FloatingPointError("the gradient is not finite; lower the learning rate")


def list_block_matrices(module: nn.Module) -> set[str]:
    """Return the names of the weights with two axes inside the repeated blocks of a network."""
    return {
        f"{place}.{name}"
        for place, blocks in module.named_modules()
        if isinstance(blocks, nn.ModuleList)
        for name, weight in blocks.named_parameters()
        if weight.ndim == 2
    }
