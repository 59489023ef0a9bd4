"""Results of a study: measure everything that it compares, and write the page that shows it.

    python -m training.reports.results training/studies/distillation.yaml
    python -m training.reports.results training/studies/distillation.yaml --only steps.dmd_4
    python -m training.reports.results training/studies/distillation.yaml --from-json

The scores of one model at one seed are cached in RUNS/results, under a key computed from the model
files and all settings. So an interrupted command resumes, and only what has changed is measured
again. The report, a JSON file with the whole content of the page, is made from the cache, and the
page from the report alone. This command is separate from the evaluation, which handles one model
and no runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.avatars.synthetic import make_sheet
from training.benchmark.hardware import name_cpu
from training.data.resumable_stage import fingerprint, fingerprint_files
from training.engine.log import read_log
from training.evaluation.diversity import measure_spread, redraw
from training.evaluation.generation import SPLIT, RememberingVAE, generate_clip, name_files
from training.evaluation.scores import SEED_STRIDE, HeldoutPair, draw_pairs, evaluate, measure_pairs
from training.outputs import hold, write_picture
from training.recipe import to_plain
from training.reports.page import check_claims, write_page, write_sheets
from training.reports.plots import require_matplotlib
from training.reports.study import ModelSource, Study, load_study
from turbotalk_core import loading as library
from turbotalk_core.checkpoints.audio_encoder import load_audio_encoder
from turbotalk_core.cli.arguments import Parser, parse_threads
from turbotalk_core.cli.arguments import run as run_command
from turbotalk_core.cli.console import say
from turbotalk_core.errors import CheckpointError, OutputError, RecipeError
from turbotalk_core.request import TalkRequest
from turbotalk_core.safe_io.atomic import make_folder, write_text

logger = logging.getLogger(__name__)

MEASURE_VERSION = 1  # raise it when a metric changes, so that cached results are measured again
CACHE = "results"
PARTS = ("dit", "adapter", "vae", "audio_encoder")
CURVE_POINTS = 50  # of a log's curve in the report; each is the mean of a span of steps
CURVE_TERMS = ("loss", "gap", "accuracy", "motion")  # endings of the terms kept of a log


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement: the model of a row, from one run, at one seed.

    Attributes:
        place: the row, as ``table.row``.
        run: run that exported the model; None for a model from files.
        dit: file of the transformer.
        adapter: file of its audio adapter.
        request: settings of the clips.
        num_pairs: number of pairs.
        num_frames: frames of each clip.
        settings: everything that the result depends on, with files by their SHA-256.
    """

    place: str
    run: str | None
    dit: Path
    adapter: Path
    request: TalkRequest
    num_pairs: int
    num_frames: int
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Key of the cached result."""
        return fingerprint(self.settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Results of a cell.

    Attributes:
        summary: values by metric.
        pairs: scores of each pair.
        strips: true and generated clip of each pair for a sheet, one row each.
    """

    summary: Mapping[str, float]
    pairs: Sequence[Mapping[str, float]]
    strips: np.ndarray | None


class Measuring:
    """Measurement of cells; networks and pairs that they share are loaded and drawn once.

    Args:
        study: study that the cells belong to.
        weights: models folder with the VAE and the audio encoder.
    """

    def __init__(self, study: Study, weights: Path) -> None:
        self._study = study
        self._weights = weights
        self._num_pairs = max(row.pairs or study.pairs for row in study.rows().values())
        self._drawn: tuple[int, int] | None = None
        self._pairs: list[HeldoutPair] = []
        self._true_spread = 0.0
        self._vae: RememberingVAE | None = None

    def __call__(self, cell: Cell) -> Measured:
        """Measure a cell; cells of one seed and length should follow each other.

        Args:
            cell: cell to measure.

        Returns:
            Its results.
        """
        study = self._study
        files = name_files(self._weights, cell.dit, cell.adapter)
        models = library.load_models(files, torch.device("cpu"))
        encoder = load_audio_encoder(files.audio_encoder)
        if self._drawn != (cell.request.seed, cell.num_frames):
            self._draw(cell.request.seed, cell.num_frames)
            self._vae = RememberingVAE(models.vae)
        assert self._vae is not None
        models = replace(models, vae=self._vae)
        pairs = self._pairs[: cell.num_pairs]
        num_kept = max(study.diversity.pairs, study.sheets.pairs)
        evaluation = evaluate(cell.request, models, encoder, pairs, num_kept=num_kept)
        spreads = []
        for pair, first in zip(pairs[: study.diversity.pairs], evaluation.clips, strict=False):
            requests = [
                replace(cell.request, seed=cell.request.seed + SEED_STRIDE * number)
                for number in range(1, study.diversity.seeds)
            ]
            others = [generate_clip(pair.clip, request, models, encoder) for request in requests]
            spreads.append(measure_spread([first, *others]))
        diversity = float(np.mean(spreads))
        rows = [
            frames
            for pair, made in zip(pairs, evaluation.clips[: study.sheets.pairs], strict=False)
            for frames in (pair.clip.frames_CTHW, made)
        ]
        return Measured(
            summary={
                **evaluation.summary,
                "diversity": diversity,
                "true_diversity": self._true_spread,
                "diversity_ratio": diversity / self._true_spread,
            },
            pairs=[asdict(score) for score in evaluation.scores],
            strips=make_sheet(rows, study.sheets.columns) if rows else None,
        )

    def _draw(self, seed: int, num_frames: int) -> None:
        """Draw the pairs of a seed; a cell with fewer pairs uses the first ones."""
        study = self._study
        self._drawn = (seed, num_frames)
        self._pairs = measure_pairs(draw_pairs(seed, self._num_pairs, num_frames))
        spreads = [
            measure_spread(_redraw(pair, study.diversity.seeds))
            for pair in self._pairs[: study.diversity.pairs]
        ]
        self._true_spread = float(np.mean(spreads))


