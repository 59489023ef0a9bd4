"""Page of results, as a function of the report alone.

The report is the JSON that ``training.reports.results`` writes:

    name, study          name of the study, and all of its settings
    hardware             each machine that measured, without its name
    models               by label the SHA-256 of dit, adapter, vae and audio_encoder
    runs                 by name: command, note, and for each phase steps, seconds and curves
    rows                 by table.row: results (run, seed, pairs, key, request, summary) and missing
    claims               by name: the figures, and whether it holds
    sheets               by table the contact sheets' files

The page depends on nothing else, so it can be generated again, with other text or plots, on a
machine that has none of the runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from training.markdown import table
from training.reports.plots import draw_sheet, plot_log, plot_steps
from turbotalk_core.safe_io.atomic import make_folder, write_text

Report = Mapping[str, Any]

COLUMNS = {  # metric: heading, decimals
    "calls_per_chunk": ("calls", 0),
    "frechet": ("Fréchet", 2),
    "sync_correlation": ("sync", 3),
    "sync_lag_frames": ("lag", 2),
    "motion_ratio": ("motion", 3),
    "edge_ratio": ("edges", 3),
    "diversity_ratio": ("diversity", 3),
    "unlikeness_ratio": ("unlikeness", 2),
    "identity_error": ("identity", 4),
    "seconds_per_clip": ("s/clip", 1),
}
STEP_METRICS = {
    "frechet": "Fréchet distance",
    "sync_correlation": "sync correlation",
    "motion_ratio": "motion, share of true renders'",
    "edge_ratio": "edges, share of true renders'",
}
TRUE_RENDERS = {"frechet": 0.0, "motion_ratio": 1.0, "edge_ratio": 1.0, "unlikeness_ratio": 1.0}
READING = """\
| column | what it says |
|---|---|
| calls | network calls per chunk, counted; a clip is one chunk of {frames} frames where a table \
says nothing else |
| Fréchet | distance of the set from the true renders' on fixed features; 0 is best |
| sync, lag | mouth read from pixels against the true curve: correlation at the best lag, and that \
lag in frames |
| motion, edges | change from frame to frame, and sharpness, as shares of the true renders'; 1 is \
right, not more |
| diversity | how far clips of one input with {noise_seeds} noise seeds are from each other, on \
squares of 4 pixels, as a share of the same for true renders that go on otherwise from the same \
first frame; over {diverse} pairs |
| unlikeness | how badly the frames can be put together from pieces of the reference image, as a \
share of the true renders' |
| identity | distance from the reference where nothing should move; the full range of a pixel is 1 |
| s/clip | seconds that a clip took once its reference image was encoded, median; other work on \
the machine adds to it |

