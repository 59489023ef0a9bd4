"""Hooks are called in order, see the run as it is, and leave it resumable whatever they do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.toy import make_recipe, make_trainer
from training.engine.checkpoint import Checkpoints, read_weights
from training.engine.log import read_log
from training.recipe import RECIPE, load_recipe
from training.trainer.hooks import Hook
from training.trainer.trainer import Trainer

START, STEP_START, STEP_END, END = "on_phase_start", "on_step_start", "on_step_end", "on_phase_end"
NAMES = (START, STEP_START, STEP_END, END)


class Recorder(Hook):
    """Notes each call with the state of the run, and what the run has written by then."""

    def __init__(self, calls: list[tuple[Any, ...]], label: str = "") -> None:
        self.calls = calls
        self.label = label
        self.terms: list[Mapping[str, float]] = []

    def _note(self, name: str, trainer: Trainer) -> None:
        state = trainer.state
        self.calls.append((self.label, name, state.phase, state.phase_step, state.step))

    def on_phase_start(self, trainer: Trainer) -> None:
        assert set(trainer.engines) == {"generator", "critic", "reference"}
        assert load_recipe(str(trainer.folder / RECIPE)) == trainer.recipe
        self._note(START, trainer)

    def on_step_start(self, trainer: Trainer) -> None:
        self._note(STEP_START, trainer)

    def on_step_end(self, trainer: Trainer, terms: Mapping[str, float]) -> None:
        self._note(STEP_END, trainer)
        self.terms.append(terms)
        assert read_log(trainer.folder)[-1]["step"] == trainer.state.step
        newest = Checkpoints(trainer.folder / "checkpoints", 2).list_complete()[-1:]
        assert all(int(path.name) < trainer.state.step for path in newest)

    def on_phase_end(self, trainer: Trainer) -> None:
        self._note(END, trainer)
        name = list(trainer.recipe.phases)[trainer.state.phase]
        assert (trainer.folder / "phases" / name / "generator.safetensors").is_file()


class Failing(Hook):
    """Fails at the count-th call of one of its methods, or stops the run there."""

    def __init__(self, name: str, count: int, *, stops: bool = False) -> None:
        def fail(trainer: Trainer, *_: Any) -> None:
            self.count -= 1
            if self.count == 0 and stops:
                trainer.stop()
            elif self.count == 0:
                raise RuntimeError("the hook failed")

        self.count = count
        setattr(self, name, fail)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without hooks."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(folder).run()
    return folder


def _check_same(folder: Path, other: Path) -> None:
    logs = [[{**line, "seconds": 0} for line in read_log(path)] for path in (folder, other)]
    assert logs[0] == logs[1]
    for path in sorted((other / "phases").glob("*/*.safetensors")):
        mine = read_weights(folder / path.relative_to(other))
        for name, weight in read_weights(path).items():
            assert torch.equal(mine[name], weight)


def _expect(label: str, phase: int, num_steps: int, first: int) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = [(label, START, phase, 0, first)]
    for step in range(num_steps):
        calls.append((label, STEP_START, phase, step, first + step))
        calls.append((label, STEP_END, phase, step + 1, first + step + 1))
    return [*calls, (label, END, phase, num_steps, first + num_steps)]


@pytest.mark.slow
def test_each_hook_is_called_around_phases_and_steps(whole: Path, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    hook = Recorder(calls)
    make_trainer(tmp_path, hooks=[hook]).run()
    assert calls == [*_expect("", 0, 5, 0), *_expect("", 1, 3, 5)]
    _check_same(tmp_path, whole)
    logged = [
        {name: value for name, value in line.items() if "/" in name} for line in read_log(tmp_path)
    ]
    assert hook.terms == logged


@pytest.mark.slow
def test_several_hooks_are_called_in_their_order(tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    make_trainer(tmp_path, hooks=[Recorder(calls, "one"), Recorder(calls, "two")]).run()
    assert calls[::2] == [*_expect("one", 0, 5, 0), *_expect("one", 1, 3, 5)]
    assert calls[1::2] == [*_expect("two", 0, 5, 0), *_expect("two", 1, 3, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 2])
def test_a_hook_that_fails_leaves_a_run_that_can_be_resumed(
    whole: Path, tmp_path: Path, name: str, count: int
) -> None:
    with pytest.raises(RuntimeError, match="the hook failed"):
        make_trainer(tmp_path, hooks=[Failing(name, count)]).run()
    calls: list[tuple[Any, ...]] = []
    make_trainer(tmp_path, hooks=[Recorder(calls)]).run()
    _check_same(tmp_path, whole)
    # No step that a checkpoint does not hold, and no phase's end, goes without its calls.
    ends = [call[2] for call in calls if call[1] == END]
    assert ends[-1] == 1
    if name == END:
        assert ends == [count - 1, 1][count - 1 :]


@pytest.mark.slow
def test_a_resumed_phase_starts_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        make_trainer(tmp_path, hooks=[Failing(STEP_END, 5)]).run()
    calls: list[tuple[Any, ...]] = []
    make_trainer(tmp_path, hooks=[Recorder(calls)]).run()
    # Checkpoints are written every two steps; the fifth step is made again, with its hooks.
    assert calls[:3] == [("", START, 0, 4, 4), ("", STEP_START, 0, 4, 4), ("", STEP_END, 0, 5, 5)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [(START, 0), (STEP_START, 3), (STEP_END, 3)])
def test_a_hook_may_stop_the_run(whole: Path, tmp_path: Path, name: str, steps: int) -> None:
    run = make_trainer(tmp_path, hooks=[Failing(name, max(steps, 1), stops=True)])
    run.run()
    assert (run.state.phase, run.state.step) == (0, steps)
    assert not (tmp_path / "phases").exists()
    found = Checkpoints(tmp_path / "checkpoints", 2).find_newest()
    assert (found is None) == (steps == 0)
    assert found is None or found[0].step == steps
    make_trainer(tmp_path).run()
    _check_same(tmp_path, whole)


def test_a_step_that_is_made_again_changes_no_state(tmp_path: Path) -> None:
    found: list[list[float]] = []

    class Repeats(Hook):
        def on_phase_start(self, trainer: Trainer) -> None:
            before = trainer.state
            # The generator is updated in every second step, the first of which is step 0.
            for step in (0, 1, 0):
                found.append(sorted(trainer.advance(step).values()))
                assert "generator/loss" in trainer.advance(0)
                assert "generator/loss" not in trainer.advance(1)
            assert trainer.state == before
            trainer.stop()

    make_trainer(tmp_path, make_recipe(), hooks=[Repeats()]).run()
    assert len(found) == 3
    assert not list((tmp_path / "checkpoints").glob("*"))
