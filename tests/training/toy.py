"""Run of a few seconds: small linear networks, and a method with the structure of the real ones.

A generator is trained to score high with a critic and to be near a frozen reference. The critic is
trained to distinguish the two, with two losses per update. Noise differs from slot to slot; one
random decision is common to all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.engine.divergence import GuardSettings
from training.engine.engine import Engine, EngineSettings, PlainEngine
from training.engine.rng import Draws
from training.methods.method import FROZEN, Learning, RoleSpec, Update
from training.recipe import (
    AverageChoice,
    BatchShape,
    CheckpointChoice,
    EngineChoice,
    Phase,
    RateSchedule,
    Recipe,
    WeightSource,
)
from training.trainer.roles import NetworkKind, RoleBuilder
from training.trainer.trainer import Trainer

WIDTH = 5
LEARNING = Learning(learning_rate=0.02, betas=(0.5, 0.9), weight_decay=0.01)


class Net(nn.Module):
    """Repeated blocks between two layers, one of which is used without a call."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.uses_checkpointing = False
        self.enter = nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.leave = nn.Linear(8, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, width] to [batch, out]."""
        x = nn.functional.linear(x.to(self.enter.weight.dtype), self.enter.weight, self.enter.bias)
        for block in self.blocks:
            if self.uses_checkpointing and torch.is_grad_enabled():
                recomputed = checkpoint(block, x, use_reentrant=False)
                assert isinstance(recomputed, Tensor)
                x = x + recomputed
            else:
                x = x + block(x)
        return self.leave(x).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyBatch:
    """Samples [batch, width]."""

    x: Tensor

    def to(self, device: torch.device) -> ToyBatch:
        """Move to a device."""
        return ToyBatch(x=self.x.to(device))


class ToyBatches:
    """Samples that depend on seed, step and slot."""

    def draw(self, seed: int, step: int, start: int, size: int) -> ToyBatch:
        """Draw the samples of a step; each micro-batch has a part of them."""
        generator = torch.Generator().manual_seed(seed + 1000 * step)
        return ToyBatch(x=torch.randn(64, WIDTH, generator=generator)[start : start + size])

    def stream(
        self, seed: int, first_step: int, *, rank: int, world_size: int, size: int
    ) -> Iterator[ToyBatch]:
        """Draw the samples of a micro-batch at each step."""
        assert rank < world_size
        for step in itertools.count(first_step):
            yield self.draw(seed, step, rank * size, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyMethod:
    """Method with a critic's update in every step, and a generator's in every second step.

    Attributes:
        noise: size of the generator's noise.
        explodes_at: step of the phase at which the critic's loss is not a number, -1 for none.
        reference: initial weights of the frozen role; None for no such role.
    """

    noise: float = 0.1
    explodes_at: int = -1
    reference: str | None = "teacher"
    learning: Learning = field(default=LEARNING)

    def roles(self) -> dict[str, RoleSpec]:
        """Return the networks by role."""
        roles = {
            "generator": RoleSpec(begins_with="teacher", learning=self.learning),
            "critic": RoleSpec(begins_with="judge", learning=self.learning),
        }
        if self.reference is not None:
            roles["reference"] = RoleSpec(begins_with=self.reference, learning=FROZEN)
        return roles

    def updates(
        self, step: int, batch: Any, roles: Mapping[str, Engine], draws: Draws
    ) -> Iterator[Update]:
        """Make the updates of a step."""
        size = batch.x.shape
        generator, critic = roles["generator"], roles["critic"]
        noisy = batch.x + self.noise * torch.randn(size, generator=draws.own("noise"))
        flips = torch.rand(1, generator=draws.shared("flip")).item() < 0.5
        noisy = -noisy if flips else noisy
        with torch.no_grad():
            made = generator.module(noisy)
        log: dict[str, Tensor] = {}

        def tell_real() -> Tensor:
            log["real"] = critic(batch.x).mean()
            return nn.functional.softplus(-critic(batch.x)).mean()

        def tell_made() -> Tensor:
            loss = nn.functional.softplus(critic(made)).mean()
            return loss * float("nan") if step == self.explodes_at else loss

        yield Update(role="critic", losses=[tell_real, tell_made], log=log)
        if step % 2:
            return

        def please() -> Tensor:
            return -critic.module(generator(noisy)).mean()

        def stay() -> Tensor:
            with torch.no_grad():
                target = roles["reference"].module(noisy) if self.reference else noisy
            return (generator(noisy) - target).square().mean()

        yield Update(role="generator", losses=[please, stay])


def load(source: WeightSource, device: str = "cpu") -> Net:
    """Draw a network with the sizes and the seed of a source."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(source.video.get("seed", 0))
        return Net(source.video["out"])


def prepare(spec: RoleSpec, network: nn.Module) -> nn.Module:
    """Set whether a network requires gradients."""
    return network.requires_grad_(spec.learning.trains != "frozen")


KIND = NetworkKind(load=load, sketch=functools.partial(load, device="meta"), prepare=prepare)


def make_recipe(**changes: Any) -> Recipe:
    """Make a recipe of two short phases."""
    fields: dict[str, Any] = {
        "weights": {
            "teacher": WeightSource(video={"out": WIDTH, "seed": 1}),
            "judge": WeightSource(video={"out": 1, "seed": 2}),
        },
        "batch": BatchShape(size=3, count=2),
        "engine": EngineChoice(clip_norm=0.5),
        "rate": RateSchedule(num_warmup_steps=3),
        "average": AverageChoice(roles=("generator",), decay=0.8, start=1),
        "checkpoints": CheckpointChoice(every=2, keep=2),
        "guard": GuardSettings(),
        "phases": {"first": Phase(method="toy", steps=5), "second": Phase(method="toy", steps=3)},
    }
    return Recipe(**{**fields, **changes})


def make_plain(network: nn.Module, settings: EngineSettings) -> Engine:
    """Put a network into the plain engine."""
    return PlainEngine(network, settings)


def make_trainer(
    folder: Path, recipe: Recipe | None = None, method: ToyMethod | None = None, **changes: Any
) -> Trainer:
    """Make a trainer of the toy run in a folder."""
    recipe = recipe or make_recipe()
    methods = [method or ToyMethod()] * len(recipe.phases)
    fields: dict[str, Any] = {
        "methods": methods,
        "builder": RoleBuilder(recipe, methods, folder, KIND),
        "batches": [ToyBatches()] * len(methods),
        "make_engine": make_plain,
    }
    return Trainer(recipe, folder, **{**fields, **changes})