def _redraw(pair: HeldoutPair, count: int) -> list[torch.Tensor]:
    frames_CTHW = pair.clip.frames_CTHW
    others = redraw(SPLIT, pair.seed, pair.clip.mouth, count - 1, frames_CTHW.shape[-1])
    return [frames_CTHW, *others]


def find_model(
    name: str, source: ModelSource, study: Study, runs: Path
) -> list[tuple[str | None, Path, Path, str | None]]:
    """Find the files of a model.

    Args:
        name: name of the model.
        source: origin of the model.
        study: study with the runs' settings.
        runs: folder of all runs.

    Returns:
        For each run, or once for a model from files: the run or None, the files of transformer and
        adapter, and a note on what is missing or None.
    """
    if source.dit is not None and source.adapter is not None:
        missing = [str(path) for path in (source.dit, source.adapter) if not path.is_file()]
        problem = f"the model {name} lacks {', '.join(missing)}" if missing else None
        return [(None, source.dit, source.adapter, problem)]
    found = []
    for run in source.runs:
        export = runs / run / "exports" / str(source.phase)
        dit = _find_one(export / "diffusion_models")
        adapter = _find_one(export / "model_patches")
        problem = None
        if dit is None or adapter is None:
            problem = (
                f"the run {run} has no export of the phase {source.phase} in {runs}; make it with: "
                f"{study.runs[run].command(run)}"
            )
        found.append((run, dit or export, adapter or export, problem))
    return found


