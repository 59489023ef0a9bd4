"""Engines: one network each, with its optimiser and its average.

Methods and the training loop use the protocol ``Engine``. ``PlainEngine`` is for one device and
needs only torch; the engine of ``deepspeed_engine`` is for several. Both compute the same;
``PlainEngine`` is the reference.
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
"""Dtype of the weights in memory, by precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Optimisation settings of one network.

    Attributes:
        learning_rate: peak learning rate.
        betas: betas of AdamW, both floats.
        weight_decay: decoupled weight decay.
        clip_norm: largest norm of the whole gradient; a larger gradient is scaled down to it.
        optimizer: AdamW for all weights, or Muon for the matrices inside blocks and AdamW for the
            rest (plain engine only).
        precision: precision of weights and gradients; in bfloat16 the optimiser steps float32
            copies. Mixed is float32 with network calls in bfloat16, by the loop's autocast (plain
            engine only).
        ema_decay: decay of the weights' average per update; None for no average.
        ema_start: updates before the average begins; until then it equals the weights.
        uses_checkpointing: whether the backward pass recomputes blocks instead of storing them.
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
    """Measurements of one optimiser step.

    Attributes:
        gradient_norm: norm of the whole gradient over all ranks, before clipping.
    """

    gradient_norm: float


class Engine(Protocol):
    """Network with an optimiser.

    Attributes:
        module: the network itself, for calls that are not followed by a step of this network. The
            graph of another role's loss must go through it, never through the engine.
    """

    module: nn.Module

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call the network for a loss that this engine steps on."""
        ...

    def set_trainable(self, *, yes: bool) -> None:
        """Make the trained weights require gradients, or not."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the gradient of the next step."""
        ...

    def step(self, factor: float) -> StepReport:
        """Update the weights and clear the gradient; if its norm is not finite, keep the weights.

        Args:
            factor: share of the peak learning rate.

        Returns:
            Measurements of the step.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write everything that ``load`` reads; every rank must call it."""
        ...

    def load(self, folder: Path) -> None:
        """Load the state that ``save`` wrote; every rank must call it."""
        ...

    def export(self) -> dict[str, Tensor]:
        """Return all weights in float32 on the CPU, averaged if there is an average.

        Every rank must call it; on ranks other than 0 the result may be empty.
        """
        ...

    def close(self) -> None:
        """Free the memory; the engine must not be used afterwards."""
        ...


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return a context in which network calls compute in bfloat16 if the precision is mixed.

    Args:
        device: device of the networks.
        precision: precision of the engines.

    Returns:
        The context for network calls; backward passes belong outside it.
    """
    # Without autocast's cache: in some releases of torch it keeps a copy of a weight that was cast
    # without a gradient.
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "mixed", cache_enabled=False
    )


class PlainEngine:
    """Engine for one network on one device, without DeepSpeed.

    Args:
        module: the network; its weights that require gradients are trained.
        settings: optimisation settings.
        device: device of the network; None for the CPU.
    """

    FILE = "plain.pt"

    def __init__(
        self, module: nn.Module, settings: EngineSettings, device: torch.device | None = None
    ) -> None:
        self.settings = settings
        self.module = module.to(device or "cpu", DTYPES[settings.precision])
        set_checkpointing(self.module, uses=settings.uses_checkpointing)
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        # The optimiser's float32 copies; float32 weights are used themselves, without a copy.
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
        """Call the network for a loss that this engine steps on."""
        return self.module(*inputs, **named)

    def set_trainable(self, *, yes: bool) -> None:
        """Make the trained weights require gradients, or not."""
        for weight in self._trained.values():
            weight.requires_grad_(yes)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the gradient of the next step."""
        loss.backward()

    @torch.no_grad()
    def step(self, factor: float) -> StepReport:
        """Update the weights and clear the gradient; if its norm is not finite, keep the weights.

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
        """Write everything that ``load`` reads; frozen weights never change and are not written.

        Args:
            folder: folder of this engine only; created if it does not exist.
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
        """Load the state that ``save`` wrote.

        Args:
            folder: folder passed to ``save``.

        Raises:
            CheckpointError: if it contains no state of a plain engine, a damaged one, or that of
                another network.
        """
        path = folder / self.FILE
        if not path.is_file():
            raise CheckpointError(
                f"there is no {path.name} in {folder}; a run goes on with the kind of engine that "
                "wrote its checkpoints (engine.kind in the recipe)"
            )
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            check_same_network(self._masters, state["weights"], folder)
            self._fill(state)
        except (CheckpointError, MemoryError, torch.OutOfMemoryError):
            raise
        # torch raises a different kind for each way to be damaged.
        except Exception as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}); delete {folder.parent}, and the run "
                "goes on from the checkpoint before it"
            ) from error

    def _fill(self, state: Mapping[str, Any]) -> None:
        for name, master in self._masters.items():
            master.copy_(state["weights"][name])
        self._round()
        self._optimizers.load_state_dict(state["optimizers"])
        if self._average is not None:
            for name, shard in self._average.shards.items():
                shard.copy_(state["average"][name])
            self._average.num_updates = state["num_updates"]

    def export(self) -> dict[str, Tensor]:
        """Return all weights in float32 on the CPU, averaged if there is an average."""
        weights = {**self.module.state_dict(), **self._masters}
        if self._average is not None:
            weights |= self._average.shards
        return {name: weight.detach().float().cpu().clone() for name, weight in weights.items()}

    def close(self) -> None:
        """Do nothing: memory is freed with the last reference to the engine."""


def set_checkpointing(module: nn.Module, *, uses: bool) -> None:
    """Turn recomputation on or off in every transformer inside a network."""
    for part in module.modules():
        if hasattr(part, "uses_checkpointing"):
            part.uses_checkpointing = uses  # pyright: ignore[reportArgumentType]


def check_same_network(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], source: Path
) -> None:
    """Check that weights have the names and shapes of a network.

    Args:
        expected: weights of the network.
        got: weights that were read.
        source: file or folder they were read from, for messages.

    Raises:
        CheckpointError: if names or shapes differ.
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
