"""The commands that make no video, on very small networks with random weights."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.family import NUM_FRAMES, SHIPPED, refusal
from turbotalk_core.cli.main import main
from turbotalk_core.loading import TEACHER


@pytest.mark.parametrize(
    "arguments",
    [
        ["talk"],
        ["dance"],
        ["plan"],
        ["plan", "--seconds", "1", "--audio", "x.wav"],
        ["talk", "--image", "i", "--audio", "a", "--out", "o", "--size", "big"],
        ["talk", "--image", "i", "--audio", "a", "--out", "o", "--threads", "0"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_plan_shows_a_row_for_each_chunk(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--seconds", "8"]) == 0
    title, heads, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("200 frames, 8.00 s, 3 chunks")
    assert heads.split() == ["chunk", "makes", "keeps", "seconds"]
    assert [" ".join(row.split()) for row in rows] == [
        "0 0 - 81 0 - 81 0.00 - 3.24",
        "1 72 - 153 81 - 153 3.24 - 6.12",
        "2 144 - 225 153 - 200 6.12 - 8.00",
    ]


def test_plan_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--chunk-frames", "21", "--motion-frames", "5"]
    assert main(["plan", "--seconds", "0.92", "--json", *lengths]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == {
        "num_frames": 23,  # not 22: 0.92 is read as it is written
        "fps": 25,
        "chunks": [
            {"index": 0, "start": 0, "stop": 21, "keep_start": 0, "keep_stop": 21},
            {"index": 1, "start": 16, "stop": 37, "keep_start": 21, "keep_stop": 23},
        ],
    }


def test_plan_of_a_recording(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--audio", str(inputs / "voice.wav"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_frames"] == NUM_FRAMES


def test_plan_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--seconds", "0.03"]) == 2
    assert "got 0 frames" in refusal(capsys)


def test_inspect_says_what_a_file_is(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(models / "diffusion_models" / TEACHER)
    assert main(["inspect", path]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{TEACHER}: video transformer")
    assert main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == SHIPPED


def test_inspect_repeats_no_command_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    told = {"turbotalk": json.dumps({"kind": "\x1b]0;owned\x07", "a": "\ud800"}), "b": "\x1b[2J\nc"}
    save_file({"a": torch.ones(1)}, path, told)
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert r"ships with kind: \x1b]0;owned\x07" in said
    assert r"metadata b: \x1b[2J\nc" in said
    assert r"ships with a: \ud800" in said
    assert "\x1b" not in said
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"] == {"b": "\x1b[2J\nc"}
    assert main(["inspect", str(tmp_path / "\x1b[2J.safetensors")]) == 2
    assert r"\x1b[2J" in refusal(capsys)


@pytest.mark.parametrize(
    "seconds", ["1e999999999", "1e-999999999", "1/0", "1/00", "9" * 5_000, "-1", "x"]
)
def test_a_length_that_cannot_be_is_refused(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", f"--seconds={seconds}"])
    assert "give seconds, as in 7.5" in capsys.readouterr().err


def test_a_video_of_years_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--seconds", "999999999"]) == 2
    assert "at most 10000000 are made" in refusal(capsys)


def test_inspect_refuses_what_is_no_model(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(inputs / "face.png")]) == 2
    assert "face.png" in refusal(capsys)


def _bench(*arguments: str) -> int:
    return main(["bench", "--device", "cpu", "--size", "32x48", "--frames", "9", *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("source", [["--random"], []])
def test_bench_measures_chunks(
    models: Path, capsys: pytest.CaptureFixture[str], source: list[str]
) -> None:
    settings = ("--models", str(models), "--json", "--threads", "1", "--chunks", "2")
    assert _bench(*settings, *source, "--steps", "2", "1") == 0
    told = json.loads(capsys.readouterr().out)
    sizes = ("width", "height", "num_frames", "num_tokens")
    assert [told[name] for name in sizes] == [32, 48, 9, 3 * 2 * 3]
    assert told["weights"].startswith("random weights" if source else TEACHER)
    assert told["obstacle"] is None
    assert [speed["num_steps"] for speed in told["speeds"]] == [2, 1]
    assert [speed["steady_chunk"]["num_calls"] for speed in told["speeds"]] == [2, 1]


@pytest.mark.slow
def test_bench_without_a_size_takes_the_shipped_one(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "--models", str(models), "--random", "--device", "cpu", "--chunks", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("chunks of 13 frames, 32x32, 16 video tokens\n")
    assert "steps per chunk 1 2 4\n" in re.sub(" +", " ", said)
    assert "random weights in float32, VAE in float32, on cpu" in said


@pytest.mark.slow
def test_bench_of_the_full_size_says_what_it_would_need(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _bench("--model", "14b", "--random") == 0
    said = capsys.readouterr().out
    assert "random weights in bfloat16" in said
    assert re.search(r"transformer weights +32\.790 GB", said)
    assert "not run: on cpu" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "14b"], "14b without --random; only tiny ships weights"),
        (["--frames", "10"], "got 10 frames"),
        (["--chunks", "1"], "got 1 chunks; how they follow each other takes two"),
        (["--size", "40x48"], "got width 40; the model takes multiples of 16"),
        (["--size", "40x48"], "--size: got width 40"),
        (["--frames", "10"], "--frames: got 10 frames"),
        (["--steps", "5000"], "got --steps 5000; use a whole number from 1 to 1000"),
    ],
)
def test_bench_refuses_what_cannot_be_run(
    models: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert _bench("--models", str(models), *arguments) == 2
    assert message in refusal(capsys)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99", "mps:9", "cpu:1", "-1", ""])
def test_bench_names_the_devices_there_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", f"--device={name}"])
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: argument --device: got '{name}', which is not available; ")
    assert "available: cpu" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk-frames", "12"], "--chunk-frames: got 12 frames"),
        (["--motion-frames", "0"], "got --motion-frames 0; use"),
    ],
)
def test_plan_names_its_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--seconds", "1", *arguments]) == 2
    assert message in refusal(capsys)


def test_inspect_shows_a_name_that_is_not_utf_8(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m\udcc4.safetensors"
    path.write_bytes((models / "diffusion_models" / TEACHER).read_bytes())
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.startswith(r"m\udcc4.safetensors: video transformer")
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == "m\udcc4.safetensors"


def test_the_package_runs_as_a_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["turbotalk_core", "plan", "--seconds", "1"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("turbotalk_core", run_name="__main__")
    assert caught.value.code == 0
    assert "25 frames" in capsys.readouterr().out
