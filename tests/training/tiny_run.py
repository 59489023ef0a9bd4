"""Run of all methods on talking models of a few thousand weights, one phase per method."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.training.tiny_networks import make_batch, make_model
from tests.training.toy import make_plain
from training.methods.method import prepare_role
from training.models.batch import Batch
from training.recipe import Recipe, WeightSource, parse
from training.train import make_methods
from training.trainer.roles import NetworkKind, RoleBuilder
from training.trainer.trainer import Trainer

LEARNING = {"learning_rate": 1e-3, "betas": [0.0, 0.9]}
LORA = {"trains": "lora", "rank": 2, "alpha": 2.0, **LEARNING}
STUDENT = {"student": LEARNING, "discriminator": LORA, "warmup_steps": 1}


def make_recipe(**changes: Any) -> Recipe:
    """Make a recipe of a phase per method, and of one phase that continues another."""
    phases = {
        "teacher": {"method": "flow_matching", "settings": {"teacher": LEARNING}},
        "dmd": {
            "method": "dmd",
            "settings": {"student": LEARNING, "fake_score": LEARNING, "student_every": 2},
        },
        "two": {"method": "adversarial", "settings": {"num_steps": 2, **STUDENT}},
        "one": {"method": "adversarial", "settings": {"num_steps": 1, **STUDENT}},
    }
    fields: dict[str, Any] = {
        "weights": {"teacher": {}},
        "batch": {"size": 1, "count": 2},
        "average": {"start": 0, "decay": 0.5},
        "checkpoints": {"every": 3},
        "phases": {name: {"steps": 2, **phase} for name, phase in phases.items()},
    }
    return parse(Recipe, {**fields, **changes}, "the tiny run")


class TinyBatches:
    """Chunks that depend on step and slot alone."""

    def stream(
        self, seed: int, first_step: int, *, rank: int, world_size: int, size: int
    ) -> Iterator[Batch]:
        """Draw a micro-batch per step."""
        for step in itertools.count(first_step):
            yield make_batch(size, seed + world_size * step + rank, (1 + 2 * (step % 2),))


def _load(source: WeightSource) -> nn.Module:
    assert source.dit is None
    return make_model(num_layers=1)


def _sketch(source: WeightSource) -> nn.Module:
    assert source.dit is None
    with torch.device("meta"):
        return make_model(num_layers=1)


def make_tiny_trainer(folder: Path, recipe: Recipe | None = None, **changes: Any) -> Trainer:
    """Make a trainer of this run in a folder."""
    recipe = recipe or make_recipe()
    methods = make_methods(recipe)
    kind = NetworkKind(load=_load, sketch=_sketch, prepare=prepare_role)
    fields: dict[str, Any] = {
        "methods": methods,
        "builder": RoleBuilder(recipe, methods, folder, kind),
        "batches": [TinyBatches()] * len(methods),
        "make_engine": make_plain,
    }
    return Trainer(recipe, folder, **{**fields, **changes})
