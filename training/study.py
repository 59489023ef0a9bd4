"""Studies: which runs are made, which models are compared, at which settings, what is claimed.

    python -m training.study training/studies/distillation.yaml
    python -m training.study training/studies/distillation.yaml --train --only ablation_gan

The first command prints the command of each run, the second trains. ``training.results`` measures
what the runs exported.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from training.recipe import Count, Natural, parse, parse_yaml
from turbotalk_core.cli_arguments import REFUSED as REFUSED
from turbotalk_core.cli_arguments import refuse
from turbotalk_core.errors import RecipeError, TurboTalkError
from turbotalk_core.request import Schedule, TalkRequest, Update

Several = Annotated[int, Ge(2)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSource:
    """How a run is made.

    Attributes:
        recipe: by name.
        overrides: merged into it key by key, as a recipe is into its base; null takes a phase out.
        changes: ``key.key=value`` after these.
        note: anything to say of it: hardware, attempts that failed.
    """

    recipe: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    note: str = ""

    def list_changes(self) -> tuple[str, ...]:
        """Return all changes of the recipe as ``key.key=value``, overrides first."""
        return (*_flatten(self.overrides, ()), *self.changes)

    def arguments(self, name: str) -> list[str]:
        """Return the arguments of ``training.train`` that make the run.

        Args:
            name: of its folder.

        Returns:
            Recipe, changes and where it goes.
        """
        where = () if name == self.recipe else ("--run", f"runs/{name}")
        return [self.recipe, *self.list_changes(), *where]

    def command(self, name: str) -> str:
        """Return the command that makes the run.

        Args:
            name: of its folder.

        Returns:
            One line for a shell.
        """
        return shlex.join(["python", "-m", "training.train", *self.arguments(name)])


def _flatten(overrides: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    for key, value in overrides.items():
        place = (*path, key)
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, place)
        else:
            yield f"{'.'.join(place)}={_write_value(value)}"


def _write_value(value: Any) -> str:
    """Write a value as YAML in one line; words that YAML reads as something else are quoted."""
    if isinstance(value, str) and value.isidentifier() and parse_yaml(value, value) == value:
        return value
    return json.dumps(value)  # which is YAML


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model comes from: what one or several runs exported, or files.

    Attributes:
        runs: that differ in their training seed alone.
        phase: of the runs, whose export it is.
        dit: file of a video transformer.
        adapter: file of the audio adapter that learnt with it.
    """

    runs: tuple[str, ...] = ()
    phase: str | None = None
    dit: Path | None = None
    adapter: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A model at certain settings. What is left out is as the model ships.

    Attributes:
        label: what the page calls it.
        model: by name.
        steps: network evaluations per guidance branch.
        schedule: how the noise levels are spaced.
        update: from one noise level to the next.
        audio_guidance: scale; 1 is off.
        pairs: how many; None takes the study's.
        seeds: of the evaluation; None takes the study's.
    """

    label: str
    model: str
    steps: Count | None = None
    schedule: Schedule | None = None
    update: Update | None = None
    audio_guidance: Annotated[float, Ge(0)] | None = None
    pairs: Several | None = None
    seeds: tuple[Natural, ...] | None = None

    def request(self, shipped: TalkRequest, num_frames: int, seed: int) -> TalkRequest:
        """Give all settings of a clip.

        Args:
            shipped: with the model.
            num_frames: of a clip, 4n + 1; a clip is one chunk, whatever the model was trained on.
            seed: of the noise.

        Returns:
            The request.

        Raises:
            RequestError: settings that do not go together.
        """
        told = {
            "num_inference_steps": self.steps,
            "schedule": self.schedule,
            "update": self.update,
            "audio_guidance_scale": self.audio_guidance,
        }
        asked: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
        return replace(shipped, seed=seed, chunk_frames=num_frames, **asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows that are to be compared.

    Attributes:
        title: heading on the page.
        about: what is compared, and how to read it.
        frames: of each clip, 4n + 1; None takes the study's.
        rows: by name, in order.
    """

    title: str
    about: str = ""
    frames: Count | None = None
    rows: Mapping[str, Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A bound on a median, or on the ratio of two.

    Attributes:
        text: what is claimed, in words.
        metric: by its name in a summary.
        row: as ``table.row``.
        of: row by whose median the first one is divided; None divides by nothing.
        at_least: lower bound.
        at_most: upper bound.
    """

    text: str
    metric: str
    row: str
    of: str | None = None
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCurves:
    """Plots of metrics by number of steps.

    Attributes:
        table: under which they stand.
        series: rows by the name of what they have in common.
        level: row drawn as a line that the others are to be read against.
    """

    table: str
    series: Mapping[str, tuple[str, ...]]
    level: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSeeds:
    """How diversity is measured.

    Attributes:
        pairs: the first ones of the evaluation.
        seeds: clips of each.
    """

    pairs: Count = 4
    seeds: Several = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ContactSheets:
    """Clips side by side: a picture per table and pair.

    Attributes:
        pairs: the first ones of the first evaluation seed.
        columns: frames of each clip.
    """

    pairs: Natural = 2
    columns: Count = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Everything that decides a page of results.

    Attributes:
        title: of the page.
        about: first paragraph.
        notes: paragraphs that no number tells: what was tried and failed.
        frames: of each clip.
        pairs: held-out avatars with held-out utterances, for each seed.
        seeds: of the evaluation: of pairs and noise.
        diversity: how it is measured.
        sheets: of contact.
        runs: by the name of their folders.
        models: by name.
        tables: by name, in order.
        claims: by name, in order.
        steps: plots by number of steps.
        logs: runs whose curves are drawn.
    """

    title: str
    about: str = ""
    notes: tuple[str, ...] = ()
    frames: Count = 81
    pairs: Several = 20
    seeds: tuple[Natural, ...] = (1,)
    diversity: NoiseSeeds = field(default_factory=NoiseSeeds)
    sheets: ContactSheets = field(default_factory=ContactSheets)
    runs: Mapping[str, RunSource] = field(default_factory=dict)
    models: Mapping[str, ModelSource]
    tables: Mapping[str, Table]
    claims: Mapping[str, Claim] = field(default_factory=dict)
    steps: StepCurves | None = None
    logs: tuple[str, ...] = ()

    def rows(self) -> dict[str, Row]:
        """All rows, by ``table.row``."""
        return {
            f"{table}.{name}": row
            for table, rows in self.tables.items()
            for name, row in rows.rows.items()
        }


def load_study(path: Path) -> Study:
    """Read a study.

    Args:
        path: of a YAML file.

    Returns:
        The study, checked.

    Raises:
        RecipeError: no such file, an unknown key, a value out of range, or a name that nothing has.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"there is no study {path}; give the path of a .yaml file") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is no mapping of keys to values; write key: value")
    study = parse(Study, data, f"study {path.stem}")
    check_names(study, f"study {path.stem}")
    return study


def check_names(study: Study, where: str) -> None:
    """Refuse names that nothing has, and models that come from nowhere.

    Args:
        study: parsed.
        where: what it is, for messages.

    Raises:
        RecipeError: such a name, and those that there are.
    """

    def check(kind: str, place: str, name: str, known: Mapping[str, Any]) -> None:
        if name not in known:
            raise RecipeError(
                f"{where}: {place} names the {kind} {name}; there are {', '.join(known)}"
            )

    rows = study.rows()
    for name, model in study.models.items():
        has_runs = bool(model.runs) and model.phase is not None
        has_files = model.dit is not None and model.adapter is not None
        given = [model.runs or None, model.phase, model.dit, model.adapter]
        if has_runs == has_files or sum(value is not None for value in given) != 2:
            raise RecipeError(
                f"{where}: models.{name} must have runs and phase, or dit and adapter, and nothing "
                "else"
            )
        for run in model.runs:
            check("run", f"models.{name}", run, study.runs)
    for place, row in rows.items():
        check("model", f"tables.{place}", row.model, study.models)
        if (row.pairs or study.pairs) < max(study.diversity.pairs, study.sheets.pairs):
            raise RecipeError(
                f"{where}: tables.{place} has fewer pairs than diversity or sheets ask for; give "
                "it more, or these less"
            )
    for name, claim in study.claims.items():
        for row in (claim.row, claim.of or claim.row):
            check("row", f"claims.{name}", row, rows)
        if claim.at_least is None and claim.at_most is None:
            raise RecipeError(f"{where}: claims.{name} bounds nothing; set at_least or at_most")
    if study.steps is not None:
        check("table", "steps", study.steps.table, study.tables)
        for row in (*sum(study.steps.series.values(), ()), *filter(None, (study.steps.level,))):
            check("row", "steps", row, rows)
    for run in study.logs:
        check("run", "logs", run, study.runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        The exit code; that of the first run that fails.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.study", description="Print or run the commands of a study's runs."
    )
    parser.add_argument("study", type=Path, help="YAML file, for example in training/studies")
    parser.add_argument("--train", action="store_true", help="run them, one after the other")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="these runs alone")
    arguments = parser.parse_args(argv)
    try:
        study = load_study(arguments.study)
        for name in arguments.only:
            if name not in study.runs:
                raise RecipeError(f"there is no run {name}; there are {', '.join(study.runs)}")
    except TurboTalkError as error:
        return refuse(error)
    for name, run in study.runs.items():
        if arguments.only and name not in arguments.only:
            continue
        sys.stdout.write(f"{run.command(name)}\n")
        sys.stdout.flush()
        if arguments.train:
            # A process each: an engine's ranks are joined once per process.
            command = [sys.executable, "-m", "training.train", *run.arguments(name)]
            code = subprocess.run(command, check=False).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