Numbers are medians over training seeds and evaluation seeds, in brackets the lowest and the \
highest; n is how many there are, each of {pairs} pairs where a row says nothing else. Sync is \
never read alone: a blurred mouth, the mean of many, follows a voice well."""
VERDICT = ("value", "of_value", "figure", "holds", "num_hold", "num_all")


def read_values(report: Report, place: str, metric: str) -> list[float]:
    """Return the measured values of a row, one for each run and seed."""
    results = report["rows"][place]["results"]
    return [result["summary"][metric] for result in results]


def check_claims(report: Report) -> dict[str, dict[str, Any]]:
    """Check each claim against the measured values.

    Args:
        report: report with rows.

    Returns:
        For each claim: ``value``, the row's median; ``of_value``, that of the other row;
        ``figure``, the bounded number; ``holds``; and ``num_hold`` of ``num_all``, the number of
        single results (run and seed) for which the claim holds, each against the other row's median
        at the same seed. All are None if a row was not measured.
    """
    claims = report["study"]["claims"]
    return {name: _check_claim(report, claim) for name, claim in claims.items()}


def _check_claim(report: Report, claim: Mapping[str, Any]) -> dict[str, Any]:
    metric, place, other = claim["metric"], claim["row"], claim["of"]
    values = read_values(report, place, metric)
    others = read_values(report, other, metric) if other else [1.0]
    if not values or not others:
        return dict.fromkeys(VERDICT)
    low = -np.inf if claim["at_least"] is None else claim["at_least"]
    high = np.inf if claim["at_most"] is None else claim["at_most"]
    figure = median(values) / median(others)
    alone = []
    for result in report["rows"][place]["results"]:
        against = [1.0]
        if other:
            same = report["rows"][other]["results"]
            against = [r["summary"][metric] for r in same if r["seed"] == result["seed"]]
        if against:
            alone.append(low <= result["summary"][metric] / median(against) <= high)
    return {
        "value": median(values),
        "of_value": median(others) if other else None,
        "figure": figure,
        "holds": bool(low <= figure <= high),
        "num_hold": sum(alone),
        "num_all": len(alone),
    }


def write_page(report: Report, out: Path) -> None:
    """Write the page and its plots; contact sheets are not touched.

    Args:
        report: all content of the page.
        out: folder, created if it does not exist.
    """
    make_folder(out)
    steps = report["study"]["steps"]
    if steps is not None:
        panels = {
            heading: _by_steps(report, steps["series"], metric)
            for metric, heading in STEP_METRICS.items()
        }
        level = steps["level"]
        levels = {
            heading: median(values)
            for metric, heading in STEP_METRICS.items()
            if level is not None and (values := read_values(report, level, metric))
        }
        name = "" if level is None else _label(report, level)
        plot_steps(panels, levels, name, out / _steps_file(report))
    for run, phases in _logged(report).items():
        plot_log(phases, out / _log_file(report, run))
    write_text(out / f"{report['name']}.md", make_page(report))


def _by_steps(
    report: Report, series: Mapping[str, Sequence[str]], metric: str
) -> dict[str, dict[int, list[float]]]:
    found: dict[str, dict[int, list[float]]] = {}
    for name, places in series.items():
        for place in places:
            for result in report["rows"][place]["results"]:
                steps = result["request"]["num_inference_steps"]
                values = found.setdefault(name, {}).setdefault(steps, [])
                values.append(result["summary"][metric])
    return found


def _logged(report: Report) -> dict[str, dict[str, Any]]:
    """Return the curves of each phase, for the runs to plot that have a log."""
    runs = {run: report["runs"][run]["phases"] for run in report["study"]["logs"]}
    return {
        run: {name: phase["curves"] for name, phase in phases.items()}
        for run, phases in runs.items()
        if phases
    }


def _steps_file(report: Report) -> str:
    return f"{report['name']}_steps.png"


def _log_file(report: Report, run: str) -> str:
    return f"{report['name']}_log_{run}.png"


def _label(report: Report, place: str) -> str:
    which, _, row = place.partition(".")
    return report["study"]["tables"][which]["rows"][row]["label"]


def write_sheets(report: Report, cache: Path, out: Path) -> dict[str, list[str]]:
    """Write the contact sheets from the strips in the cache.

    Args:
        report: report with rows.
        cache: folder of cached results.
        out: folder, created if it does not exist.

    Returns:
        For each table the names of its files, one per pair.
    """
    make_folder(out)
    study = report["study"]
    files: dict[str, list[str]] = {}
    for which, entry in study["tables"].items():
        strips = {}
        for name, row in entry["rows"].items():
            results = report["rows"][f"{which}.{name}"]["results"]
            of_seed = [result for result in results if result["seed"] == study["seeds"][0]]
            if of_seed:
                with Image.open(cache / f"{of_seed[0]['key']}.png") as picture:
                    strips[row["label"]] = np.asarray(picture.convert("RGB"))
        for number in range(study["sheets"]["pairs"] if strips else 0):
            first = next(iter(strips.values()))
            # A strip has two rows of frames per pair: the true clip and the generated one.
            height = first.shape[0] // (2 * study["sheets"]["pairs"])
            top = 2 * number * height
            rows = {"true render": first[top : top + height]}
            for label, strip in strips.items():
                rows[label] = strip[top + height : top + 2 * height]
            name = f"{report['name']}_{which}_{number + 1}.webp"
            draw_sheet(rows, out / name)
            files.setdefault(which, []).append(name)
    return files


def make_page(report: Report) -> str:
    """Return the page as Markdown.

    Args:
        report: all content of the page.

    Returns:
        The text.
    """
    study = report["study"]
    parts = [f"# {study['title']}", study["about"]]
    parts += ["## What is claimed", _claims(report)]
    parts += ["## How to read the tables", _reading(study)]
    for name, entry in study["tables"].items():
        frames = entry["frames"]
        length = None if frames is None else f"Each clip is one chunk of {frames} frames."
        parts += [f"## {entry['title']}", entry["about"], length, _table(report, name)]
        if study["steps"] is not None and name == study["steps"]["table"]:
            parts.append(f"![Metrics by number of steps]({_steps_file(report)})")
        for number, file in enumerate(report["sheets"].get(name, ())):
            parts.append(f"![{entry['title']}: pair {number + 1}, a row per model]({file})")
    if study["notes"]:
        parts += ["## Notes", *study["notes"]]
    parts += ["## Runs", *_runs(report)]
    parts += ["## Models and machine", *_provenance(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _reading(study: Mapping[str, Any]) -> str:
    return READING.format(
        frames=study["frames"],
        pairs=study["pairs"],
        diverse=study["diversity"]["pairs"],
        noise_seeds=study["diversity"]["seeds"],
    )


def _claims(report: Report) -> str:
    lines = []
    for name, claim in report["study"]["claims"].items():
        verdict = report["claims"][name]
        bounds = [
            f"{sign} {claim[key]:g}"
            for key, sign in (("at_least", "≥"), ("at_most", "≤"))
            if claim[key] is not None
        ]
        if verdict["holds"] is None:
            figure, holds, count = "", "not run", ""
        else:
            figure = f"{verdict['figure']:.3f}"
            if verdict["of_value"] is not None:
                figure = f"{verdict['value']:.3f} / {verdict['of_value']:.3f} = {figure}"
            holds = "**holds**" if verdict["holds"] else "**does not hold**"
            count = f"{verdict['num_hold']} of {verdict['num_all']}"
        lines.append([claim["text"], figure, ", ".join(bounds), holds, count])
    return table(["claim", "figure", "bound", None, "runs and seeds"], lines, is_tight=True)


def _table(report: Report, which: str) -> str:
    headings = [heading for heading, _ in COLUMNS.values()]
    lines = []
    rows = report["study"]["tables"][which]["rows"]
    measured = [report["rows"][f"{which}.{name}"]["results"] for name in rows]
    if truth := [r["summary"]["estimator_correlation"] for results in measured for r in results]:
        true = {**TRUE_RENDERS, "sync_correlation": median(truth), "diversity_ratio": 1.0}
        cells = [f"{true[m]:.{d}f}" if m in true else "" for m, (_, d) in COLUMNS.items()]
        lines.append(["*true renders*", *cells, ""])
    for (name, row), results in zip(rows.items(), measured, strict=True):
        label = row["label"]
        if row["pairs"] is not None:
            label += f" ({row['pairs']} pairs)"
        if not results:
            lines.append([label, "not run", *[""] * len(headings)])
            continue
        cells = [
            _spread(read_values(report, f"{which}.{name}", metric), decimals)
            for metric, (_, decimals) in COLUMNS.items()
        ]
        lines.append([label, *cells, len(results)])
    return table(["", *headings, "n"], lines, is_tight=True)


def _spread(values: Sequence[float], decimals: int) -> str:
    middle, low, high = (f"{v:.{decimals}f}" for v in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _runs(report: Report) -> Iterable[str]:
    lines = []
    for name, run in report["runs"].items():
        for phase, entry in run["phases"].items():
            lines.append([name, phase, entry["steps"], f"{entry['seconds'] / 60:.1f}"])
        if not run["phases"]:
            lines.append([name, "not run", "", ""])
    yield table(["run", "phase", "steps", "minutes"], lines, is_tight=True)
    yield "Minutes are those that the steps took, from each run's log."
    for name, run in report["runs"].items():
        if run["note"]:
            yield f"**{name}**: {run['note']}"
    for name in _logged(report):
        yield f"![Losses, logits and motion of {name}]({_log_file(report, name)})"
    commands = [run["command"] for run in report["runs"].values()]
    commands.append(f"python -m training.reports.results training/studies/{report['name']}.yaml")
    yield "```sh\n" + "\n".join(commands) + "\n```"


def _provenance(report: Report) -> Iterable[str]:
    for entry in report["hardware"]:
        yield (
            f"Measured on {entry['cpu']}, {entry['threads']} threads of {entry['cores']} cores, "
            f"torch {entry['torch']}, Python {entry['python']}."
        )
    lines = [
        [name, f"`{files['dit'][:16]}`", f"`{files['adapter'][:16]}`"]
        for name, files in report["models"].items()
    ]
    head = ["model", "transformer, SHA-256", "adapter, SHA-256"]
    yield table(head, lines, is_tight=True)
    yield f"[{report['name']}.json]({report['name']}.json) has everything, with all settings."
