"""Operations and time of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.methods.adversarial import Adversarial
from training.methods.continuation import Continuation
from training.methods.dmd import Dmd
from training.methods.flow_matching import FlowMatching
from training.methods.method import Method
from training.recipe import ClipShape, load_recipe
from training.train import make_methods, network_kind
from training.trainer.roles import RoleBuilder
from training.trainer.sizes import resolve_recipe
from training.trainer.time_estimate import count_forward, count_passes, describe_time
from turbotalk_core.models.wan import WanConfig, WanModel


def test_a_forward_pass_of_14b_at_720_rows() -> None:
    with torch.device("meta"):
        dit = WanModel(WanConfig())
    clip = ClipShape(num_frames=81, height=720, width=1280)
    weights = sum(weight.numel() for weight in dit.blocks.parameters())
    expected = 2 * weights * 75_600 + 4 * 75_600**2 * 5120 * 40
    assert count_forward(dit, clip) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("method", "has_text", "recomputes", "passes"),
    [
        (FlowMatching(), True, False, 3.0),
        # Rollout 1.5, last step (4 of 5 without a graph), scores 1 + 3 in one of five, fake score.
        (Dmd(), True, False, 1.5 + 0.8 + 0.6 + 0.8 + 3),
        (Dmd(), False, True, 1.5 + 0.8 + 0.8 + 0.6 + 4),
        # Two rollouts; six samples, of which five twice; student, its score, two other scores.
        (Adversarial(num_steps=2), True, False, 2 + 4 + 18 + 5 + 6 + 2),
        (Adversarial(num_steps=2, memory_light=False), True, False, 2 + 4 + 18 + 6 + 2),
        # Penalties in one of four steps; else two samples.
        (
            Adversarial(num_steps=2, memory_light=False, penalty_every=4),
            True,
            False,
            2 + 4 + 18 / 4 + 6 * 3 / 4 + 6 + 2,
        ),
        (Continuation(num_steps=1), True, False, 1 + 3),
    ],
)
def test_the_calls_of_a_step_are_counted(
    method: Method, has_text: bool, recomputes: bool, passes: float
) -> None:
    assert count_passes(method, has_text=has_text, recomputes=recomputes) == pytest.approx(passes)


@pytest.mark.slow
def test_time_and_savings_are_told(tmp_path: Path) -> None:
    recipe = resolve_recipe(load_recipe("turbotalk_14b_adversarial", ["phases.two=null"]))
    methods = make_methods(recipe)
    builder = RoleBuilder(recipe, methods, tmp_path, network_kind(recipe))
    text = "\n".join(describe_time(recipe, methods, builder))
    assert "phase three: 7.49 PFLOP per network call, 46.0 calls" in text
    assert "penalty_every: 4 would save 33%" in text
    assert "memory_light: false, where the graphs fit, would save 11%" in text
    assert "on 32 GPUs" in text
    twice = "\n".join(describe_time(recipe, methods, builder, tflops=800.0))
    assert "800 TFLOP/s" in twice
