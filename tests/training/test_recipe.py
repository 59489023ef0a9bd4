"""Recipes: derivation, errors, and storage."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from training.recipe import FOLDER, Recipe, load_recipe, parse, store_recipe
from turbotalk_core.errors import RecipeError

BASE = """
seed: 3
engine: {kind: deepspeed, clip_norm: 1e-1}
weights: {teacher: {video: {dim: 24, ffn_dim: 16}}}
phases:
  dmd: {method: dmd, steps: 4, settings: {student: {learning_rate: 2e-6}}}
  three: {method: adversarial, steps: 5}
"""
CHILD = """
base: base
engine: {zero_stage: 2}
phases:
  dmd: {settings: {student_every: 5}}
  three: null
  two: {method: adversarial, steps: 6}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "child.yaml").write_text(CHILD)
    return tmp_path


def test_a_recipe_derives_key_by_key(folder: Path) -> None:
    recipe = load_recipe(str(folder / "child.yaml"))
    assert (recipe.seed, recipe.engine.zero_stage, recipe.engine.clip_norm) == (3, 2, 0.1)
    assert list(recipe.phases) == ["dmd", "two"]
    settings = recipe.phases["dmd"].settings
    assert settings == {"student": {"learning_rate": "2e-6"}, "student_every": 5}
    assert recipe.weights["teacher"].video == {"dim": 24, "ffn_dim": 16}
    assert recipe.num_steps == 10


def test_changes_of_the_command_line_come_last(folder: Path) -> None:
    changes = ["phases.two.steps=7", "weights.teacher.dit=a/b.safetensors", "phases.dmd=null"]
    recipe = load_recipe(str(folder / "child.yaml"), changes)
    assert list(recipe.phases) == ["two"]
    assert recipe.phases["two"].steps == 7
    assert recipe.weights["teacher"].dit == Path("a/b.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "engine.zero_stag=3",
            r"engine.zero_stag is unknown; the nearest key is engine.zero_stage",
        ),
        ("sed=3", "sed is unknown; the nearest key is seed"),
        ("phases.dmd.stesp=3", "the nearest key is phases.dmd.steps"),
        ("weights.teacher.dut=a", "the nearest key is weights.teacher.dit"),
        ("engine.zero_stage=4", "engine.zero_stage is 4: Input should be 1, 2 or 3"),
        ("batch.size=0", "batch.size is 0"),
        ("engine.clip_norm=0", "engine.clip_norm is 0"),
        ("guard.most_skips=-1", "guard.most_skips is -1"),
        ("guard.most_rounding=0", "guard.most_rounding is 0"),
        ("salt=-1", "salt is -1"),
        ("validate={every: 5}", r"validate.folder .*Field required"),
        ("validate={folder: a, every: 0}", "validate.every is 0"),
        ("phases.dmd.ends={seen: 0.1, closed: 0.2}", "closed must be smaller than seen"),
        ("phases.dmd.ends={sen: 0.1}", "the nearest key is phases.dmd.ends.seen"),
        ("phases.new.method=dmd", r"phases.new.steps .*Field required"),
        ("engine", "key.key=value"),
        ("engine=[1", "is no YAML"),
        ("engine=" + "[" * 5_000, "is no YAML"),
        ("engine=2001-99-99", "is no YAML"),
        ("engine=!!python/object/apply:os.getcwd []", "is no YAML"),
        ("engine=&a [*a]", "means inf values"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(folder / "child.yaml"), [change])


def test_a_few_lines_cannot_mean_terabytes(folder: Path) -> None:
    lines = ["a: &a [" + "1," * 9 + "]"]
    lines += [
        f"{name}: &{name} [" + f"*{before}," * 9 + "]" for before, name in pairwise("abcdefgh")
    ]
    (folder / "child.yaml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=r"means \d+ values, at most 100000 are read"):
        load_recipe(str(folder / "child.yaml"))


def test_unknown_names_and_circles_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe nothing"):
        load_recipe("nothing")
    (folder / "base.yaml").write_text("base: child")
    with pytest.raises(RecipeError, match="derives from itself"):
        load_recipe(str(folder / "child.yaml"))
    (folder / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="no mapping"):
        load_recipe(str(folder / "list.yaml"))


def test_what_is_stored_is_the_same_without_its_base(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(folder / "child.yaml"), ["batch.count=4"])
    stored = tmp_path / "stored" / "recipe.yaml"
    stored.parent.mkdir()
    store_recipe(recipe, stored)
    assert load_recipe(str(stored)) == recipe
    assert [path.name for path in stored.parent.iterdir()] == ["recipe.yaml"]


def test_the_fingerprint_is_of_what_decides_the_weights(folder: Path) -> None:
    def print_of(*changes: str, phase: int = 0) -> str:
        return load_recipe(str(folder / "child.yaml"), changes).fingerprint(phase)

    same = print_of()
    for change in ("checkpoints.every=7", "engine.zero_stage=3", "phases.two.steps=60"):
        assert print_of(change) == same
    for change in (
        "engine.clip_norm=7",
        "rate.num_warmup_steps=7",
        "average.decay=0.5",
        "average.start=7",
        "phases.dmd.settings.student.learning_rate=7",
        "phases.dmd.settings.student.betas=[0.5,0.9]",
        "phases.dmd.settings.fake_score.weight_decay=0.5",
        "salt=7",
        "phases.dmd.ends={}",
    ):
        assert print_of(change) == same
    assert print_of("phases.dmd.settings.student.trains=lora") != same
    assert print_of("average.roles=[teacher]") != same
    for change in ("seed=4", "engine.precision=bfloat16", "phases.dmd.settings.student_every=4"):
        assert print_of(change) != same
    # What has not begun has decided nothing.
    change = "phases.two.settings.warmup_steps=7"
    assert print_of(change) == same
    assert print_of(change, phase=1) != print_of(phase=1) != same
    # How far a phase goes on at its end decides nothing before, and everything after.
    change = "phases.dmd.extrapolation=1.5"
    assert print_of(change) == same
    assert print_of(change, phase=1) != print_of(phase=1)


def test_settings_of_a_role(folder: Path) -> None:
    recipe = load_recipe(str(folder / "child.yaml"), ["average.roles=[student]"])
    learning = parse_learning()
    student, other = (recipe.settings_of(role, learning) for role in ("student", "fake_score"))
    assert (student.learning_rate, student.betas, student.clip_norm) == (1e-3, (0.0, 0.9), 0.1)
    assert (student.ema_decay, other.ema_decay) == (0.99, None)
    # The average begins at a step of the loop, whatever the number of updates until there.
    assert student.ema_start == 200
    late = recipe.settings_of("student", learning, starts_at=20, every=5)
    assert late.ema_start == (200 - 20) // 5


def test_what_may_change_is_listed_with_its_place(folder: Path) -> None:
    listed = load_recipe(str(folder / "child.yaml")).list_changeable(0)
    assert listed["phases.dmd.settings.student.learning_rate"] == "2e-6"
    assert listed["engine.clip_norm"] == 0.1
    assert {"salt", "average.decay", "average.start", "rate.kind"} < listed.keys()
    assert "phases.two.settings.student.learning_rate" not in listed


def parse_learning() -> object:
    from training.methods.method import Learning

    return parse(Learning, {"learning_rate": "1e-3", "betas": [0.0, 0.9]}, "here")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_is_shipped_is_one(path: Path) -> None:
    assert isinstance(load_recipe(path.stem), Recipe)
