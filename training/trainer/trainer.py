"""Training loop: phases, steps, updates and checkpoints.

The loop writes to the run's folder: ``log.jsonl`` with a line per step, ``checkpoints``, and
``phases`` with the final weights of each phase. A run that was killed at any point resumes as if it
had not been interrupted, because everything that a step does follows from its number.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from training.engine import distributed as ranks
from training.engine.checkpoint import Checkpoints, RunState
from training.engine.divergence import Guard
from training.engine.engine import Engine, EngineSettings, autocast
from training.engine.log import append_log, log_changes, trim_log
from training.engine.optimizers import extrapolate, rate_factor
from training.engine.rng import Draws
from training.recipe import RECIPE, Phase, Recipe, store_recipe
from training.trainer.gap import GapWatch
from training.trainer.hooks import Hook
from training.trainer.roles import RoleBuilder
from turbotalk_core.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from training.methods.method import Method, Update

logger = logging.getLogger(__name__)


class Batches(Protocol):
    """Source of micro-batches."""

    def stream(
        self, seed: int, first_step: int, *, rank: int, world_size: int, size: int
    ) -> Iterator[Any]:
        """Return one micro-batch per step, from a given step on.

        Args:
            seed: seed of the order.
            first_step: step of the first micro-batch.
            rank: number of the micro-batch within its step.
            world_size: micro-batches per step.
            size: samples per micro-batch.

        Returns:
            An endless iterator.
        """
        ...


class Trainer:
    """Training run of a recipe.

    Args:
        recipe: all settings.
        folder: folder of the run.
        methods: method of each phase.
        builder: builder of the networks.
        batches: source of the micro-batches of each phase.
        make_engine: function that makes an engine of a network.
        device: device to which batches are moved.
        hooks: called at the start of a phase, around each step and at the end, in this order.
        files: digests of the prepared set and of the initial weights by name; a checkpoint of a run
            with others is refused.
        accepts_files: whether it is accepted instead, and the change logged.

    Attributes:
        engines: engines of the current phase, by role.
        state: progress of the run.
        device: device to which batches are moved.

    Raises:
        RecipeError: if the micro-batches cannot be divided evenly among the ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        methods: Sequence[Method],
        builder: RoleBuilder,
        batches: Sequence[Batches],
        make_engine: Callable[[nn.Module, EngineSettings], Engine],
        device: torch.device | None = None,
        hooks: Sequence[Hook] = (),
        files: Mapping[str, str] | None = None,
        accepts_files: bool = False,
    ) -> None:
        for name, phase in recipe.phases.items():
            count = recipe.batch_of(phase).count
            if count % ranks.world_size():
                raise RecipeError(
                    f"got {ranks.world_size()} ranks for batch.count {count} of phase {name}; the "
                    "micro-batches of an update are shared out evenly, so take a number of ranks "
                    "that divides them"
                )
        self.recipe = recipe
        self.folder = folder
        self.methods = methods
        self.builder = builder
        self.batches = batches
        self.engines: dict[str, Engine] = {}
        self.state = RunState(step=0, phase=0, phase_step=0, recipe=recipe.fingerprint(0))
        self.device = device or torch.device("cpu")
        self.hooks = tuple(hooks)
        self.files = dict(files or {})
        self.accepts_files = accepts_files
        self._changes: list[str] = []
        self._gap = GapWatch()
        self._make_engine = make_engine
        self._stops = False
        self._guard = Guard(recipe.guard)
        self._checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoints.keep)
        self._phases = list(recipe.phases.items())
        self._streams: list[Iterator[Any]] = []

    def run(self) -> None:
        """Train to the end, from the newest checkpoint in the folder on.

        The recipe is stored in the folder before training starts. For a complete run, its end is
        repeated: the weights of the last phase are written and its hooks are called again.

        Raises:
            TrainingError: if a term is not finite, or diverges.
            CheckpointError: if the folder contains a run of another recipe.
        """
        found = self._resume()
        if ranks.rank() == 0:
            store_recipe(self.recipe, self.folder / RECIPE)
            trim_log(self.folder, self.state.step)
            log_changes(self.folder, self.state.step, self._changes)
        for change in self._changes:
            logger.info("from step %d on: %s", self.state.step, change)
        for number in range(self.state.phase, len(self._phases)):
            self._begin(number)
            if found is not None:
                for role, engine in self.engines.items():
                    engine.load(found / role)
                logger.info("goes on at step %d", self.state.step)
                found = None
            else:
                self._move(phase=number, phase_step=0, watch={})
            self._move(
                recipe=self.recipe.fingerprint(number),
                settings=self.recipe.list_changeable(number),
                files=self.files,
            )
            num_alone = max(spec.starts_at for spec in self.methods[number].roles().values())
            self._gap = GapWatch(self._phase.ends, self.state.watch, num_alone)
            self._streams = self._open_streams()
            for hook in self.hooks:
                hook.on_phase_start(self)
            self._run_phase(number)
            if self._stops:
                logger.info("stopped at step %d", self.state.step)
                return
            self._end(number)

    def stop(self) -> None:
        """Stop the run with a checkpoint of the current step, or at once at the start of a phase.

        To be called by hooks; all ranks must stop at the same step. The phase stays unfinished, and
        the run can be resumed.
        """
        self._stops = True

    @property
    def _phase(self) -> Phase:
        return self._phases[self.state.phase][1]

    @property
    def _slots(self) -> range:
        """Return the numbers of the micro-batches of a step that this rank computes."""
        count = self.recipe.batch_of(self._phase).count // ranks.world_size()
        return range(ranks.rank() * count, (ranks.rank() + 1) * count)

    def _open_streams(self) -> list[Iterator[Any]]:
        batch = self.recipe.batch_of(self._phase)
        return [
            self.batches[self.state.phase].stream(
                self.recipe.seed,
                self.state.step,
                rank=slot,
                world_size=batch.count,
                size=batch.size,
            )
            for slot in self._slots
        ]

    def _resume(self) -> Path | None:
        """Read the state of the newest checkpoint, before anything is written to the folder.

        Returns:
            Folder of the newest checkpoint, or None without one.

        Raises:
            CheckpointError: if it belongs to a run of another recipe.
        """
        found = self._checkpoints.find_newest()
        if found is None:
            return None
        self.state, path = found
        self._guard.streaks = dict(self.state.streaks)
        if self.state.recipe not in self.recipe.list_fingerprints(self.state.phase):
            raise CheckpointError(
                f"{path} belongs to a run of another recipe; go on with the one that is stored in "
                f"{self.folder / RECIPE}, or give another folder"
            )
        before, now = self.state.settings, self.recipe.list_changeable(self.state.phase)
        self._changes = [
            f"{name} {before.get(name, 'the default')} -> {now.get(name, 'the default')}"
            for name in sorted(before.keys() | now.keys())
            if before and before.get(name) != now.get(name)
        ]
        self._check_files(path)
        return path

    def _check_files(self, path: Path) -> None:
        """Check that the data and the initial weights are those of a checkpoint."""
        before = self.state.files
        other = sorted(
            name for name in before.keys() & self.files.keys() if before[name] != self.files[name]
        )
        if other and not self.accepts_files:
            raise CheckpointError(
                f"{path} was made with another content of {' and '.join(other)}; go on with what "
                "the run began with, or start again with --accept-changes to go on with this"
            )
        self._changes += [f"another content of {name}" for name in other]

    def _begin(self, number: int) -> None:
        """Build the engines of a phase, with one network at a time in the CPU's memory."""
        for engine in self.engines.values():  # frees memory before the next networks need it
            engine.close()
        self.engines.clear()
        gc.collect()
        for role, spec in self.methods[number].roles().items():
            network = self.builder.build(number, role)
            settings = self.recipe.settings_of(
                role, spec.learning, starts_at=spec.starts_at, every=spec.every
            )
            self.engines[role] = self._make_engine(network, settings)

    def _run_phase(self, number: int) -> None:
        name, phase = self._phases[number]
        while self.state.phase_step < phase.steps and not self._stops and not self._gap.is_over:
            for hook in self.hooks:
                hook.on_step_start(self)
            started = time.monotonic()
            terms = self.advance()
            self._move(step=self.state.step + 1, phase_step=self.state.phase_step + 1)
            self._guard.watch(self.state.step, terms)
            terms |= self._gap.add(terms)
            if ranks.rank() == 0:
                seconds = round(time.monotonic() - started, 3)
                line = {"step": self.state.step, "phase": name, **terms, "seconds": seconds}
                append_log(self.folder, line)
            for hook in self.hooks:
                hook.on_step_end(self, terms)
            is_last = self._stops or self._gap.is_over or self.state.phase_step == phase.steps
            if is_last or self.state.step % self.recipe.checkpoints.every == 0:
                self._move(streaks=self._guard.streaks, watch=self._gap.to_plain())
                self._checkpoints.save(self.state, self.engines)

    def _end(self, number: int) -> None:
        name, phase = self._phases[number]
        if (text := self._gap.describe()) is not None:
            logger.info("phase %s: %s", name, text)
        for role, spec in self.methods[number].roles().items():
            if spec.learning.trains != "frozen":
                weights = self.engines[role].export()
                if ranks.rank() == 0:
                    if role == phase.exports and phase.extrapolation > 1:
                        begin = self.builder.build(number, role).state_dict()
                        weights = extrapolate(begin, weights, phase.extrapolation)
                    self.builder.end(number, role, weights)
        for hook in self.hooks:
            hook.on_phase_end(self)
        ranks.barrier()

    def advance(self, phase_step: int | None = None) -> dict[str, float]:
        """Run all updates of one step, without changing ``state``.

        Args:
            phase_step: number of the step in the phase, which determines random draws, learning
                rate and the updates to make; None for the next step. Each call reads the next
                micro-batches, whatever the number.

        Returns:
            All terms, averaged over micro-batches and ranks, by ``role/term``. Terms of a role that
            is updated several times are averaged over its updates.

            A term that is not finite is left out; the weights of its role are then unchanged, and
            ``role/skipped`` is 1.

        Raises:
            TrainingError: if a term is not finite, after too many steps with such terms.
        """
        position = self.state.phase_step if phase_step is None else phase_step
        step = self.state.step - self.state.phase_step + position
        method = self.methods[self.state.phase]
        count = self.recipe.batch_of(self._phase).count
        running: list[Iterator[Update]] = []
        for slot, stream in zip(self._slots, self._streams, strict=True):
            batch = next(stream).to(self.device)
            draws = Draws(self.recipe.seed, step, slot, count=count, salt=self.recipe.salt)
            running.append(method.updates(position, batch, self.engines, draws))
        collected: dict[str, list[float]] = {}
        while (terms := self._update(running, step + 1, position)) is not None:
            for name, value in terms.items():
                collected.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in collected.items()}

    def _update(
        self, running: Sequence[Iterator[Update]], step: int, position: int
    ) -> dict[str, float] | None:
        """Run the next update of all micro-batches, and return its terms; None if none is left."""
        role, sums = None, {}
        for updates in running:
            with self._autocast():
                update = next(updates, None)
            if update is None:
                continue
            role, engine = update.role, self.engines[update.role]
            total: Tensor | None = None
            with self._only(role):
                for make_loss in update.losses:
                    with self._keep_activations(), self._autocast():
                        loss = make_loss()
                    engine.backward(loss / len(running))
                    total = loss.detach() if total is None else total + loss.detach()
            assert total is not None, f"an update of {role} without a loss"
            for name, value in {"loss": total, **update.log}.items():
                key = f"{role}/{name}"
                sums[key] = sums.get(key, 0) + value.detach().float() / len(running)
        if role is None:
            return None
        terms = ranks.mean_scalars(sums)
        self._guard.check(step, terms)
        # If the loss is not finite, the gradient is neither, and the engine keeps the weights.
        report = self.engines[role].step(self._rate_factor(role, position))
        terms[f"{role}/gradient_norm"] = report.gradient_norm
        if self._guard.check(step, terms):
            return terms
        logger.warning("step %d of %s is left out: a term is not finite", step, role)
        finite = {name: value for name, value in terms.items() if math.isfinite(value)}
        return {**finite, f"{role}/skipped": 1.0}

    def _rate_factor(self, role: str, position: int) -> float:
        rate, first = self.recipe.rate, self.methods[self.state.phase].roles()[role].starts_at
        return rate_factor(
            position - first,
            self._phase.steps - first,
            num_warmup_steps=0 if role in rate.without_warmup else rate.num_warmup_steps,
            kind=rate.kind,
        )

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast(self.device, self.recipe.engine.precision)

    def _keep_activations(self) -> AbstractContextManager[object]:
        if self.recipe.engine.activations != "offload":
            return nullcontext()
        # Of a recomputed block only the inputs are stored and so moved; of all else, every tensor.
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")

    @contextmanager
    def _only(self, role: str) -> Iterator[None]:
        """Make only the weights of one role require gradients."""
        others = [engine for name, engine in self.engines.items() if name != role]
        for engine in others:
            engine.set_trainable(yes=False)
        try:
            yield
        finally:
            for engine in others:
                engine.set_trainable(yes=True)

    def _move(self, **changes: Any) -> None:
        fields = {name: getattr(self.state, name) for name in RunState.__dataclass_fields__}
        self.state = RunState(**{**fields, **changes})