def _find_one(folder: Path) -> Path | None:
    files = sorted(folder.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def list_cells(
    study: Study, runs: Path, weights: Path, only: Iterable[str] = ()
) -> tuple[list[Cell], dict[str, list[str]]]:
    """List all measurements of a study.

    Args:
        study: study to measure.
        runs: folder of all runs.
        weights: models folder with the VAE and the audio encoder.
        only: rows to list; empty for all.

    Returns:
        The cells in the order of the tables, and for each row notes on what is missing.

    Raises:
        CheckpointError: if a file cannot be read.
        RequestError: if settings contradict each other.
        RecipeError: if ``only`` names a row that is not in the study.
    """
    rows = study.rows()
    only = list(only)
    for place in only:
        if place not in rows:
            raise RecipeError(f"there is no row {place}; there are {', '.join(rows)}")
    known: dict[Path, str] = {}

    def digest(path: Path) -> str:
        if path not in known:
            known[path] = fingerprint_files(path)["sha256"]
        return known[path]

    cells, missing = [], {}
    for place, row in rows.items():
        if only and place not in only:
            continue
        for run, dit, adapter, problem in find_model(
            row.model, study.models[row.model], study, runs
        ):
            if problem is not None:
                missing.setdefault(place, []).append(problem)
                continue
            shipped = library.read_request(dit)
            files = name_files(weights, dit, adapter)
            num_frames = study.tables[place.partition(".")[0]].frames or study.frames
            for seed in row.seeds or study.seeds:
                request = row.request(shipped, num_frames, seed)
                num_pairs = row.pairs or study.pairs
                settings = {
                    "version": MEASURE_VERSION,
                    **{part: digest(getattr(files, part)) for part in PARTS},
                    "request": asdict(request),
                    "frames": num_frames,
                    "pairs": num_pairs,
                    "diversity": asdict(study.diversity),
                    "sheets": [study.sheets.pairs, study.sheets.columns],
                }
                cell = Cell(
                    place=place,
                    run=run,
                    dit=dit,
                    adapter=adapter,
                    request=request,
                    num_pairs=num_pairs,
                    num_frames=num_frames,
                    settings=json.loads(json.dumps(settings)),  # as JSON returns them
                )
                cells.append(cell)
    return cells, missing


def measure_cells(
    cells: Sequence[Cell],
    cache: Path,
    measure: Callable[[Cell], Measured],
    hardware: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Measure the cells that are not in the cache.

    Args:
        cells: cells to measure.
        cache: folder of cached results; created if it does not exist.
        measure: function that measures one cell.
        hardware: description to store with new measurements.

    Returns:
        The cached settings, summary, pairs and hardware, by key.
    """
    make_folder(cache)
    remaining = {cell.key: cell for cell in cells if not (cache / f"{cell.key}.json").is_file()}
    with ExitStack() as stack:
        # Commands with other rows may measure at the same time.
        for key, cell in remaining.items():
            path = cache / f".{key}.lock"
            stack.enter_context(hold(path, f"measures {_name(cell)}"))
            stack.callback(path.unlink, missing_ok=True)
        return _measure_missing(cells, cache, measure, hardware, set(remaining))


def _measure_missing(
    cells: Sequence[Cell],
    cache: Path,
    measure: Callable[[Cell], Measured],
    hardware: Mapping[str, Any],
    remaining: set[str],
) -> dict[str, dict[str, Any]]:
    kept: dict[str, dict[str, Any]] = {}
    # Sorted by seed and length, so that true renders are drawn once; the first seed comes first.
    seeds = list(dict.fromkeys(cell.request.seed for cell in cells))
    for cell in sorted(cells, key=lambda cell: (seeds.index(cell.request.seed), -cell.num_frames)):
        path = cache / f"{cell.key}.json"
        if cell.key not in kept and not path.is_file():
            logger.info("%d to go: %s", len(remaining), _name(cell))
            remaining.remove(cell.key)
            measured = measure(cell)
            if measured.strips is not None:
                write_picture(path.with_suffix(".png"), Image.fromarray(measured.strips))
            entry = {
                "settings": dict(cell.settings),
                "summary": dict(measured.summary),
                "pairs": [dict(pair) for pair in measured.pairs],
                "hardware": dict(hardware),
            }
            write_text(path, json.dumps(entry, indent=1) + "\n")
        if cell.key not in kept:
            kept[cell.key] = _read_json(path)
    return kept


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{path} is damaged ({type(error).__name__}); delete it and measure again"
        ) from error


def describe_hardware(num_threads: int) -> dict[str, Any]:
    """Describe the measuring machine, without its name.

    Args:
        num_threads: threads of torch.

    Returns:
        Processor, number of cores, threads, and versions.
    """
    return {
        "cpu": name_cpu(),
        "cores": os.cpu_count(),
        "threads": num_threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe_run(name: str, study: Study, runs: Path) -> dict[str, Any]:
    """Summarise the log of a run.

    Args:
        name: name of the run.
        study: study with the run's settings.
        runs: folder of all runs.

    Returns:
        Its command, and for each phase steps, seconds and curves; no phases if there is no log.
    """
    source = study.runs[name]
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in read_log(runs / name):
        lines.setdefault(line["phase"], []).append(line)
    phases = {
        phase: {
            "steps": len(steps),
            "seconds": round(sum(step["seconds"] for step in steps), 1),
            "curves": _thin_out(steps) if name in study.logs else {},
        }
        for phase, steps in lines.items()
    }
    return {"command": source.command(name), "note": source.note, "phases": phases}


def _thin_out(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Reduce curves to at most ``CURVE_POINTS`` points; their steps are under ``step``."""
    spans = np.array_split(np.arange(len(steps)), min(CURVE_POINTS, len(steps)))
    curves: dict[str, list[float | None]] = {
        "step": [round(float(span.mean()) + 1, 1) for span in spans]
    }
    names = dict.fromkeys(name for step in steps for name in step if name.endswith(CURVE_TERMS))
    for name in names:
        curves[name] = []
        for span in spans:  # some roles are updated in some of the steps only
            values = [steps[index][name] for index in span if name in steps[index]]
            curves[name].append(float(f"{np.mean(values):.5g}") if values else None)
    return curves


def make_report(
    name: str,
    study: Study,
    cells: Sequence[Cell],
    kept: Mapping[str, Mapping[str, Any]],
    missing: Mapping[str, Sequence[str]],
    runs: Path,
) -> dict[str, Any]:
    """Build the report, with the whole content of the page.

    Args:
        name: name of the study.
        study: the study.
        cells: cells of the study.
        kept: cached results by key.
        missing: notes on what is missing, by row.
        runs: folder of all runs.

    Returns:
        Values that JSON can represent; ``training.reports.page`` documents the keys.
    """
    rows: dict[str, dict[str, Any]] = {
        place: {"results": [], "missing": list(missing.get(place, ()))} for place in study.rows()
    }
    models: dict[str, dict[str, str]] = {}
    hardware: list[Any] = []
    for cell in cells:
        entry = kept[cell.key]
        result = {
            "run": cell.run,
            "seed": cell.request.seed,
            "pairs": cell.num_pairs,
            "key": cell.key,
            "request": entry["settings"]["request"],
            "summary": entry["summary"],
        }
        rows[cell.place]["results"].append(result)
        model = study.rows()[cell.place].model
        label = model if cell.run is None else f"{model} of {cell.run}"
        models[label] = {part: entry["settings"][part] for part in PARTS}
        if entry["hardware"] not in hardware:
            hardware.append(entry["hardware"])
    report = {
        "name": name,
        "study": to_plain(study),
        "hardware": hardware,
        "models": models,
        "runs": {run: describe_run(run, study, runs) for run in study.runs},
        "rows": rows,
        "sheets": {},
    }
    return {**report, "claims": check_claims(report)}


def main(
    argv: Sequence[str] | None = None, measure: Callable[[Cell], Measured] | None = None
) -> int:
    """Run from the command line.

    Args:
        argv: arguments after the program's name; None for those of the process.
        measure: function that measures one cell; None for the real measurement.

    Returns:
        The exit code.
    """
    parser = Parser(
        prog="python -m training.reports.results",
        description="Make the page of results of a study.",
    )
    parser.add_argument("study", type=Path, help="YAML file, for example in training/studies")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="of the page")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument("--weights", type=Path, default=Path("models"), help="models folder")
    parser.add_argument("--threads", type=parse_threads, default=2, help="CPU threads")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TABLE.ROW", help="measure these, make no page"
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="show rows without a model as not run"
    )
    parser.add_argument(
        "--from-json", action="store_true", help="make the page again from its report"
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    return run_command(lambda: _run(arguments, measure))


def _run(arguments: argparse.Namespace, measure: Callable[[Cell], Measured] | None) -> None:
    name = arguments.study.stem
    path = arguments.out / f"{name}.json"
    if not arguments.only:
        require_matplotlib()
    if arguments.from_json:
        if not path.is_file():
            raise CheckpointError(f"there is no report {path}; make it without --from-json")
        write_page(_read_json(path), arguments.out)
        return
    study = load_study(arguments.study)
    cells, missing = list_cells(study, arguments.runs, arguments.weights, arguments.only)
    if missing and not arguments.allow_missing:
        place, problems = next(iter(missing.items()))
        raise CheckpointError(f"{place}: {problems[0]}; or say --allow-missing")
    measure = measure or Measuring(study, arguments.weights)
    cache = arguments.runs / CACHE
    hardware = describe_hardware(arguments.threads)
    kept = measure_cells(cells, cache, measure, hardware)
    if arguments.only:
        for cell in cells:
            say(f"{_describe(cell, kept[cell.key]['summary'])}\n")
        return
    report = make_report(name, study, cells, kept, missing, arguments.runs)
    report["sheets"] = write_sheets(report, cache, arguments.out)
    write_text(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_page(report, arguments.out)


def _describe(cell: Cell, summary: Mapping[str, float]) -> str:
    names = ("frechet", "sync_correlation", "motion_ratio", "edge_ratio", "diversity_ratio")
    values = "  ".join(f"{name} {summary[name]:.3f}" for name in names)
    return f"{_name(cell)}:  {values}"


def _name(cell: Cell) -> str:
    of = "" if cell.run is None else f" of {cell.run}"
    return f"{cell.place}{of}, seed {cell.request.seed}"


if __name__ == "__main__":
    sys.exit(main())
