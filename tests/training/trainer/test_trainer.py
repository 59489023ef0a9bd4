"""The loop on toy networks: phases, accumulation, and runs that are killed and go on."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.forks import run_in_child
from tests.training.toy import (
    ToyBatch,
    ToyBatches,
    ToyMethod,
    make_plain,
    make_recipe,
    make_trainer,
)
from training.engine import checkpoint
from training.engine.checkpoint import Checkpoints, read_weights
from training.engine.divergence import GuardSettings
from training.engine.engine import Engine, PlainEngine
from training.engine.log import read_log
from training.engine.rng import Draws
from training.methods.method import Update
from training.recipe import Activations, BatchShape, GapSeenAndClosed
from training.trainer import trainer
from training.trainer.gap import GapWatch
from training.trainer.roles import RoleBuilder
from turbotalk_core.errors import CheckpointError, RecipeError, TrainingError

TRAINED = ("critic", "generator")


def _read_terms(folder: Path) -> list[dict[str, Any]]:
    lines = read_log(folder)
    for line in lines:
        assert line.pop("seconds") >= 0
    return lines


def _read_ends(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.parent.name}/{path.stem}/{name}": weight
        for path in sorted((folder / "phases").glob("*/*.safetensors"))
        for name, weight in read_weights(path).items()
    }


def _check_same(folder: Path, other: Path) -> None:
    assert _read_terms(folder) == _read_terms(other)
    mine, theirs = _read_ends(folder), _read_ends(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(folder).run()
    return folder


def test_the_log_has_a_line_for_each_step(whole: Path) -> None:
    lines = _read_terms(whole)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["phase"] for line in lines] == ["first"] * 5 + ["second"] * 3
    critic = {"critic/loss", "critic/real", "critic/gradient_norm"}
    generator = {"generator/loss", "generator/gradient_norm"}
    for line, is_both in zip(lines, (1, 0, 1, 0, 1, 1, 0, 1), strict=True):
        assert line.keys() == {"step", "phase"} | critic | (generator if is_both else set())


@pytest.mark.slow
def test_a_phase_begins_where_the_last_one_ended(whole: Path, tmp_path: Path) -> None:
    ends = _read_ends(whole)
    builder = make_trainer(whole).builder
    for role in TRAINED:
        for name, weight in builder.build(1, role).named_parameters():
            assert torch.equal(weight, ends[f"first/{role}/{name}"])
    # A frozen role that was there before stays what it was.
    reference, teacher = builder.build(1, "reference"), builder.build(0, "generator")
    for mine, theirs in zip(reference.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
    # A role that was not there may begin with another role of the phase before.
    recipe = make_recipe()
    methods = [ToyMethod(reference=None), ToyMethod(reference="generator")]
    other = make_trainer(tmp_path, recipe, methods=methods)
    other.builder.specs = [method.roles() for method in methods]
    other.run()
    ends = _read_ends(tmp_path)
    for name, weight in other.builder.build(1, "reference").named_parameters():
        assert torch.equal(weight, ends[f"first/generator/{name}"])


@pytest.mark.slow
def test_an_exported_role_may_go_on_where_its_average_points(whole: Path, tmp_path: Path) -> None:
    recipe = make_recipe()
    first = replace(recipe.phases["first"], exports="generator", extrapolation=1.5)
    extended = replace(recipe, phases={"first": first})
    run = make_trainer(tmp_path, extended)
    run.run()
    mine, plain = _read_ends(tmp_path), _read_ends(whole)
    begin = run.builder.build(0, "generator").state_dict()
    for name, weight in begin.items():
        place = f"first/generator/{name}"
        torch.testing.assert_close(mine[place], weight + 1.5 * (plain[place] - weight))
        assert not torch.equal(mine[place], plain[place])
    critic = {place for place in mine if place.startswith("first/critic/")}
    assert critic
    assert all(torch.equal(mine[place], plain[place]) for place in critic)
    # It decides nothing before the phase ends: a run that has ended ends again, further on.
    further = replace(extended, phases={"first": replace(first, extrapolation=2.0)})
    make_trainer(tmp_path, further).run()
    again = _read_ends(tmp_path)
    for name, weight in begin.items():
        place = f"first/generator/{name}"
        torch.testing.assert_close(again[place], weight + 2 * (plain[place] - weight))


def test_what_a_role_begins_with_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"reference of phase first begins with 'somebody'"):
        make_trainer(tmp_path, method=ToyMethod(reference="somebody")).run()


@pytest.mark.slow
def test_only_the_role_that_is_stepped_requires_gradients(tmp_path: Path) -> None:
    seen: list[tuple[str, dict[str, bool]]] = []

    class Spy(ToyMethod):
        def updates(self, step: int, batch: Any, roles: Any, draws: Any) -> Any:
            for update in super().updates(step, batch, roles, draws):

                def spy(role: str = update.role) -> Tensor:
                    learns = {
                        name: any(p.requires_grad for p in engine.module.parameters())
                        for name, engine in roles.items()
                    }
                    seen.append((role, learns))
                    return torch.zeros((), requires_grad=True)

                yield replace(update, losses=[spy, *update.losses])

    make_trainer(tmp_path, method=Spy()).run()
    assert {role for role, _ in seen} == set(TRAINED)
    for role, learns in seen:
        assert learns == {name: name == role for name in ("generator", "critic", "reference")}


@pytest.mark.slow
def test_parts_of_an_update_add_up_to_it(tmp_path: Path) -> None:
    """Three micro-batches of two samples, and one of six: noise apart, the same."""
    for name, shape in (("parts", BatchShape(size=2, count=3)), ("one", BatchShape(size=6))):
        recipe = make_recipe(batch=shape)
        make_trainer(tmp_path / name, recipe, method=ToyMethod(noise=0.0)).run()
    parts, one = (_read_terms(tmp_path / name) for name in ("parts", "one"))
    for line, expected in zip(parts, one, strict=True):
        assert line.pop("phase") == expected.pop("phase")
        assert line == pytest.approx(expected, rel=1e-4)
    mine, theirs = (_read_ends(tmp_path / name) for name in ("parts", "one"))
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["recompute", "offload"])
def test_what_is_kept_for_the_backward_pass_changes_nothing(
    whole: Path, tmp_path: Path, activations: Activations
) -> None:
    engine = replace(make_recipe().engine, activations=activations)
    run = make_trainer(tmp_path, make_recipe(engine=engine))
    run.run()
    assert all(engine.module.uses_checkpointing for engine in run.engines.values())
    _check_same(tmp_path, whole)


def test_micro_batches_must_be_shared_out_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.ranks, "world_size", lambda: 4)
    with pytest.raises(RecipeError, match=r"got 4 ranks for batch.count 2"):
        make_trainer(tmp_path)


@pytest.mark.slow
def test_a_step_draws_what_its_number_says(whole: Path, tmp_path: Path) -> None:
    longer = {**make_recipe().phases}
    longer["first"] = replace(longer["first"], steps=2)
    make_trainer(tmp_path, make_recipe(phases=longer)).run()
    # The second phase now begins at step 2, with other weights, but with the samples of step 2.
    seen: list[Tensor] = []

    class Spy(ToyBatches):
        def draw(self, seed: int, step: int, start: int, size: int) -> ToyBatch:
            batch = super().draw(seed, step, start, size)
            seen.append(batch.x)
            return batch

    run = make_trainer(tmp_path, make_recipe(phases=longer), batches=[Spy()] * 2)
    run.run()
    assert not seen  # there was nothing left to do
    run = make_trainer(tmp_path / "other", batches=[Spy()] * 2)
    run.run()
    assert len(seen) == 8 * 2
    assert len({tuple(x.flatten().tolist()) for x in seen}) == len(seen)


@pytest.mark.slow
def test_a_phase_may_have_samples_and_batches_of_its_own(tmp_path: Path) -> None:
    phases = {**make_recipe().phases}
    phases["second"] = replace(phases["second"], batch=BatchShape(size=5, count=1))
    sizes: dict[str, list[int]] = {"first": [], "second": []}

    class Spy(ToyBatches):
        def __init__(self, name: str) -> None:
            self.name = name

        def draw(self, seed: int, step: int, start: int, size: int) -> ToyBatch:
            sizes[self.name].append(size)
            return super().draw(seed, step, start, size)

    batches = [Spy("first"), Spy("second")]
    make_trainer(tmp_path, make_recipe(phases=phases), batches=batches).run()
    shape = make_recipe().batch
    assert sizes == {"first": [shape.size] * shape.count * 5, "second": [5] * 3}


class TestMixedPrecision:
    """Network calls in bfloat16, weights in float32."""

    @pytest.mark.slow
    @pytest.mark.parametrize("optimizer", ["adamw", "muon"])
    def test_weights_stay_and_calls_are_rounded(
        self, whole: Path, tmp_path: Path, optimizer: str
    ) -> None:
        engine = replace(make_recipe().engine, precision="mixed", optimizer=optimizer)
        run = make_trainer(tmp_path, make_recipe(engine=engine))
        run.run()
        for engine in run.engines.values():
            assert {weight.dtype for weight in engine.module.parameters()} == {torch.float32}
        mixed, exact = (_read_terms(folder)[0] for folder in (tmp_path, whole))
        assert mixed["critic/loss"] != exact["critic/loss"]
        assert mixed["critic/loss"] == pytest.approx(exact["critic/loss"], rel=0.05)

    @pytest.mark.slow
    def test_a_call_without_gradient_takes_none_from_the_next(self, tmp_path: Path) -> None:
        norms: list[float] = []

        class Looks(ToyMethod):
            def updates(
                self, step: int, batch: Any, roles: Mapping[str, Engine], draws: Draws
            ) -> Iterator[Update]:
                def spy(engine: Engine) -> Tensor:
                    with torch.no_grad():
                        engine.module(batch.x)
                    loss = engine(batch.x).square().mean()
                    weights = list(engine.module.parameters())
                    gradients = torch.autograd.grad(loss, weights, retain_graph=True)
                    norms.extend(float(gradient.norm()) for gradient in gradients)
                    return loss

                for update in super().updates(step, batch, roles, draws):
                    yield replace(update, losses=[partial(spy, roles[update.role])])

        engine = replace(make_recipe().engine, precision="mixed")
        make_trainer(tmp_path, make_recipe(engine=engine), method=Looks()).run()
        assert norms
        assert all(norm > 0 for norm in norms)


STRICT = GuardSettings(most_skips=0)


class TestGuard:
    @pytest.mark.slow
    def test_a_step_that_is_no_number_is_left_out_and_counted(self, tmp_path: Path) -> None:
        run = make_trainer(tmp_path, method=ToyMethod(explodes_at=2))
        run.run()
        lines = _read_terms(tmp_path)
        assert [line["step"] for line in lines] == list(range(1, 9))
        skipped = [line["step"] for line in lines if line.get("critic/skipped")]
        assert skipped == [3, 8]  # the third step of each phase
        for line in lines:
            assert all(math.isfinite(x) for x in line.values() if isinstance(x, float))
        assert all(weight.isfinite().all() for weight in _read_ends(tmp_path).values())
        # The critic keeps its weights in that step, the generator makes its own.
        assert "generator/loss" in lines[2]
        assert "generator/skipped" not in lines[2]

    @pytest.mark.slow
    def test_a_gradient_that_is_no_number_is_left_out_too(self, tmp_path: Path) -> None:
        class Spike(ToyMethod):
            def updates(self, step: int, batch: Any, roles: Any, draws: Any) -> Any:
                for update in super().updates(step, batch, roles, draws):
                    weight = roles[update.role].module.leave.weight
                    if step == 2:
                        # A finite loss with an infinite slope.
                        update = replace(update, losses=[lambda w=weight: (w - w).sqrt().sum()])
                    yield update

        make_trainer(tmp_path, method=Spike()).run()
        line = _read_terms(tmp_path)[2]
        assert line["critic/skipped"] == 1
        assert line["critic/loss"] == 0
        assert "critic/gradient_norm" not in line
        assert all(weight.isfinite().all() for weight in _read_ends(tmp_path).values())

    @pytest.mark.slow
    def test_patience_ends_and_a_checkpoint_remembers_it(self, tmp_path: Path) -> None:
        class Always(ToyMethod):
            def updates(self, step: int, batch: Any, roles: Any, draws: Any) -> Any:
                yield from replace(self, explodes_at=max(step, 2)).updates_of_toy(
                    step, batch, roles, draws
                )

            def updates_of_toy(self, *inputs: Any) -> Any:
                return ToyMethod.updates(self, *inputs)

        recipe = make_recipe(guard=GuardSettings(most_skips=2))
        phases = {"first": replace(recipe.phases["first"], steps=9)}
        recipe = replace(recipe, phases=phases)
        for _ in range(2):  # the second run goes on after step 4, with one step left out
            with pytest.raises(TrainingError, match=r"step 5: critic/loss = nan, after 2 steps"):
                make_trainer(tmp_path, recipe, method=Always()).run()
        assert [line["step"] for line in _read_terms(tmp_path)] == [1, 2, 3, 4]

    def test_a_loss_that_is_no_number_never_reaches_the_weights(self, tmp_path: Path) -> None:
        run = make_trainer(tmp_path, make_recipe(guard=STRICT), method=ToyMethod(explodes_at=3))
        with pytest.raises(TrainingError, match=r"step 4: critic/loss = nan"):
            run.run()
        for engine in run.engines.values():
            assert all(weight.isfinite().all() for weight in engine.export().values())
        assert [line["step"] for line in _read_terms(tmp_path)] == [1, 2, 3]

    @pytest.mark.slow
    def test_after_a_repair_it_goes_on(self, whole: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainingError):
            make_trainer(tmp_path, make_recipe(guard=STRICT), method=ToyMethod(explodes_at=3)).run()
        make_trainer(tmp_path).run()
        _check_same(tmp_path, whole)

    @pytest.mark.slow
    def test_what_runs_away_is_stopped(self, tmp_path: Path) -> None:
        guard = GuardSettings(limits={"critic/loss": 0.1}, patience=4)
        with pytest.raises(TrainingError, match=r"step 4: critic/loss = .* above 0.1 for 4 steps"):
            make_trainer(tmp_path, make_recipe(guard=guard)).run()
        # How long it has been so is part of a checkpoint.
        with pytest.raises(TrainingError, match=r"step 4: "):
            make_trainer(tmp_path, make_recipe(guard=guard)).run()


class TestEndOfAPhase:
    """A phase may end when the logit gap was seen and closed."""

    GAPS = (0.0, 0.2, 0.2, 0.04, 0.02, 0.0, 0.0, 0.0)

    def _run(self, folder: Path, *, until: int = 99, **changes: Any) -> None:
        ends = GapSeenAndClosed(seen=0.1, closed=0.03, window=2, **changes)
        recipe = make_recipe()
        phases = {
            "first": replace(recipe.phases["first"], steps=8, ends=ends),
            "second": replace(recipe.phases["second"], steps=1),
        }
        run = make_trainer(folder, replace(recipe, phases=phases))
        advance = run.advance

        def with_gap(phase_step: int | None = None) -> dict[str, float]:
            del phase_step
            if run.state.step == until:
                run.stop()
            return {**advance(), "discriminator/logit_gap": self.GAPS[run.state.phase_step]}

        run.advance = with_gap
        run.run()

    @pytest.mark.slow
    def test_it_ends_at_the_criterion_and_counts_the_share(self, tmp_path: Path) -> None:
        self._run(tmp_path)
        lines = _read_terms(tmp_path)
        assert [line["phase"] for line in lines] == ["first"] * 5 + ["second"]
        shares = [line["discriminator/gap_share"] for line in lines]
        assert shares == pytest.approx([0, 1 / 2, 2 / 3, 2 / 4, 2 / 5, 0])

    @pytest.mark.slow
    def test_a_stopped_run_ends_there_too(self, tmp_path: Path) -> None:
        self._run(tmp_path / "whole")
        for until in (2, 4):
            folder = tmp_path / str(until)
            self._run(folder, until=until)
            self._run(folder)
            _check_same(folder, tmp_path / "whole")

    def test_a_gap_that_is_never_seen_is_no_end(self) -> None:
        watch = GapWatch(GapSeenAndClosed(window=2))
        for _ in range(9):
            watch.add({"discriminator/logit_gap": 0.0})
        assert not watch.is_over
        assert "may have moved by noise" in (watch.describe() or "")
        # What the discriminator does before the student moves is no end either.
        for num_alone, is_over in ((0, True), (3, False)):
            watch = GapWatch(GapSeenAndClosed(window=1), None, num_alone)
            for gap in (0.2, 0.2, 0.2, 0.0):
                watch.add({"discriminator/logit_gap": gap})
            assert watch.is_over == is_over
        assert GapWatch().add({"student/loss": 1.0}) == {}
        assert GapWatch().describe() is None
        with pytest.raises(RecipeError, match="closed must be smaller than seen"):
            GapSeenAndClosed(seen=0.05, closed=0.05)


def test_a_discriminator_has_no_rate_warm_up_and_a_late_student_has_its_own(
    tmp_path: Path,
) -> None:
    class Late(ToyMethod):
        def roles(self) -> dict[str, Any]:
            roles = super().roles()
            roles["generator"] = replace(roles["generator"], starts_at=2)
            return roles

    recipe = make_recipe()
    recipe = replace(recipe, rate=replace(recipe.rate, without_warmup=("critic",)))
    run = make_trainer(tmp_path, recipe, method=Late())
    assert [run._rate_factor("critic", step) for step in range(3)] == [1, 1, 1]
    assert [run._rate_factor("generator", step) for step in (2, 3, 4)] == pytest.approx(
        [1 / 3, 2 / 3, 1]
    )


class TestResume:
    def test_another_recipe_is_refused(self, whole: Path) -> None:
        before = _read_terms(whole)
        with pytest.raises(CheckpointError, match=r"belongs to a run of another recipe"):
            make_trainer(whole, make_recipe(seed=1)).run()
        assert _read_terms(whole) == before

    @pytest.mark.slow
    def test_rates_and_averages_may_change_and_that_is_logged(
        self, whole: Path, tmp_path: Path
    ) -> None:
        shorter = {**make_recipe().phases}
        shorter["second"] = replace(shorter["second"], steps=1)
        make_trainer(tmp_path, make_recipe(phases=shorter)).run()
        assert not (tmp_path / "changes.jsonl").exists()
        recipe = make_recipe()
        changed = replace(
            recipe,
            engine=replace(recipe.engine, clip_norm=0.1),
            average=replace(recipe.average, decay=0.5),
            rate=replace(recipe.rate, num_warmup_steps=1),
            salt=1,
        )
        make_trainer(tmp_path, changed).run()
        lines = (tmp_path / "changes.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"step": 6, "change": "average.decay 0.8 -> 0.5"},
            {"step": 6, "change": "engine.clip_norm 0.5 -> 0.1"},
            {"step": 6, "change": "rate.num_warmup_steps 3 -> 1"},
            {"step": 6, "change": "salt 0 -> 1"},
        ]
        mine, plain = _read_terms(tmp_path), _read_terms(whole)
        assert mine[:6] == plain[:6]
        assert mine[6:] != plain[6:]
        # Once more, with nothing changed since: nothing is logged twice.
        make_trainer(tmp_path, changed).run()
        assert (tmp_path / "changes.jsonl").read_text().splitlines() == lines

    @pytest.mark.slow
    def test_a_salt_changes_the_draws_from_there_on(self, whole: Path, tmp_path: Path) -> None:
        make_trainer(tmp_path, replace(make_recipe(), salt=3)).run()
        mine, plain = _read_terms(tmp_path), _read_terms(whole)
        for one, other in zip(mine, plain, strict=True):
            assert one["critic/loss"] != other["critic/loss"]

    @pytest.mark.slow
    def test_other_data_and_weights_are_refused(self, tmp_path: Path) -> None:
        shorter = {**make_recipe().phases}
        shorter["second"] = replace(shorter["second"], steps=1)
        files = {"data of phase first": "a", "weights.teacher": "b"}
        make_trainer(tmp_path, make_recipe(phases=shorter), files=files).run()
        before = _read_terms(tmp_path)
        other = {**files, "weights.teacher": "c"}
        with pytest.raises(CheckpointError, match=r"another content of weights\.teacher;"):
            make_trainer(tmp_path, files=other).run()
        assert _read_terms(tmp_path) == before
        make_trainer(tmp_path, files=other, accepts_files=True).run()
        assert len(_read_terms(tmp_path)) == 8
        assert "another content of weights.teacher" in (tmp_path / "changes.jsonl").read_text()
        make_trainer(tmp_path, files=other).run()

    @pytest.mark.slow
    def test_a_longer_run_goes_on(self, whole: Path, tmp_path: Path) -> None:
        shorter = {**make_recipe().phases}
        shorter["second"] = replace(shorter["second"], steps=1)
        make_trainer(tmp_path, make_recipe(phases=shorter)).run()
        assert len(_read_terms(tmp_path)) == 6
        make_trainer(tmp_path).run()
        _check_same(tmp_path, whole)

    @pytest.mark.slow
    def test_a_cut_line_of_the_log_is_written_again(self, whole: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainingError):
            make_trainer(tmp_path, make_recipe(guard=STRICT), method=ToyMethod(explodes_at=4)).run()
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"step": 5, "pha')
        make_trainer(tmp_path).run()
        _check_same(tmp_path, whole)

    @pytest.mark.slow
    @pytest.mark.parametrize("place", ["loss", "state", "engine", "marker", "keep", "phase", "log"])
    @pytest.mark.parametrize("count", [2, 4])
    def test_a_killed_run_ends_as_if_it_had_not_been(
        self, whole: Path, tmp_path: Path, place: str, count: int
    ) -> None:
        assert run_in_child(run_and_die, tmp_path, place, count) == -signal.SIGKILL
        make_trainer(tmp_path).run()
        _check_same(tmp_path, whole)
        assert len(Checkpoints(tmp_path / "checkpoints", 2).list_complete()) == 2
        assert not list(tmp_path.rglob("*.part"))


def run_and_die(folder: Path, place: str, count: int) -> None:
    """Run the toy, and kill this process when it comes to a place for the count-th time."""
    torch.set_num_threads(1)
    passed = 0

    def dying(real: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        def call(*inputs: Any, **named: Any) -> Any:
            nonlocal passed
            passed += 1
            if after:
                real(*inputs, **named)
            if passed == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return None if after else real(*inputs, **named)

        return call

    if place == "loss":
        nn.functional.softplus = dying(nn.functional.softplus)
    elif place == "state":  # before the state is written, the engines are there
        checkpoint.mark_complete = dying(checkpoint.mark_complete)
    elif place == "engine":  # in the middle of the engines
        PlainEngine.save = dying(PlainEngine.save, after=True)
    elif place == "marker":  # the marker is there under another name
        checkpoint.write_text = _half_written(dying(lambda: None))
    elif place == "keep":  # while old ones are removed
        checkpoint.remove = dying(checkpoint.remove, after=True)
    elif place == "phase":  # between two phases
        RoleBuilder.end = dying(RoleBuilder.end, after=True)
    else:
        trainer.append_log = dying(trainer.append_log, after=True)
    make_trainer(folder, make_engine=make_plain).run()


def _half_written(die: Callable[[], Any]) -> Callable[[Path, str], None]:
    def write(path: Path, text: str) -> None:
        path.with_name(f".{path.name}.part").write_text(text[: len(text) // 2])
        die()
        path.write_text(text)
        path.with_name(f".{path.name}.part").unlink()

    return write
