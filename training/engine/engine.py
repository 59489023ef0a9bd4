"""What steps a network: the protocol that methods and the loop are written against.

An engine holds one network (a role), its optimiser and its average. ``PlainEngine`` is for one
device and needs nothing but torch; ``deepspeed_engine`` has the other. Both compute the same, and
the plain one says what that is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from training.engine.optimizers import Average, Optimizers, list_block_matrices
from turbotalk_core.errors import CheckpointError

BUCKET_SIZE = 200_000_000  # gradients that DeepSpeed sends at a time
Precision = Literal["float32", "mixed", "bfloat16"]
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "mixed": torch.float32,
    "bfloat16": torch.bfloat16,
}
"""Of weights in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How one network is stepped.

    Attributes:
        learning_rate: peak.
        betas: of AdamW, both floats.
        weight_decay: decoupled.
        clip_norm: largest norm of the whole gradient; longer ones are scaled down to it.
        optimizer: AdamW for all weights, or Muon for the matrices inside blocks and AdamW for the
            rest (plain engine alone).
        precision: of weights and gradients; in bfloat16 the optimiser steps float32 copies. Mixed
            is float32 with network calls in bfloat16 (autocast), which the loop sees to (plain
            engine alone).
        ema_decay: of the average of the weights per update; None keeps none.
        ema_start: updates before the average begins; until then it is the weights themselves.
        uses_checkpointing: recompute blocks in the backward pass instead of storing them.
    """

    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    precision: Precision = "float32"
    ema_decay: float | None = None
    ema_start: int = 0
    uses_checkpointing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a step was.

    Attributes:
        gradient_norm: of the whole gradient over all ranks, before clipping.
    """

    gradient_norm: float


class Engine(Protocol):
    """One network that can be stepped.

    Attributes:
        module: the network itself, for whoever calls it without stepping it. Another role's graph
            goes through this alone, never through the engine.
    """

    module: nn.Module

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call the network in order to step it."""
        ...

    def set_trainable(self, *, yes: bool) -> None:
        """Let the trained weights require gradients, or none."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to what the next step takes."""
        ...

    def step(self, factor: float) -> StepReport:
        """Update the weights and forget the gradient.

        Args:
            factor: share of the peak learning rate.

        Returns:
            What it was.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write all that ``load`` needs; every rank calls it."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote; every rank calls it."""
        ...

    def export(self) -> dict[str, Tensor]:
        """Give all weights in float32 on the CPU, averaged where an average is kept.

        Every rank calls it; ranks other than 0 may get nothing.
        """
        ...

    def close(self) -> None:
        """Give the memory back; the engine is not used any more."""
        ...


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Compute network calls in bfloat16 where the precision is mixed.

    Args:
        device: of the networks.
        precision: of an engine.

    Returns:
        What calls are made in; backward passes are made outside.
    """
    # Without its cache, in which some releases of torch keep a weight's copy that was made without
    # a gradient.
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "mixed", cache_enabled=False
    )


class PlainEngine:
    """One network on one device, without DeepSpeed.

    Args:
        module: to be stepped where some of its weights require gradients.
        settings: how.
        device: where it lives.
    """

    FILE = "plain.pt"

    def __init__(
        self, module: nn.Module, settings: EngineSettings, device: torch.device | None = None
    ) -> None:
        self.settings = settings
        self.module = module.to(device or "cpu", DTYPES[settings.precision])
        set_checkpointing(self.module, uses=settings.uses_checkpointing)
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        # The optimiser's own copies; of float32 weights these are the weights themselves.
        self._masters = {
            name: nn.Parameter(weight.detach().float())
            if DTYPES[settings.precision] != torch.float32
            else weight
            for name, weight in self._trained.items()
        }
        self._optimizers = Optimizers(
            self._masters,
            list_block_matrices(self.module) if settings.optimizer == "muon" else (),
            rate=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self._average = None
        if settings.ema_decay is not None and self._trained:
            self._average = Average(self._masters, settings.ema_decay, settings.ema_start)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call the network in order to step it."""
        return self.module(*inputs, **named)

    def set_trainable(self, *, yes: bool) -> None:
        """Let the trained weights require gradients, or none."""
        for weight in self._trained.values():
            weight.requires_grad_(yes)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to what the next step takes."""
        loss.backward()

    @torch.no_grad()
    def step(self, factor: float) -> StepReport:
        """Update the weights and forget the gradient; a norm that is not finite changes nothing.

        Args:
            factor: share of the peak learning rate.

        Returns:
            The norm of the gradient.
        """
        for name, master in self._masters.items():
            weight = self._trained[name]
            if master is not weight:
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        norm = self._optimizers.step(factor, self.settings.clip_norm)
        if math.isfinite(norm):
            self._round()
            if self._average is not None:
                self._average.update(self._masters)
        return StepReport(gradient_norm=norm)

    def _round(self) -> None:
        for name, master in self._masters.items():
            if master is not self._trained[name]:
                self._trained[name].copy_(master)

    def save(self, folder: Path) -> None:
        """Write all that ``load`` needs; frozen weights, which nothing changes, are not part of it.

        Args:
            folder: of this engine alone; made where it does not exist.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "weights": {name: master.detach() for name, master in self._masters.items()},
            "optimizers": self._optimizers.state_dict(),
        }
        if self._average is not None:
            state["average"] = self._average.shards
            state["num_updates"] = self._average.num_updates
        torch.save(state, folder / self.FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote.

        Args:
            folder: that ``save`` was given.

        Raises:
            CheckpointError: it holds no state of this engine, or one of another network.
        """
        path = folder / self.FILE
        if not path.is_file():
            raise CheckpointError(
                f"there is no {path.name} in {folder}; a run goes on with the kind of engine that "
                "wrote its checkpoints (engine.kind in the recipe)"
            )
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        check_same_network(self._masters, state["weights"], folder)
        for name, master in self._masters.items():
            master.copy_(state["weights"][name])
        self._round()
        self._optimizers.load_state_dict(state["optimizers"])
        if self._average is not None:
            for name, shard in self._average.shards.items():
                shard.copy_(state["average"][name])
            self._average.num_updates = state["num_updates"]

    def export(self) -> dict[str, Tensor]:
        """Give all weights in float32 on the CPU, averaged where an average is kept."""
        weights = {**self.module.state_dict(), **self._masters}
        if self._average is not None:
            weights |= self._average.shards
        return {name: weight.detach().float().cpu().clone() for name, weight in weights.items()}

    def close(self) -> None:
        """Give the memory back, which takes nothing here but to be forgotten."""


def set_checkpointing(module: nn.Module, *, uses: bool) -> None:
    """Turn recomputation on or off in every transformer inside a network."""
    for part in module.modules():
        if hasattr(part, "uses_checkpointing"):
            part.uses_checkpointing = uses  # pyright: ignore[reportArgumentType]


def check_same_network(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], source: Path
) -> None:
    """Refuse the weights of another network.

    Args:
        expected: the state of the network that is there.
        got: what was read.
        source: where it was read, for the message.

    Raises:
        CheckpointError: other names or shapes.
    """
    wrong = [
        name for name in expected.keys() | got.keys() if name not in expected or name not in got
    ]
    wrong += [
        name for name in expected.keys() & got.keys() if expected[name].shape != got[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"the weights in {source} are of another network: {len(wrong)} of {len(expected)} "
            f"tensors are missing, unknown or of another shape (first: {min(wrong)}); go on with "
            "the recipe that is stored with the run, or begin another run"
        )
