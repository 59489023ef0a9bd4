"""The benchmark of a training step: its cases, its report, and the command itself."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.benchmark import step
from training.benchmark.hardware import read_memory
from training.benchmark.report import MIB, Case, EngineName, Measurement, Report, Row
from training.benchmark.step import (
    METHODS,
    WIDTHS,
    draw_batch,
    find_width,
    list_cases,
    main,
    make_recipe,
)
from training.engine.engine import Precision
from training.recipe import ClipShape, Preset, parse
from training.train import make_methods, network_kind
from training.trainer.roles import RoleBuilder
from turbotalk_core.cli.arguments import REFUSED
from turbotalk_core.models.wan import WanConfig

CLIP = ClipShape(num_frames=9, height=64, width=96, num_text_tokens=0, num_image_tokens=0)
SMALL = ["--layers", "1", "--frames", "5", "--size", "32x32", "--rounds", "1"]


def _case(method: str, engine: EngineName = "plain", num_ranks: int = 1) -> Case:
    return Case(method=method, engine=engine, precision="float32", num_ranks=num_ranks)


def _report() -> Report:
    measured = Measurement(
        num_steps=5,
        calls={"student": {"forward": 7, "weights": 1}, "teacher": {"forward": 2}},
        step_seconds=(0.75, 0.5, 0.25),
        bare_seconds=(0.25, 0.5, 0.4),
        start_bytes=100 * MIB,
        peak_bytes=164 * MIB,
    )
    rows = (
        Row(case=_case("dmd"), measurement=measured),
        Row(case=_case("dmd", "zero2", 2), measurement=replace(measured, step_seconds=(2.0,))),
    )
    return Report(
        device="a processor",
        torch="2.0",
        num_threads=2,
        networks="Networks",
        clip=CLIP,
        size=3,
        activations="keep",
        rows=rows,
    )


def test_overhead_and_tokens_are_those_of_the_medians() -> None:
    report = _report()
    assert report.num_tokens == 3 * 4 * 6
    alone, pair = report.rows
    assert alone.measurement.seconds == 0.5
    assert alone.measurement.overhead == pytest.approx(0.5 / 0.4)
    assert report.tokens_per_second(alone) == pytest.approx((3 * 72 / 0.5, 3 * 72 / 0.4))
    # Both processes learn from samples of their own at the same time.
    assert report.tokens_per_second(pair) == pytest.approx((2 * 3 * 72 / 2.0, 2 * 3 * 72 / 0.4))


def test_the_report_says_the_same_to_people_and_programs() -> None:
    report = _report()
    data = json.loads(json.dumps(report.to_json()))
    summaries = [row.pop("summary") for row in data["rows"]]
    assert parse(Report, data, "the report") == report
    assert summaries[0]["overhead"] == report.rows[0].measurement.overhead
    lines = list(report.lines())
    assert len(lines) == 2 + len(report.rows)
    assert lines[2].split() == [
        *("dmd", "plain", "float32", "1", "0.500", "1.25", "432", "540", "164", "100")
    ]
    page = report.to_markdown()
    assert "| dmd | plain | float32 | 1 | 0.500 | 1.25 | 432 | 540 | 164 | 100 |" in page
    assert "| dmd | 5 | student | 7 | 1 | 0 |" in page
    assert "a processor, threads: 2, torch 2.0" in page
    assert "{" not in page


@pytest.mark.parametrize(
    ("engines", "precisions", "num_ranks", "expected"),
    [
        (["plain"], ["float32", "mixed"], None, ["float32", "mixed"]),
        (["plain"], ["float32"], 2, ["float32"]),  # one device
        (["zero1"], ["float32", "mixed"], None, ["float32", "float32, 2 processes"]),
        (["zero3"], ["bfloat16"], 2, ["bfloat16, 2 processes"]),
        (["zero3"], ["mixed"], None, []),
    ],
)
def test_cases_that_cannot_be_are_left_out(
    engines: Sequence[EngineName],
    precisions: Sequence[Precision],
    num_ranks: int | None,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases = list_cases(["flow_matching"], engines, precisions, num_ranks)
    assert [case.name.partition(f"{engines[0]}, ")[2] for case in cases] == expected


def test_two_processes_are_for_what_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases = list_cases(list(METHODS), step.ENGINES, ["float32"], None)
    assert len(cases) == len(METHODS) * len(step.ENGINES) + 3
    assert {case.method for case in cases if case.num_ranks > 1} == {"flow_matching"}
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    cases = list_cases(list(METHODS), step.ENGINES, ["float32"], None)
    assert {case.engine for case in cases} == {"plain"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", WIDTHS)
def test_networks_of_every_width_can_be_built_and_called(width: Preset, method: str) -> None:
    """On shapes alone."""
    sizes = find_width(width)
    small = replace(sizes.clip, num_frames=9, height=32, width=48)
    video = {**sizes.source.video, "num_layers": 3}
    sizes = replace(sizes, clip=small, source=replace(sizes.source, video=video))
    recipe = make_recipe(_case(method, "zero2", 2), sizes, 2, "keep")
    assert (recipe.engine.kind, recipe.engine.zero_stage) == ("deepspeed", 2)
    assert (recipe.batch.size, recipe.batch.count) == (2, 2)
    methods = make_methods(recipe)
    builder = RoleBuilder(recipe, methods, Path("nowhere"), network_kind(recipe))
    batch = draw_batch(recipe, 2).to("meta")
    assert (batch.has_text, batch.image_embeds_BND is not None) == ((width != "tiny",) * 2)
    for role in methods[0].roles():
        network = builder.sketch(0, role)
        network(batch.latents_BCFHW, torch.zeros(2, device="meta"), batch)


def test_widths_are_those_of_the_families() -> None:
    assert WanConfig(**find_width("14b").source.video) == WanConfig()
    assert WanConfig(**find_width("1.3b").source.video).dim == 1536
    tiny = find_width("tiny").source
    assert WanConfig(**tiny.video).dim == 192
    assert tiny.dit is None
    assert tiny.adapter is None


def test_the_memory_of_a_process_is_its_peak() -> None:
    device = torch.device("cpu")
    now, peak = read_memory(device)
    assert 0 < now <= peak
    size = peak - now + 64 * MIB
    held = torch.ones(size, dtype=torch.uint8)
    assert read_memory(device)[1] >= peak + 32 * MIB
    before = read_memory(device)[0]
    del held
    assert read_memory(device)[0] <= before - 32 * MIB


@pytest.mark.long
def test_the_command_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "results" / name for name in ("speed.json", "speed.md")]
    files = ["--json", str(paths[0]), "--markdown", str(paths[1])]
    which = ["--methods", "adversarial", "--engines", "plain", "zero3", "--ranks", "2"]
    assert main([*which, "--precisions", "float32", *SMALL, *files]) == 0
    data = json.loads(paths[0].read_text())
    for row in data["rows"]:
        assert row.pop("summary")["overhead"] > 0
    report = parse(Report, data, "the report")
    assert [row.case for row in report.rows] == [
        _case("adversarial"),
        _case("adversarial", "zero3", 2),
    ]
    for row in report.rows:
        measured = row.measurement
        assert measured.calls == {
            "discriminator": {"forward": 7, "weights": 6, "inputs": 1},
            "discriminator.backbone": {"forward": 4},
            "student": {"forward": 1, "weights": 1},
        }
        assert len(measured.step_seconds) == len(measured.bare_seconds) == measured.num_steps == 1
        assert measured.peak_bytes > measured.start_bytes > 0
    out = capsys.readouterr().out
    assert out == "".join(f"{line}\n" for line in report.lines())
    page = paths[1].read_text()
    assert page == report.to_markdown()
    names = (str(Path.cwd()), str(tmp_path), os.uname().nodename)
    assert not any(name in text for name in names if len(name) > 2 for text in (page, str(data)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "6"], "4n + 1"),
        (["--size", "40x32"], "got width 40"),
        (["--engines", "zero2", "--precisions", "mixed"], "none go together"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--methods", "dmd", *options]) == REFUSED
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
