"""Memory estimate: counts on the meta device, and formulas against real tensors."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny_networks import make_batch, make_model
from tests.training.toy import Net
from training.engine.engine import EngineSettings, PlainEngine, Precision
from training.recipe import ClipShape, EngineChoice, Recipe, load_recipe
from training.train import make_methods, network_kind
from training.trainer.memory_estimate import (
    GIB,
    Counts,
    GraphBytes,
    StateBytes,
    count_graph,
    count_parameters,
    count_saved,
    describe_run,
    estimate_graphs,
    estimate_states,
    estimate_update,
    sum_states,
)
from training.trainer.roles import RoleBuilder

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
OPTIMIZERS: tuple[Literal["adamw", "muon"], ...] = ("adamw", "muon")
ZERO = EngineChoice(kind="deepspeed", precision="bfloat16", num_ranks=8)


def _describe(recipe: Recipe) -> list[str]:
    methods = make_methods(recipe)
    builder = RoleBuilder(recipe, methods, Path("nowhere"), network_kind(recipe))
    return list(describe_run(recipe, methods, builder))


def test_parameters_are_counted() -> None:
    net = Net(2)
    net.enter.requires_grad_(False)
    counts = count_parameters(net)
    assert counts == Counts(
        all=48 + 2 * 72 + 16, trained=2 * 72 + 16, matrices=2 * 64, block=72, outside=64
    )


def test_the_plain_engine_takes_what_is_estimated() -> None:
    net = Net(2)
    for precision, optimizer in itertools.product(PRECISIONS, OPTIMIZERS):
        settings = EngineSettings(precision=precision, optimizer=optimizer, ema_decay=0.9)
        engine = PlainEngine(net, settings)
        engine.backward(engine(torch.ones(1, 5)).sum())
        choice = EngineChoice(precision=precision, optimizer=optimizer)
        states = estimate_states(count_parameters(net), choice, averages=True)
        weights = sum(w.nbytes for w in net.parameters())
        gradients = sum(w.grad.nbytes for w in net.parameters() if w.grad is not None)
        assert (states.weights, states.gradients) == (weights, gradients)
        engine.step(1.0)
        kept = [
            value
            for o in engine._optimizers.optimizers
            for s in o.state.values()
            for value in s.values()
        ]
        moments = sum(value.nbytes for value in kept if value.ndim)
        masters = {id(w): w for w in engine._masters.values()}
        copies = sum(w.nbytes for w in masters.values() if w.dtype != next(net.parameters()).dtype)
        assert states.optimizer == moments + copies
        assert engine._average is not None
        assert states.average == sum(w.nbytes for w in engine._average.shards.values())


@pytest.mark.parametrize(
    ("stage", "per_parameter"),
    # bfloat16 weight 2 and gradient 2; float32 copy and moments 12 and average 4, of 8 ranks
    [(1, 2 + 2 + 16 / 8), (2, 2 + (2 + 16) / 8), (3, (2 + 2 + 16) / 8)],
)
def test_zero_divides_more_from_stage_to_stage(stage: int, per_parameter: float) -> None:
    counts = Counts(all=1000, trained=1000, block=100, outside=10)
    engine = replace(ZERO, zero_stage=stage)
    states = estimate_states(counts, engine, averages=True)
    assert states.total - states.buffers == pytest.approx(1000 * per_parameter)
    gathered = 2 * (2 * 100 + 10) if stage == 3 else 0
    assert states.buffers == gathered + 2 * 1000 + 4 * 1000 / 8


def test_frozen_and_offloaded_networks_take_less() -> None:
    frozen = Counts(all=1000, trained=0, block=0, outside=0)
    assert estimate_states(frozen, ZERO, averages=False).total == 2 * 1000 / 8
    trained = Counts(all=1000, trained=1000, block=0, outside=0)
    away = estimate_states(trained, replace(ZERO, offload="optimizer"), averages=True)
    assert (away.weights, away.gradients, away.optimizer, away.average) == (250, 0, 0, 0)
    away = estimate_states(trained, replace(ZERO, offload="weights"), averages=True)
    assert away.weights == 0


def test_saved_tensors_are_counted_once_and_weights_not() -> None:
    layer = nn.Linear(3, 5)
    inputs = torch.ones(2, 3)
    assert count_saved(layer, lambda: layer(inputs)) == inputs.nbytes
    assert count_saved(layer, lambda: layer(inputs) + layer(inputs)) == inputs.nbytes
    hidden = 2 * 5 * 4
    assert count_saved(layer, lambda: layer(inputs).exp()) == inputs.nbytes + hidden


def test_attention_keeps_no_scores() -> None:
    query = torch.ones(1, 2, 100, 4, requires_grad=True)

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    # query, key and value are one here; the output; and a float32 per row
    assert count_saved(nn.Identity(), attend) == 2 * query.nbytes + 2 * 100 * 4


def test_a_graph_is_counted_block_by_block() -> None:
    model = make_model(num_layers=5)
    clip = ClipShape(num_frames=13, height=32, width=48, num_text_tokens=5, num_image_tokens=0)
    graph = count_graph(model, lambda small: small, clip, 3, "float32")
    tokens = 4 * 2 * 3
    assert graph.inputs == 3 * tokens * 24 * 4
    assert graph.num_layers == 5
    with torch.device("meta"):
        whole = make_model(num_layers=5)
        batch = make_batch(3).to("meta")
        saved = count_saved(whole, lambda: whole(batch.latents_BCFHW, torch.zeros(3), batch))
    assert graph.kept("keep") == saved
    assert graph.kept("recompute") == graph.rest + 5 * graph.inputs


def test_a_graph_of_the_latents_alone_keeps_no_inputs_of_layers() -> None:
    clip = ClipShape(num_frames=13, height=32, width=48, num_text_tokens=5, num_image_tokens=0)
    trained, scoring = (
        count_graph(make_model(), lambda small: small, clip, 1, "float32", trains=trains)
        for trains in (True, False)
    )
    assert trained.inputs == scoring.inputs
    assert scoring.inside < 0.8 * trained.inside


def test_autocast_keeps_its_copies_of_the_weights() -> None:
    layer = nn.Linear(3, 5)
    inputs = torch.ones(2, 3, requires_grad=True)
    half = 2
    kept = count_saved(layer, lambda: layer(inputs), is_mixed=True)
    assert kept == half * (inputs.numel() + layer.weight.numel())


def test_the_plain_engine_has_one_gradient_at_a_time_and_zero_has_all() -> None:
    states = StateBytes(weights=1, gradients=12, optimizer=2, average=3, buffers=20)
    graph = GraphBytes(inputs=1, inside=4, rest=2, num_layers=3)
    plain = Recipe(engine=EngineChoice(activations="recompute"))
    zero = Recipe(engine=replace(ZERO, activations="recompute"))
    assert (sum_states([states] * 2, plain.engine), sum_states([states] * 2, ZERO)) == (12, 76)

    def estimate(recipe: Recipe, states: StateBytes = states, *, accumulates: bool = False) -> int:
        return estimate_update(states, [graph], recipe, accumulates=accumulates).device

    started, ended = 2 + 3 * 1 + 4, 2 + 1 + 4 + 12 * 2 / 3
    assert estimate(zero) == started
    assert estimate(plain, replace(states, buffers=0)) == ended
    assert estimate(plain, replace(states, buffers=0), accumulates=True) == started + 12
    assert estimate(plain) == 20  # float32 gradients, after the graph


def test_graphs_that_are_alive_together_add_up() -> None:
    one = GraphBytes(inputs=2, inside=30, rest=5, num_layers=4)
    other = GraphBytes(inputs=1, inside=20, rest=3, num_layers=2)
    keep, recompute, offload = (
        estimate_graphs([one, other], kind) for kind in ("keep", "recompute", "offload")
    )
    assert (keep.device, keep.cpu) == (5 + 4 * 30 + 3 + 2 * 20, 0)
    # The second graph is freed before the first one's blocks are computed again.
    assert (recompute.device, recompute.cpu) == (max(5 + 4 * 2 + 3 + 2 * 1 + 20, 5 + 4 * 2 + 30), 0)
    assert (offload.device, offload.cpu) == (30, 5 + 4 * 2 + 3 + 2 * 1)


class TestDryRun:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "num_ranks", "num_steps"),
        [("turbotalk_14b_dmd", 64, 2000), ("turbotalk_14b_adversarial", 32, 3000)],
    )
    def test_the_papers_recipes_fit_their_gpus(
        self, name: str, num_ranks: int, num_steps: int
    ) -> None:
        recipe = load_recipe(name)
        assert (recipe.engine.num_ranks, recipe.num_steps) == (num_ranks, num_steps)
        assert recipe.batch.count * recipe.batch.size == num_ranks
        lines = _describe(recipe)
        text = "\n".join(lines)
        assert "student: 18,882,046,784 parameters, 18,882,046,784 trained" in text
        assert lines[-1] == f"{num_steps} steps in {len(recipe.phases)} phases"
        totals = [float(total) for total in re.findall(r"= ([\d.]+) GiB, and", text)]
        assert len(totals) == len(recipe.phases)
        assert all(40 < total < 70 for total in totals)  # of 79 GiB

    @pytest.mark.slow
    def test_the_arithmetic_of_a_state_is_that_of_the_docstring(self) -> None:
        (line, *_) = (
            line for line in _describe(load_recipe("turbotalk_14b_dmd")) if "states" in line
        )
        weights, optimizer = (
            float(re.findall(rf"{name} ([\d.]+)", line)[0]) for name in ("weights", "optimizer")
        )
        assert weights == pytest.approx(2 * 18_882_046_784 / 64 / GIB, abs=0.006)
        assert optimizer == pytest.approx(12 * 18_882_046_784 / 64 / GIB, abs=0.006)

    @pytest.mark.slow
    def test_the_embedded_family_is_reckoned(self) -> None:
        text = "\n".join(_describe(load_recipe("tiny")))
        assert "1 GPUs, plain engine (one device), mixed" in text
        assert [line.split(",")[0] for line in text.splitlines() if line.startswith("phase")] == [
            *(f"phase {n}: dmd" for n in ("dmd_short", "dmd")),
            *(f"phase {n}: adversarial" for n in ("three", "two", "one")),
        ]
