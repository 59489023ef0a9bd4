"""Studies are measured once, resume after an interruption, and their page follows from a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.family import FakeEncoder, write_family
from tests.training.tiny_networks import SHIPPED, SIZE, make_networks
from training.avatars.synthetic import SyntheticClip
from training.engine.log import append_log
from training.evaluation import scores
from training.reports import results
from training.reports.results import Cell, Measured, main
from turbotalk_core.checkpoints.networks import save_adapter
from turbotalk_core.cli.arguments import INTERRUPTED
from turbotalk_core.loading import ADAPTER, TEACHER

METRICS = {
    "calls_per_chunk": 1.0,
    "frechet": 2.0,
    "sync_correlation": 0.9,
    "sync_lag_frames": 0.0,
    "motion_ratio": 1.0,
    "edge_ratio": 1.0,
    "diversity_ratio": 0.8,
    "unlikeness_ratio": 2.0,
    "identity_error": 0.01,
    "seconds_per_clip": 5.0,
    "estimator_correlation": 0.99,
}
STUDY: dict[str, Any] = {
    "title": "Trial",
    "frames": 17,
    "pairs": 2,
    "seeds": [1, 2],
    "diversity": {"pairs": 1, "seeds": 2},
    "sheets": {"pairs": 1, "columns": 2},
    "runs": {"short": {"recipe": "tiny"}, "other": {"recipe": "tiny", "changes": ["seed=1"]}},
    "logs": ["short"],
    "models": {
        "teacher": {"dit": None, "adapter": None},
        "one": {"runs": ["short", "other"], "phase": "one"},
    },
    "tables": {
        "steps": {
            "title": "Steps",
            "rows": {
                "teacher": {"label": "teacher", "model": "teacher", "seeds": [1]},
                "one": {"label": "λ = 50", "model": "one", "steps": 1, "schedule": "distilled"},
            },
        },
        "again": {
            "title": "Again",
            "rows": {"one": {"label": "same", "model": "one", "steps": 1, "schedule": "distilled"}},
        },
    },
    "claims": {
        "far": {
            "text": "It is near",
            "metric": "frechet",
            "row": "steps.one",
            "of": "steps.teacher",
            "at_most": 1.25,
        }
    },
    "steps": {"table": "steps", "level": "steps.teacher", "series": {"one": ["steps.one"]}},
}


class Place:
    """Folder with a model family, two runs of it and a study."""

    def __init__(self, folder: Path) -> None:
        self.runs, self.weights, self.out = folder / "runs", folder / "models", folder / "out"
        self.study = folder / "trial.yaml"
        networks = make_networks()
        write_family(self.weights, networks, SHIPPED)
        for number, run in enumerate(("short", "other")):
            # Other settings in its metadata make it another file.
            export = self.runs / run / "exports" / "one"
            write_family(export, networks, SHIPPED | {"shift": 4.0 + number})
        append_log(self.runs / "short", {"step": 1, "phase": "one", "seconds": 60.0})
        self.data: dict[str, Any] = json.loads(json.dumps(STUDY))
        self.data["models"]["teacher"] = {
            "dit": str(self.weights / "diffusion_models" / TEACHER),
            "adapter": str(self.weights / "model_patches" / ADAPTER),
        }

    def run(self, *options: str, measure: Callable[[Cell], Measured] | None = None) -> int:
        """Run the command on the current study."""
        self.study.write_text(yaml.safe_dump(self.data, sort_keys=False))
        folders = ["--runs", self.runs, "--weights", self.weights, "--out", self.out]
        return main([str(self.study), *map(str, folders), *options], measure)

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "trial.json").read_text())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return Place(tmp_path)


class Fake:
    """Measurement that takes no time, and records its arguments."""

    def __init__(self, stop_after: int = 100, **changes: float) -> None:
        self.measured: list[tuple[str, str | None, int]] = []
        self.stop_after = stop_after
        self.summary = METRICS | changes

    def __call__(self, cell: Cell) -> Measured:
        if len(self.measured) == self.stop_after:
            raise KeyboardInterrupt
        self.measured.append((cell.place, cell.run, cell.request.seed))
        strips = np.zeros((2 * 8, 2 * 8, 3), np.uint8)
        return Measured(summary=self.summary, pairs=[{"pair_seed": 1}], strips=strips)


ALL = [
    ("steps.teacher", None, 1),
    ("steps.one", "short", 1),
    ("steps.one", "other", 1),
    ("steps.one", "short", 2),
    ("steps.one", "other", 2),
]


@pytest.mark.slow
def test_each_model_is_measured_once_at_each_seed(place: Place) -> None:
    fake = Fake()
    assert place.run(measure=fake) == 0
    assert fake.measured == ALL  # the second table shows the same model again
    rows = place.report["rows"]
    assert [len(row["results"]) for row in rows.values()] == [1, 4, 4]
    assert rows["again.one"]["results"] == rows["steps.one"]["results"]
    assert {result["run"] for result in rows["steps.one"]["results"]} == {"short", "other"}
    again = Fake()
    assert place.run(measure=again) == 0
    assert again.measured == []


def test_a_stopped_command_goes_on(place: Place) -> None:
    assert place.run(measure=Fake(stop_after=2)) == INTERRUPTED
    fake = Fake()
    assert place.run(measure=fake) == 0
    assert fake.measured == ALL[2:]


@pytest.mark.slow
def test_only_what_has_changed_is_measured_again(place: Place) -> None:
    assert place.run(measure=Fake()) == 0
    place.data["tables"]["steps"]["rows"]["teacher"]["audio_guidance"] = 1.0
    place.data["tables"]["steps"]["rows"]["one"]["label"] = "another word"
    fake = Fake()
    assert place.run(measure=fake) == 0
    assert fake.measured == ALL[:1]
    model, projection, _ = make_networks()
    with torch.no_grad():
        projection.proj1.weight.add_(1)
    export = place.runs / "other" / "exports" / "one"
    save_adapter(export / "model_patches" / ADAPTER, model, projection, {})
    fake = Fake()
    assert place.run(measure=fake) == 0
    assert fake.measured == [ALL[2], ALL[4]]


@pytest.mark.slow
def test_a_missing_run_is_named_with_the_command_that_makes_it(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.runs / "other" / "exports" / "one" / "diffusion_models" / TEACHER).unlink()
    assert place.run(measure=Fake()) == 2
    error = capsys.readouterr().err
    assert "steps.one: the run other has no export of the phase one" in error
    assert "python -m training.train tiny seed=1 --run runs/other" in error
    fake = Fake()
    assert place.run("--allow-missing", measure=fake) == 0
    assert fake.measured == [ALL[0], ALL[1], ALL[3]]
    assert len(place.report["rows"]["steps.one"]["missing"]) == 1
    # Where no run of a row is there, it says so.
    place.data["models"]["one"]["runs"] = ["other"]
    assert place.run("--allow-missing", measure=fake) == 0
    page = (place.out / "trial.md").read_text()
    assert "| λ = 50 | not run |" in page
    assert "| It is near |  | ≤ 1.25 | not run |  |" in page


def test_some_rows_alone_make_no_page(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    assert place.run("--only", "steps.teacher", measure=fake) == 0
    assert fake.measured == ALL[:1]
    assert "steps.teacher, seed 1:  frechet 2.000" in capsys.readouterr().out
    assert not place.out.exists()
    assert place.run("--only", "steps.none", measure=fake) == 2
    assert "there is no row steps.none; there are steps.teacher" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_is_made_again_from_the_report_alone(place: Place, tmp_path: Path) -> None:
    assert place.run(measure=Fake()) == 0
    page = (place.out / "trial.md").read_text()
    made = {path.name: path.read_bytes() for path in place.out.iterdir()}
    sheets = {"trial_steps_1.webp", "trial_again_1.webp"}
    assert made.keys() == {"trial.json", "trial.md", "trial_steps.png", "trial_log_short.png"} | (
        sheets
    )
    assert all(len(content) < 300_000 for content in made.values())
    for name in ("trial.md", "trial_steps.png", "trial_log_short.png"):
        (place.out / name).unlink()
    assert main([str(tmp_path / "trial.yaml"), "--out", str(place.out), "--from-json"]) == 0
    assert (place.out / "trial.md").read_text() == page
    assert {path.name: path.read_bytes() for path in place.out.iterdir()} == made


def test_without_a_report_there_is_no_page(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run("--from-json") == 2
    assert "there is no report" in capsys.readouterr().err


def test_a_table_may_have_clips_of_a_length_of_its_own(place: Place) -> None:
    place.data["seeds"] = [1]
    place.data["tables"]["again"]["frames"] = 21
    lengths: list[tuple[str, int, int]] = []

    def measure(cell: Cell) -> Measured:
        lengths.append((cell.place, cell.num_frames, cell.request.chunk_frames))
        return Fake()(cell)

    assert place.run(measure=measure) == 0
    # The same model is measured again, and the longer clips of a seed come first.
    assert lengths == [
        *[("again.one", 21, 21)] * 2,
        ("steps.teacher", 17, 17),
        *[("steps.one", 17, 17)] * 2,
    ]


def test_the_report_names_no_machine(place: Place, tmp_path: Path) -> None:
    assert place.run(measure=Fake()) == 0
    report = place.report
    report["study"]["models"].pop("teacher")  # its files stand in the study as they were given
    assert str(tmp_path) not in json.dumps(report)
    (machine,) = report["hardware"]
    assert machine.keys() == {"cpu", "cores", "threads", "torch", "python"}


@pytest.mark.slow
def test_a_log_is_summed_up(place: Place) -> None:
    lines: list[Mapping[str, Any]] = [
        {"step": step, "phase": "two", "student/loss": float(step), "seconds": 0.5}
        for step in range(2, 202)
    ]
    for number, line in enumerate(lines):
        extra = {"student/dmd_loss": 3.0} if number < 100 else {}
        append_log(place.runs / "short", {**line, **extra})
    assert place.run(measure=Fake()) == 0
    phases = place.report["runs"]["short"]["phases"]
    assert {name: phase["seconds"] for name, phase in phases.items()} == {"one": 60, "two": 100}
    curves = phases["two"]["curves"]
    assert phases["two"]["steps"] == 200
    assert curves.keys() == {"step", "student/loss", "student/dmd_loss"}
    assert len(curves["step"]) == results.CURVE_POINTS
    # Four steps a point: the first are 1 to 4 of the phase, with losses of 2 to 5.
    assert (curves["step"][0], curves["student/loss"][0]) == (2.5, 3.5)
    assert curves["student/dmd_loss"] == [3.0] * 25 + [None] * 25
    assert place.report["runs"]["other"]["phases"] == {}


@pytest.mark.slow
def test_models_are_measured(
    place: Place,
    draw_humming_clip: Callable[[str, int, int], SyntheticClip],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With networks of a few thousand weights: all metrics, of the very clips on the sheet."""
    monkeypatch.setattr(results, "load_audio_encoder", lambda path: FakeEncoder())
    monkeypatch.setattr(scores, "draw_clip", draw_humming_clip)
    place.data["seeds"] = [1]
    place.data["tables"]["again"]["frames"] = 21
    assert place.run("--only", "steps.teacher", "steps.one", "again.one") == 0
    entries = [json.loads(path.read_text()) for path in (place.runs / "results").glob("*.json")]
    assert [entry["settings"]["frames"] for entry in entries].count(21) == 2
    assert len(entries) == 5
    calls = []
    for entry in entries:
        summary = entry["summary"]
        assert summary.keys() >= METRICS.keys()
        assert all(np.isfinite(value) for value in summary.values())
        assert summary["diversity_ratio"] == summary["diversity"] / summary["true_diversity"]
        assert len(entry["pairs"]) == 2
        calls.append(summary["calls_per_chunk"])
    assert len({entry["summary"]["true_diversity"] for entry in entries}) == 2  # one of each length
    # The teacher ships with 2 steps and guidance; 1 step of a run's model is guided, too.
    assert sorted(calls) == [2, 2, 2, 2, 4]
    for path in (place.runs / "results").glob("*.png"):
        with Image.open(path) as picture:
            assert picture.size == (2 * SIZE, 2 * SIZE)
