"""One optimiser step of every method at 14B widths on a fake CUDA device.

A fake device refuses tensors of different devices in one operation, and records where the program
waits for it. The number of tokens does not matter here, so samples are small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.fake_training import Run, TrainingCuda, make_case, needs_cuda_build
from training.engine.engine import PlainEngine
from training.models.batch import Batch

pytestmark = [pytest.mark.slow, needs_cuda_build]

CLIP = {"num_frames": 17, "height": 64, "width": 96}
FRAMES, ROWS, COLUMNS = 5, 8, 12
LORA = {"trains": "lora", "learning_rate": 2e-5}
FULL = {"trains": "full", "learning_rate": 2e-6}
ONE_STEP = {"num_steps": 1, "warmup_steps": 0}

# Places where the program waits for the device; the code gives a reason for each. A new one must be
# removed, or get a reason and an entry here.
TERMS = "training/engine/distributed.py mean_over_ranks"
NORM = "training/engine/optimizers.py step"
RENOISE = "sampling/steps.py renoise_step"
FIRST_CALL = Counter({"models/rotary.py rotary_table": 2})


def _waits(num_updates: int = 1, *, num_renoised: int = 0) -> Counter[str]:
    counts = {TERMS: num_updates, NORM: num_updates, RENOISE: num_renoised}
    return +Counter(counts)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        pytest.param("flow_matching", {}, _waits(), id="flow_matching"),
        pytest.param("flow_matching", {"teacher": LORA}, _waits(), id="flow_matching-lora"),
        pytest.param("continuation", {}, _waits(), id="continuation"),
        pytest.param("continuation", {"num_steps": 2}, _waits(num_renoised=2), id="continuation-2"),
        pytest.param("dmd", {"num_steps": 1, "student_every": 1}, _waits(2), id="dmd"),
        pytest.param(
            "dmd",
            {"num_steps": 1, "student_every": 1, "student": LORA, "fake_score": LORA},
            _waits(2),
            id="dmd-lora",
        ),
        # four-step samples are made with three renoising steps
        pytest.param("adversarial", ONE_STEP, _waits(2, num_renoised=3), id="r3gan"),
        pytest.param(
            "adversarial",
            {**ONE_STEP, "loss": "gan", "self_compare_weight": 0.0, "penalty_weight": 0.0},
            _waits(2),
            id="gan-alone",
        ),
        pytest.param(
            "adversarial",
            {
                **ONE_STEP,
                "loss": "hinge",
                "scores_noisy": True,
                "four_step_weight": 0.5,
                "penalty_weight": 0.0,
            },
            _waits(2, num_renoised=3),
            id="hinge-noisy",
        ),
        pytest.param(
            "adversarial",
            {**ONE_STEP, "discriminator": FULL, "four_step": "frozen", "memory_light": False},
            _waits(2, num_renoised=3),
            id="r3gan-full",
        ),
        # the drawn last timestep becomes a second step
        pytest.param(
            "adversarial",
            {"num_steps": 1, "warmup_steps": 10, "self_compare_weight": 0, "penalty_weight": 0},
            _waits(2, num_renoised=1),
            id="dynamic-timesteps",
        ),
        pytest.param(
            "adversarial",
            {
                "num_steps": 3,
                "warmup": "curriculum",
                "warmup_steps": 10,
                "self_compare_weight": 0,
                "penalty_weight": 0,
            },
            _waits(2, num_renoised=2),
            id="curriculum",
        ),
    ],
)
def test_a_step_waits_only_where_it_must(
    method: str, settings: Mapping[str, Any], expected: Counter[str]
) -> None:
    recipe = make_case(method, settings, num_layers=1, clip=CLIP)
    with TrainingCuda() as cuda:
        run = Run(cuda, recipe, **_condition())
        step = run.step(0)
        assert step.waits - FIRST_CALL == expected
        assert f"{next(iter(run.trainer.engines))}/loss" in step.terms
        for engine in run.trainer.engines.values():
            assert isinstance(engine, PlainEngine)
            _check_states(engine)


def _condition() -> dict[str, Tensor]:
    """Return what ``draw_batch`` leaves out, as a prepared set has it."""
    pinned_BF = torch.arange(FRAMES)[None] < 3  # continues context frames
    return {
        "pinned_BF": pinned_BF,
        "weight_BHW": torch.ones(1, ROWS, COLUMNS),
        "null_text_BND": torch.zeros(1, 7, 4096),
    }


def _check_states(engine: PlainEngine) -> None:
    """Check that everything the engine keeps between steps is on the device, in float32."""
    weights = list(engine.module.parameters())
    assert all(weight.device.type == "cuda" and weight.grad is None for weight in weights)
    kept: list[Tensor] = [*engine._masters.values()]
    for optimizer in engine._optimizers.optimizers:
        kept += [value for state in optimizer.state.values() for value in state.values()]
    if engine._average is not None:
        kept += engine._average.shards.values()
    assert all(value.device.type == "cuda" and value.dtype == torch.float32 for value in kept)
    assert all(not value.requires_grad for value in kept if value.grad_fn is not None)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
def test_every_precision_steps_with_every_optimizer(precision: Any, optimizer: Any) -> None:
    recipe = make_case(
        "flow_matching", num_layers=1, precision=precision, optimizer=optimizer, clip=CLIP
    )
    with TrainingCuda() as cuda:
        run = Run(cuda, recipe)
        assert run.step(0).waits - FIRST_CALL == _waits()
        (engine,) = run.trainer.engines.values()
        assert isinstance(engine, PlainEngine)
        kinds = {type(o).__name__ for o in engine._optimizers.optimizers}
        assert kinds == ({"AdamW", "Muon"} if optimizer == "muon" else {"AdamW"})


@pytest.mark.parametrize("activations", ["keep", "offload"])
def test_activations_may_also_be_kept_or_moved(activations: Any) -> None:
    recipe = make_case("flow_matching", num_layers=1, activations=activations, clip=CLIP)
    with TrainingCuda() as cuda:
        waits = Run(cuda, recipe).step(0).waits - FIRST_CALL
    moved = waits - _waits()
    assert bool(moved) == (activations == "offload")  # a copy of each tensor, out and back
    assert waits[TERMS] == waits[NORM] == 1


def test_two_speakers_in_one_picture_share_a_step() -> None:
    recipe = make_case("flow_matching", num_layers=2, clip=CLIP)
    regions_PHW = torch.zeros(3, ROWS, COLUMNS)
    regions_PHW[0, :, :5] = regions_PHW[1, :, 7:] = regions_PHW[2, :, 5:7] = 1
    with TrainingCuda() as cuda:
        batch = Run(cuda, recipe).trainer._streams[0]
        first = next(batch)
        voices = {
            "first_BPKLD": first.first_BPKLD.repeat(1, 2, 1, 1, 1),
            "later_BPFKLD": first.later_BPFKLD.repeat(1, 2, 1, 1, 1, 1),
            "regions_PHW": regions_PHW,
        }
        waits = Run(cuda, recipe, **voices).step(0).waits - FIRST_CALL
    speakers = waits - _waits()
    assert all(place.startswith("models/") for place in speakers)
    assert sum(speakers.values()) == 2  # per network call, not per block


def test_a_batch_moves_without_a_wait_and_keeps_its_dtypes() -> None:
    batch = Batch(
        latents_BCFHW=torch.zeros(1, 16, 2, 4, 4),
        reference_BCFHW=torch.zeros(1, 20, 2, 4, 4),
        first_BPKLD=torch.zeros(1, 1, 5, 1, 6),
        later_BPFKLD=torch.zeros(1, 1, 1, 8, 1, 6),
        pinned_BF=torch.ones(1, 2, dtype=torch.bool),
    )
    with TrainingCuda() as cuda:
        moved = batch.to("cuda", torch.bfloat16)
        again = moved.to("cuda")
        assert not cuda.syncs
    assert moved.latents_BCFHW.dtype == torch.float32
    assert moved.pinned_BF.dtype == torch.bool
    assert moved.reference_BCFHW.dtype == moved.first_BPKLD.dtype == torch.bfloat16
    assert again.latents_BCFHW is moved.latents_BCFHW
    assert moved.latents_BCFHW.device.type == moved.pinned_BF.device.type == "cuda"
