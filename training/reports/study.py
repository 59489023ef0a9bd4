"""Studies: runs to make, models to compare, their settings, and claims about the results.

    python -m training.reports.study training/studies/distillation.yaml
    python -m training.reports.study training/studies/distillation.yaml --train --only ablation_gan

The first command prints the command of each run, the second trains. ``results`` measures the
exported models.
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
from training.texts import read_text
from turbotalk_core.cli.arguments import REFUSED as REFUSED
from turbotalk_core.cli.arguments import Parser, run
from turbotalk_core.cli.console import say
from turbotalk_core.errors import RecipeError
from turbotalk_core.request import Schedule, TalkRequest, Update

Several = Annotated[int, Ge(2)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSource:
    """Training run of a study.

    Attributes:
        recipe: name of the recipe.
        overrides: merged into the recipe key by key, like a recipe into its base; null removes a
            phase.
        changes: ``key.key=value`` changes, applied after these.
        note: remarks for the page, such as hardware or failed attempts.
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
            name: name of the run's folder.

        Returns:
            Recipe, changes and folder.
        """
        where = () if name == self.recipe else ("--run", f"runs/{name}")
        return [self.recipe, *self.list_changes(), *where]

    def command(self, name: str) -> str:
        """Return the command that makes the run.

        Args:
            name: name of the run's folder.

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
    """Return a value as YAML in one line, with quotes around words that are not plain strings."""
    if isinstance(value, str) and value.isidentifier() and parse_yaml(value, value) == value:
        return value
    return json.dumps(value)  # JSON is valid YAML


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Origin of a model: the exports of one or several runs, or files.

    Attributes:
        runs: runs that differ in their training seed alone.
        phase: phase of the runs whose export is used.
        dit: file of a video transformer.
        adapter: file of the audio adapter that was trained with it.
    """

    runs: tuple[str, ...] = ()
    phase: str | None = None
    dit: Path | None = None
    adapter: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A model with settings for sampling; a setting left out has the model's shipped value.

    Attributes:
        label: name on the page.
        model: name of the model.
        steps: network evaluations per guidance branch.
        schedule: spacing of the noise levels.
        update: update rule from one noise level to the next.
        audio_guidance: guidance scale; 1 is off.
        pairs: number of pairs; None uses the study's.
        seeds: evaluation seeds; None uses the study's.
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
        """Return the request for one clip.

        Args:
            shipped: request with the model's shipped settings.
            num_frames: frames of the clip, 4n + 1. A clip is one chunk, whatever the length of the
                model's training samples.
            seed: seed of the noise.

        Returns:
            The request.

        Raises:
            RequestError: if the settings contradict each other.
        """
        settings = {
            "num_inference_steps": self.steps,
            "schedule": self.schedule,
            "update": self.update,
            "audio_guidance_scale": self.audio_guidance,
        }
        chosen: dict[str, Any] = {
            name: value for name, value in settings.items() if value is not None
        }
        return replace(shipped, seed=seed, chunk_frames=num_frames, **chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows to be compared.

    Attributes:
        title: heading on the page.
        about: text on what is compared and how to read it.
        frames: frames of each clip, 4n + 1; None uses the study's.
        rows: rows by name, in order.
    """

    title: str
    about: str = ""
    frames: Count | None = None
    rows: Mapping[str, Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Bound on a median, or on the ratio of two medians.

    Attributes:
        text: the claim in words.
        metric: name of the metric in a summary.
        row: ``table.row`` of the median.
        of: ``table.row`` of the median to divide by; None for no division.
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
        table: table that the plots follow on the page.
        series: rows of each line, by the line's name.
        level: row drawn as a horizontal line, for comparison.
    """

    table: str
    series: Mapping[str, tuple[str, ...]]
    level: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSeeds:
    """Measurement of diversity.

    Attributes:
        pairs: number of pairs, the first ones of the evaluation.
        seeds: number of clips per pair, each with another noise seed.
    """

    pairs: Count = 4
    seeds: Several = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ContactSheets:
    """Contact sheets: clips side by side, one image per table and pair.

    Attributes:
        pairs: number of pairs, the first ones of the first evaluation seed.
        columns: frames of each clip.
    """

    pairs: Natural = 2
    columns: Count = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Complete definition of a page of results.

    Attributes:
        title: title of the page.
        about: first paragraph.
        notes: paragraphs on facts without numbers, such as failed attempts.
        frames: frames of each clip.
        pairs: held-out avatars with held-out utterances, for each seed.
        seeds: evaluation seeds, of pairs and noise.
        diversity: measurement of diversity.
        sheets: contact sheets.
        runs: runs by the names of their folders.
        models: models by name.
        tables: tables by name, in order.
        claims: claims by name, in order.
        steps: plots by number of steps.
        logs: runs whose curves are plotted.
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
        """Return all rows, by ``table.row``."""
        return {
            f"{table}.{name}": row
            for table, rows in self.tables.items()
            for name, row in rows.rows.items()
        }


def load_study(path: Path) -> Study:
    """Read and check a study.

    Args:
        path: YAML file.

    Returns:
        The validated study.

    Raises:
        RecipeError: if there is no such file, a key is unknown, a value is out of range, or a name
            refers to nothing.
    """
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise RecipeError(f"there is no study {path}; give the path of a .yaml file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"cannot read the study {path}: {reason}") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is no mapping of keys to values; write key: value")
    study = parse(Study, data, f"study {path.stem}")
    check_names(study, f"study {path.stem}")
    return study


def check_names(study: Study, where: str) -> None:
    """Check that all names in a study refer to something, and that each model has one origin.

    Args:
        study: parsed study.
        where: name of the file, for messages.

    Raises:
        RecipeError: if a name refers to nothing; the message lists the existing names.
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
        for source in model.runs:
            check("run", f"models.{name}", source, study.runs)
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
    for source in study.logs:
        check("run", "logs", source, study.runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        The exit code; that of the first run that fails.
    """
    parser = Parser(
        prog="python -m training.reports.study",
        description="Print or run the commands of a study's runs.",
    )
    parser.add_argument("study", type=Path, help="YAML file, for example in training/studies")
    parser.add_argument("--train", action="store_true", help="run them, one after the other")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="these runs alone")
    arguments = parser.parse_args(argv)
    codes: list[int] = []
    return run(lambda: codes.append(_run(arguments))) or codes[0]


def _run(arguments: argparse.Namespace) -> int:
    study = load_study(arguments.study)
    for name in arguments.only:
        if name not in study.runs:
            raise RecipeError(f"there is no run {name}; there are {', '.join(study.runs)}")
    for name, source in study.runs.items():
        if arguments.only and name not in arguments.only:
            continue
        say(f"{source.command(name)}\n")
        if arguments.train:
            # One process per run: ranks can be joined only once in a process.
            command = [sys.executable, "-m", "training.train", *source.arguments(name)]
            code = subprocess.run(command, check=False).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
