"""DeepSpeed against the plain engine: the same run, killed and resumed, in one process and in two.

Processes are started once for several tests: two that are killed, two that resume, two for the
methods, and one alone. All are forked, so that torch is not imported by each.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import signal
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from tests.forks import run_in_child
from tests.training.tiny_networks import make_batch, make_model
from tests.training.tiny_run import make_recipe as make_tiny_recipe
from tests.training.tiny_run import make_tiny_trainer
from tests.training.toy import (
    WIDTH,
    Net,
    ToyBatch,
    ToyBatches,
    ToyMethod,
    make_recipe,
    make_trainer,
)
from training.engine import distributed as ranks
from training.engine.checkpoint import read_weights
from training.engine.divergence import GuardSettings
from training.engine.engine import Engine, EngineSettings, PlainEngine
from training.engine.log import read_log
from training.models.networks import Discriminator
from training.recipe import EngineChoice
from turbotalk_core.errors import TrainingError, TurboTalkError

KILL_AT = 3  # the step that two processes do not survive; they have a checkpoint of step 2
ROLES = ("critic", "generator")
TIMEOUT_SECONDS = 600.0  # of a process that waits for another; ends what hangs
ONE = make_tiny_recipe().phases["one"]

pytestmark = pytest.mark.slow


class KillingBatches(ToyBatches):
    """Samples that kill the process at one step."""

    def draw(self, seed: int, step: int, start: int, size: int) -> ToyBatch:
        """Draw the samples of a step, or die."""
        if step == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(seed, step, start, size)


class NanBatches(ToyBatches):
    """Samples with a value that is not finite in the second micro-batch of a step."""

    def draw(self, seed: int, step: int, start: int, size: int) -> ToyBatch:
        """Draw the samples of a step."""
        batch = super().draw(seed, step, start, size)
        return ToyBatch(x=batch.x * float("nan")) if (step, start) == (1, size) else batch


@contextmanager
def _joined(rank: int, world_size: int, port: int) -> Iterator[torch.device]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    from training.engine.deepspeed_engine import start_ranks

    yield start_ranks(TIMEOUT_SECONDS)
    # A process that ends as a member may be aborted by threads of its group that still run.
    ranks.barrier()
    ranks.leave()


def _make_engine(
    network: nn.Module, settings: EngineSettings, *, device: torch.device, **zero: Any
) -> Engine:
    from training.engine.deepspeed_engine import DeepSpeedEngine, ZeroSettings

    return DeepSpeedEngine(network, settings, ZeroSettings(bucket_size=10_000, **zero), device)


def _run_two(rank: int, port: int, folder: Path, kills: bool) -> None:
    with _joined(rank, 2, port) as device:
        make_engine = functools.partial(_make_engine, device=device, stage=3)
        batches = KillingBatches() if kills else ToyBatches()
        make_trainer(folder / "two", make_engine=make_engine, batches=[batches] * 2).run()
        nan = {"make_engine": make_engine, "batches": [NanBatches()] * 2}
        strict = make_recipe(guard=GuardSettings(most_skips=0))
        with pytest.raises(TrainingError) as caught:
            make_trainer(folder / "nan", strict, **nan).run()
        (folder / f"nan{rank}").write_text(str(caught.value))
        make_trainer(folder / "skips", **nan).run()


def _run_methods(rank: int, port: int, folder: Path) -> None:
    with _joined(rank, 2, port) as device:
        make_engine = functools.partial(_make_engine, device=device, stage=3)
        shorter = make_tiny_recipe()
        shorter = replace(shorter, phases={**shorter.phases, "one": replace(ONE, steps=1)})
        for recipe in (shorter, make_tiny_recipe()):
            make_tiny_trainer(folder / "methods", recipe, make_engine=make_engine).run()


def _run_one(rank: int, port: int, folder: Path) -> None:
    with _joined(rank, 1, port) as device:
        facts: dict[str, Any] = {}
        for stage in (1, 2, 3):
            make_engine = functools.partial(_make_engine, device=device, stage=stage)
            make_trainer(folder / f"one{stage}", make_engine=make_engine).run()
            nan = [NanBatches()] * 2
            make_trainer(folder / f"skips{stage}", make_engine=make_engine, batches=nan).run()
        facts["move"] = _move_to_one(device, folder / "two")
        facts["bfloat16"] = _compare_bfloat16(device)
        facts["skips"] = [_skip_in_bfloat16(device, stage) for stage in (1, 2, 3)]
        facts["transformer"] = _compare_discriminator(device)
        facts["offload"] = _compare_offloading(device)
        facts["left"] = {stage: _count_left(device, stage) for stage in (1, 2, 3)}
        (folder / "facts.json").write_text(json.dumps(facts))


def _move_to_one(device: torch.device, folder: Path) -> dict[str, Any]:
    """Resume a run of two processes in one process, without and with a conversion."""
    from training.engine.deepspeed_engine import convert

    recipe = make_recipe()
    longer = {**recipe.phases, "second": recipe.phases["first"]}  # 2 steps more
    recipe = make_recipe(phases=longer)
    make_engine = functools.partial(_make_engine, device=device, stage=3)
    refusal = ""
    try:
        make_trainer(folder, recipe, make_engine=make_engine).run()
    except TurboTalkError as error:
        refusal = str(error)
    convert(folder / "checkpoints" / "00000008")
    make_trainer(folder, recipe, make_engine=make_engine).run()
    return {"refusal": refusal}


def _compare_bfloat16(device: torch.device) -> list[list[float]]:
    """Step both engines in bfloat16; return the losses of each."""
    settings = EngineSettings(learning_rate=0.05, precision="bfloat16", ema_decay=0.5)
    losses = []
    for make in (PlainEngine, functools.partial(_make_engine, device=device, stage=3)):
        torch.manual_seed(0)
        engine = make(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), settings)
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
        row = []
        for _ in range(5):
            loss = (engine(inputs).float() - 1).square().mean()
            engine.backward(loss)
            engine.step(1.0)
            row.append(loss.item())
        losses.append([*row, float(sum(t.sum() for t in engine.export().values()))])
    return losses


def _compare_offloading(device: torch.device) -> list[list[Any]]:
    """Step the plain engine, then all engines with offload; return devices, losses and norms.

    Here both sides of every move are the CPU, so the test shows that nothing is lost on the way:
    gradients of several losses in one step, the optimiser's states, weights used past their layer.
    """
    settings = EngineSettings(learning_rate=0.05, ema_decay=0.5, clip_norm=0.5)
    spread = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "weights")]
    inputs = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    rows = []
    for stage, offload in ((0, "none"), *spread):
        torch.manual_seed(0)
        engine: Any
        if stage == 0:
            engine, away = PlainEngine(Net(1), settings), []
        else:
            engine = _make_engine(Net(1), settings, device=device, stage=stage, offload=offload)
            parts = (engine._engine.zero_offload_optimizer(), engine._engine.zero_offload_param())
            away = [part is not None and part.device == "cpu" for part in parts]
        numbers = []
        for _ in range(3):
            for half in inputs.chunk(2):
                loss = (engine(half) - 1).square().mean()
                engine.backward(loss)
                numbers.append(loss.item())
            numbers.append(engine.step(1.0).gradient_norm)
        numbers += [float(weight.square().sum()) for _, weight in sorted(engine.export().items())]
        engine.close()
        rows.append([stage, offload, away, numbers])
    return rows


def _compare_discriminator(device: torch.device) -> dict[str, list[list[float]]]:
    """Step a discriminator, then a talking model through it; return losses and norms of each."""
    batch = make_batch()
    sigma_B = torch.tensor([0.3, 0.7])
    results: dict[str, list[list[float]]] = {}
    for recomputes in (False, True):
        for precision in ("float32", "bfloat16"):
            settings = EngineSettings(
                learning_rate=1e-2, precision=precision, uses_checkpointing=recomputes
            )
            rows = []
            for make in (PlainEngine, functools.partial(_make_engine, device=device, stage=3)):
                torch.manual_seed(0)
                critic = make(Discriminator(make_model(1)), settings)
                model = make(make_model(2), settings)
                rows.append(_step_both(critic, model, batch, sigma_B))
            results[f"{precision} {recomputes}"] = rows
    return results


def _skip_in_bfloat16(device: torch.device, stage: int) -> list[bool]:
    """Return whether a gradient that is not finite changes nothing, is reported, and the next does.

    The last value is whether the average has been kept from it.
    """
    settings = EngineSettings(precision="bfloat16", learning_rate=0.1, ema_decay=0.5)
    engine = _make_engine(nn.Linear(30, 40), settings, device=device, stage=stage)
    exports, norms = [engine.export()["weight"]], []
    for factor in (float("nan"), 1.0):
        loss = factor * engine(torch.ones(2, 30, dtype=torch.bfloat16)).float().sum()
        engine.backward(loss)
        norms.append(engine.step(1.0).gradient_norm)
        exports.append(engine.export()["weight"])
    before, skipped, moved = exports
    engine.close()
    return [
        not math.isfinite(norms[0]),
        torch.equal(skipped, before),
        math.isfinite(norms[1]) and not torch.equal(moved, before),
        bool(moved.isfinite().all()),
    ]


def _count_left(device: torch.device, stage: int) -> int:
    """Count the values of optimiser and weights that remain in memory after an engine is closed."""
    network = nn.Linear(30, 40)
    engine: Any = _make_engine(network, EngineSettings(), device=device, stage=stage)
    engine.backward(engine(torch.ones(2, 30)).sum())
    engine.step(1.0)
    states = engine._engine.optimizer.optimizer.state
    tensors = [value for state in states.values() for value in state.values()] + list(states)
    left = [weakref.ref(tensor) for tensor in tensors]
    assert len(left) >= 3
    del states, tensors
    engine.close()
    del engine
    gc.collect()
    moments = [tensor for tensor in (reference() for reference in left) if tensor is not None]
    return sum(tensor.numel() for tensor in (*moments, *network.parameters()))


def _step_both(critic: Engine, model: Engine, batch: Any, sigma_B: Tensor) -> list[float]:
    numbers = []
    for _ in range(3):
        model.set_trainable(yes=False)
        loss = nn.functional.softplus(-critic(batch.latents_BCFHW, sigma_B, batch)).mean()
        critic.backward(loss)
        numbers += [loss.item(), critic.step(1.0).gradient_norm]
        model.set_trainable(yes=True)
        critic.set_trainable(yes=False)
        loss = critic.module(model(batch.latents_BCFHW, sigma_B, batch), sigma_B, batch).mean()
        model.backward(loss)
        numbers += [loss.item(), model.step(1.0).gradient_norm]
        critic.set_trainable(yes=True)
    return numbers


def _find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _start(run: Callable[..., None], num_ranks: int, *arguments: object) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import_module("training.engine.deepspeed_engine")  # once for all that are forked
    start_processes(run, (_find_port(), *arguments), num_ranks, start_method="fork")


def _start_two(folder: Path) -> None:
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        _start(_run_two, 2, folder, True)
    assert max(line["step"] for line in read_log(folder / "two")) == KILL_AT
    _start(_run_two, 2, folder, False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two_runs(folder: Path) -> Path:
    """A folder with the run ``two`` of two processes, which was killed and went on."""
    assert run_in_child(_start_two, folder) == 0
    for place in ("log.jsonl", "phases/second/generator.safetensors"):  # before it goes on alone
        copy = folder / "two_alone" / place
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((folder / "two" / place).read_bytes())
    return folder


@pytest.fixture(scope="module")
def methods_runs(folder: Path) -> Path:
    """A folder with a run of every method: plain, and in two processes."""
    assert run_in_child(_start, _run_methods, 2, folder) == 0
    make_tiny_trainer(folder / "plain_methods").run()
    return folder


@pytest.fixture(scope="module")
def runs(two_runs: Path) -> Path:
    """A folder with the same run four times: plain, two processes, one process at each stage."""
    assert run_in_child(_start, _run_one, 1, two_runs) == 0
    make_trainer(two_runs / "plain").run()
    return two_runs


@pytest.fixture(scope="module")
def facts(runs: Path) -> dict[str, Any]:
    return json.loads((runs / "facts.json").read_text())


def _check_same(folder: Path, other: Path, num_steps: int) -> None:
    mine, theirs = read_log(folder)[:num_steps], read_log(other)[:num_steps]
    assert len(mine) == len(theirs) == num_steps
    for line, expected in zip(mine, theirs, strict=True):
        assert line.pop("seconds") >= 0
        assert line.pop("phase") == expected.pop("phase")
        expected.pop("seconds")
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_what_is_no_number_on_one_rank_is_left_out_on_both(
    two_runs: Path, facts: dict[str, Any], tmp_path: Path
) -> None:
    """The weights and the average of the other steps are those of the plain engine."""
    make_trainer(tmp_path / "plain", batches=[NanBatches()] * 2).run()
    assert read_log(tmp_path / "plain")[1]["critic/skipped"] == 1
    assert facts
    for name in ("skips", "skips1", "skips2", "skips3"):
        _check_same(two_runs / name, tmp_path / "plain", 8)
        for role in ROLES:
            mine, theirs = (
                read_weights(folder / "phases" / "second" / f"{role}.safetensors")
                for folder in (two_runs / name, tmp_path / "plain")
            )
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_too(facts: dict[str, Any]) -> None:
    assert facts["skips"] == 3 * [4 * [True]]


def test_what_is_no_number_on_one_rank_stops_both(two_runs: Path) -> None:
    messages = [(two_runs / f"nan{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 2: critic/loss = nan, critic/real = nan; ")
    assert [line["step"] for line in read_log(two_runs / "nan")] == [1]


@pytest.mark.parametrize("name", ["one1", "one2", "one3", "two_alone"])
def test_the_run_is_that_of_the_plain_engine(runs: Path, name: str) -> None:
    _check_same(runs / name, runs / "plain", num_steps=8)
    for phase in ("first", "second"):
        for role in ROLES:
            if name == "two_alone" and (phase, role) != ("second", "generator"):
                continue
            mine, theirs = (
                read_weights(runs / run / "phases" / phase / f"{role}.safetensors")
                for run in (name, "plain")
            )
            assert mine.keys() == theirs.keys()
            for key, weight in theirs.items():
                torch.testing.assert_close(mine[key], weight, rtol=1e-5, atol=1e-6)


def test_every_method_is_the_same_in_two_processes(methods_runs: Path) -> None:
    """Flow matching, DMD, adversarial phases of 2 and 1 steps, stopped once in the last one."""
    mine, theirs = read_log(methods_runs / "methods"), read_log(methods_runs / "plain_methods")
    assert [line["phase"] for line in mine] == [
        name for name in ("teacher", "dmd", "two", "one") for _ in range(2)
    ]
    for line, expected in zip(mine, theirs, strict=True):
        assert line.pop("phase") == expected.pop("phase")
        del line["seconds"], expected["seconds"]
        # Rates are high, and Adam makes full steps of gradients that are nearly zero.
        assert line == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_another_number_of_ranks_is_refused_with_what_to_do(facts: dict[str, Any]) -> None:
    refusal = facts["move"]["refusal"]
    assert "2 ranks under ZeRO 3, this run has 1 under ZeRO 3" in refusal
    assert "python -m training.engine.deepspeed_engine " in refusal
    assert refusal.endswith("checkpoints/00000008")


def test_after_a_conversion_it_goes_on_the_same(runs: Path, tmp_path: Path) -> None:
    recipe = make_recipe()
    recipe = make_recipe(phases={**recipe.phases, "second": recipe.phases["first"]})
    make_trainer(tmp_path, recipe).run()
    _check_same(runs / "two", tmp_path, num_steps=10)
    mine, theirs = (
        read_weights(run / "phases" / "second" / "generator.safetensors")
        for run in (runs / "two", tmp_path)
    )
    for key, weight in theirs.items():  # the average
        torch.testing.assert_close(mine[key], weight, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_float32_copies_on_both(facts: dict[str, Any]) -> None:
    plain, zero = facts["bfloat16"]
    assert zero == pytest.approx(plain, rel=1e-2)
    assert plain[4] < 0.5 * plain[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_transformers_are_stepped_alike(
    facts: dict[str, Any], precision: str, recomputes: bool
) -> None:
    plain, zero = facts["transformer"][f"{precision} {recomputes}"]
    assert zero == pytest.approx(plain, rel=1e-4 if precision == "float32" else 0.05)
    other, _ = facts["transformer"][f"{precision} {not recomputes}"]
    assert plain == pytest.approx(other, rel=1e-5)


def test_what_lies_on_the_cpu_is_stepped_alike(facts: dict[str, Any]) -> None:
    (*_, expected), *spread = facts["offload"]
    assert len(spread) == 4
    for stage, offload, away, numbers in spread:
        assert away == [True, offload == "weights"], (stage, offload)
        assert numbers == pytest.approx(expected, rel=1e-5), (stage, offload)


def test_a_closed_engine_gives_its_memory_back(facts: dict[str, Any]) -> None:
    assert facts["left"] == {"1": 0, "2": 0, "3": 0}


def test_mixed_precision_is_refused() -> None:
    with pytest.raises(TurboTalkError, match="must be float32 or bfloat16"):
        _make_engine(
            nn.Linear(2, 2),
            EngineSettings(precision="mixed"),
            device=torch.device("cpu"),
            stage=1,
        )


def test_muon_is_refused() -> None:
    recipe = make_recipe(engine=EngineChoice(optimizer="muon"))
    settings = recipe.settings_of("generator", ToyMethod().learning)
    assert ranks.world_size() == 1
    with pytest.raises(TurboTalkError, match="must be adamw"):
        _make_engine(nn.Linear(2, 2), settings, device=torch.device("cpu"), stage=3)
