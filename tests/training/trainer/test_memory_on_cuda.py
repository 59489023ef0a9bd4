"""The dry run's memory against one step at 14B widths, counted on a fake CUDA device.

Networks of two and of three blocks take a step at 81 frames of 832x480. All blocks are alike, so
the memory at each moment grows linearly with their number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.fake_training import Run, Step, TrainingCuda, make_case, needs_cuda_build
from training.recipe import Recipe
from training.train import make_methods, network_kind
from training.trainer.memory_estimate import GIB, describe_run
from training.trainer.roles import RoleBuilder

pytestmark = [pytest.mark.slow, needs_cuda_build]

NUM_LAYERS = 40
LORA = {"trains": "lora", "learning_rate": 2e-5}
FULL = {"trains": "full", "learning_rate": 2e-6}
ONE_STEP = {"num_steps": 1, "warmup_steps": 0}


def _take(recipe: Recipe) -> Step:
    with TrainingCuda() as cuda:
        run = Run(cuda, recipe)
        run.fill_states()
        return run.step(0)


def _estimate(recipe: Recipe) -> tuple[float, float]:
    """Return the dry run's bytes at all times and at most."""
    methods = make_methods(recipe)
    builder = RoleBuilder(recipe, methods, Path("nowhere"), network_kind(recipe))
    text = "\n".join(describe_run(recipe, methods, builder))
    always, most = re.findall(r"states ([\d.]+) \+ .* = ([\d.]+) GiB, and", text)[0]
    return float(always) * GIB, float(most) * GIB


def _extrapolate(shallow: float, deep: float) -> float:
    return shallow + (NUM_LAYERS - 2) * (deep - shallow)


@pytest.mark.parametrize(
    ("method", "settings", "engine"),
    [
        pytest.param("flow_matching", {}, {"precision": "float32"}, id="flow_matching-float32"),
        pytest.param("flow_matching", {}, {"precision": "mixed"}, id="flow_matching-mixed"),
        pytest.param(
            "flow_matching",
            {},
            {"optimizer": "muon"},
            id="flow_matching-muon",
            marks=pytest.mark.long,
        ),
        pytest.param("flow_matching", {"teacher": LORA}, {}, id="flow_matching-lora"),
        pytest.param("continuation", {}, {}, id="continuation"),
        pytest.param(
            "dmd",
            {"num_steps": 1, "student_every": 1},
            {},
            id="dmd",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "adversarial",
            {**ONE_STEP, "self_compare_weight": 0, "penalty_weight": 0},
            {},
            id="adversarial",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "adversarial",
            {**ONE_STEP, "self_compare_weight": 0.0, "memory_light": False},
            {},
            id="adversarial-whole",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "adversarial",
            {**ONE_STEP, "discriminator": FULL, "four_step": "frozen", "penalty_weight": 0.0},
            {},
            id="adversarial-full",
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_dry_run_is_right_within_a_twentieth(
    method: str, settings: Mapping[str, Any], engine: dict[str, Any]
) -> None:
    shallow, deep = (
        _take(make_case(method, settings, num_layers=num_layers, **engine)) for num_layers in (2, 3)
    )
    always, most = _estimate(make_case(method, settings, num_layers=NUM_LAYERS, **engine))
    assert _extrapolate(shallow.held, deep.held) == pytest.approx(always, rel=0.01)
    peaks = [_extrapolate(shallow.peaks[name], deep.peaks[name]) for name in deep.peaks]
    assert max(peaks) == pytest.approx(most, rel=0.05)


@pytest.mark.long
def test_the_whole_teacher_takes_a_step_at_480_rows() -> None:
    recipe = make_case("flow_matching", num_layers=NUM_LAYERS)
    step = _take(recipe)
    always, most = _estimate(recipe)
    assert step.held == pytest.approx(always, rel=0.01)
    assert max(step.peaks.values()) == pytest.approx(most, rel=0.05)


def test_without_float32_gradients_the_graph_decides_and_is_right_too() -> None:
    recipe = make_case("flow_matching", {"teacher": LORA}, num_layers=2)
    step = _take(recipe)
    always, most = _estimate(recipe)
    assert step.peaks["teacher"] - step.held == pytest.approx(most - always, rel=0.05)
    assert step.peaks["teacher"] > step.peaks["teacher step"]


def test_nothing_large_is_float64() -> None:
    recipe = make_case(
        "flow_matching", num_layers=1, clip={"num_frames": 5, "height": 64, "width": 96}
    )
    with TrainingCuda() as cuda:
        Run(cuda, recipe).step(0)
    assert cuda.widest_float64 <= recipe.batch.size * 256  # the sinusoid of the timestep
    assert torch.get_default_dtype() == torch.float32
