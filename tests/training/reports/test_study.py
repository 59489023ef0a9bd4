"""Studies are checked before anything is measured."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.family import make_request
from training.recipe import load_recipe
from training.reports import study
from training.reports.study import RunSource, Study, load_study
from training.train import make_methods
from training.trainer.sizes import resolve_recipe
from turbotalk_core.errors import RecipeError

STUDIES = Path(__file__).parents[3] / "training" / "studies"

SMALL: dict[str, Any] = {
    "title": "Small",
    "pairs": 2,
    "diversity": {"pairs": 1, "seeds": 2},
    "sheets": {"pairs": 1, "columns": 2},
    "runs": {"short": {"recipe": "tiny"}},
    "models": {"one": {"runs": ["short"], "phase": "one"}, "own": {"dit": "a", "adapter": "b"}},
    "tables": {"all": {"title": "All", "rows": {"r": {"label": "R", "model": "one"}}}},
    "claims": {"c": {"text": "C", "metric": "frechet", "row": "all.r", "at_most": 1}},
}


def _load(tmp_path: Path, path: str = "", value: object = None) -> Study:
    """Load the small study with one change."""
    data = yaml.safe_load(yaml.safe_dump(SMALL))
    *parents, last = path.split(".")
    if path:
        place = data
        for key in parents:
            place = place[key]
        place[last] = value
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_study(file)


def test_a_study_is_read(tmp_path: Path) -> None:
    study = _load(tmp_path)
    assert list(study.rows()) == ["all.r"]
    assert study.seeds == (1,)
    assert study.models["own"].dit == Path("a")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("tablez", {}, "tablez is unknown; the nearest key is tables"),
        ("tables.all.rows.r.stpes", 1, "tables.all.rows.r.stpes is unknown"),
        ("tables.all.rows.r.steps", 0, "greater than or equal to 1"),
        ("tables.all.rows.r.schedule", "straight", "'reference' or 'distilled'"),
        ("tables.all.rows.r.model", "two", "names the model two; there are one, own"),
        ("tables.all.rows.r.pairs", 1, "greater than or equal to 2"),
        ("diversity.pairs", 3, "fewer pairs than diversity or sheets"),
        ("models.one.runs", ["long"], "names the run long; there are short"),
        ("models.one.phase", None, "must have runs and phase, or dit and adapter"),
        ("models.one.dit", "a", "must have runs and phase, or dit and adapter"),
        ("models.own.adapter", None, "must have runs and phase, or dit and adapter"),
        ("claims.c.row", "all.q", "names the row all.q; there are all.r"),
        ("claims.c.of", "all.q", "names the row all.q; there are all.r"),
        ("claims.c.at_most", None, "claims.c bounds nothing"),
        ("steps", {"table": "all", "series": {"s": ["all.q"]}}, "names the row all.q"),
        ("steps", {"table": "none", "series": {}}, "names the table none; there are all"),
        ("logs", ["long"], "names the run long; there are short"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, path: str, value: object, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        _load(tmp_path, path, value)


@pytest.mark.parametrize("text", ["a: [", "- a", ""])
def test_a_file_that_is_no_study_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_study(path)
    with pytest.raises(RecipeError, match="there is no study"):
        load_study(tmp_path / "none.yaml")


def test_a_row_changes_what_it_names_and_makes_clips_of_one_chunk(tmp_path: Path) -> None:
    shipped = make_request(
        num_inference_steps=20,
        schedule="reference",
        update="euler",
        audio_guidance_scale=1.5,
        chunk_frames=33,
    )
    row = _load(tmp_path).rows()["all.r"]
    request = row.request(shipped, 81, 5)
    assert (request.num_inference_steps, request.schedule, request.seed) == (20, "reference", 5)
    assert request.chunk_frames == 81
    study = _load(tmp_path, "tables.all.rows.r", {
        "label": "R", "model": "one", "steps": 2, "schedule": "distilled", "update": "renoise",
        "audio_guidance": 1,
    })  # fmt: skip
    request = study.rows()["all.r"].request(shipped, 81, 5)
    expected = (request.num_inference_steps, request.schedule, request.update)
    assert expected == (2, "distilled", "renoise")
    assert request.audio_guidance_scale == 1


def test_the_command_of_a_run() -> None:
    assert RunSource(recipe="tiny").command("tiny") == "python -m training.train tiny"
    expected = RunSource(recipe="tiny", changes=("seed=1",)).command("other")
    assert expected == "python -m training.train tiny seed=1 --run runs/other"


def test_overrides_are_merged_into_the_recipe(tmp_path: Path) -> None:
    overrides = {
        "phases": {
            "three": None,
            "one": {"steps": 7, "settings": {"warmup": "off", "before": 250}},
        },
        "average": {"roles": ["student"]},
    }
    run = RunSource(recipe="tiny", overrides=overrides, changes=("phases.one.steps=8",))
    recipe = load_recipe(run.recipe, run.list_changes())
    assert list(recipe.phases) == ["dmd_short", "dmd", "two", "one"]
    assert recipe.phases["one"].steps == 8  # changes come after overrides
    settings = recipe.phases["one"].settings
    assert (settings["warmup"], settings["before"], settings["num_steps"]) == ("off", 250, 1)
    assert recipe.average.roles == ("student",)
    # The shell gives the same arguments, and a recipe that derives from it is the same recipe.
    assert shlex.split(run.command("other"))[3:] == run.arguments("other")
    derived = tmp_path / "derived.yaml"
    derived.write_text(yaml.safe_dump({"base": "tiny", **overrides}))
    assert load_recipe(str(derived), run.changes) == recipe


def test_the_command_prints_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {
        "tiny": {"recipe": "tiny"},
        "short": {"recipe": "tiny", "overrides": {"seed": 3}},
        "last": {"recipe": "tiny"},
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "runs": runs}, sort_keys=False))
    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3 if "seed=3" in command else 0)

    monkeypatch.setattr(study.subprocess, "run", run)
    lines = [
        "python -m training.train tiny\n",
        "python -m training.train tiny seed=3 --run runs/short\n",
        "python -m training.train tiny --run runs/last\n",
    ]
    assert study.main([str(file)]) == 0
    assert capsys.readouterr().out == "".join(lines)
    assert not commands
    assert study.main([str(file), "--only", "last", "tiny"]) == 0
    assert capsys.readouterr().out == lines[0] + lines[2]
    assert study.main([str(file), "--train"]) == 3  # and what comes after is not begun
    trains = [sys.executable, "-m", "training.train", "tiny"]
    assert commands == [trains, [*trains, "seed=3", "--run", "runs/short"]]
    assert study.main([str(file), "--only", "long"]) == study.REFUSED
    assert "there is no run long; there are tiny, short, last" in capsys.readouterr().err


# Of the ablations as they were when they were recipes, by phase.
FINGERPRINTS = {
    "ablation_alone": ["0db42dc4f8c6dfec", "83f7f8481012ab5b", "c0b533de1393376d"],
    "ablation_direct": ["b18a9437c691c1ea"],
    "ablation_gan": ["d9e2307417291b54", "0ca072b35334a5c9", "c15425c821cba401"],
    "ablation_hinge": ["236a1b9598a91216", "25c3089829dc459b", "dfaa6b74d9efa26b"],
    "ablation_lambda_10": ["548dd5c28d729b8a", "4c684af96068c2b7", "c6d2ed769a57c022"],
    "ablation_lambda_30": ["0242cdc19839581d", "d5f638b44b1322eb", "8911d7bd2ffd7cfe"],
    "ablation_lambda_70": ["fd46f3671eb0e48b", "6cd71a3705d06375", "969effb4697480fc"],
    "ablation_lambda_90": ["9af453e4c99b0050", "08c030b68d45d280", "20ac4a27c7ffeb06"],
    "ablation_static": ["8ed960a9537afd86", "a2fed4207bce0813", "6673e1021846aedd"],
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_ablations_from_before_are_found_and_can_be_resumed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(STUDIES)  # where no file of theirs is
    run = load_study(STUDIES / "distillation.yaml").runs[name]
    recipe = resolve_recipe(load_recipe(run.recipe, run.list_changes()))
    for number, expected in enumerate(FINGERPRINTS[name]):
        assert expected in recipe.list_fingerprints(number)
    assert len(recipe.phases) == len(FINGERPRINTS[name])
    assert run.command(name).endswith(f" --run runs/{name}")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_name_phases_that_their_runs_export(path: Path) -> None:
    study = load_study(path)
    recipes = {
        name: load_recipe(run.recipe, run.list_changes()) for name, run in study.runs.items()
    }
    for recipe in recipes.values():
        make_methods(recipe)
    for model in study.models.values():
        for run in model.runs:
            assert model.phase is not None
            assert recipes[run].phases[model.phase].exports == "student"
