"""Every command refuses what it cannot do in one line, before any work, and leaves nothing."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from turbotalk_core.cli.arguments import REFUSED

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "training" / "studies" / "distillation.yaml"

CASES = [
    ("train", "nowhere", "there is no recipe nowhere"),
    ("train", "utf16.yaml", "it is no UTF-8 text, it has UTF-16"),
    ("train", "cp1252.yaml", "it is no UTF-8 text, it has the byte 0xfc"),
    ("train", "list.yaml", "no mapping"),
    ("train", "bom.yaml unknown=1", "recipe bom.yaml: unknown is unknown"),
    ("train", "bom.yaml data.folder=nowhere", "cannot read nowhere/settings.json"),
    ("train", "bom.yaml data.folder=file", "cannot read file/settings.json"),
    ("train", "bom.yaml --bogus", "unrecognized arguments"),
    ("evaluate", "--weights nowhere", "nowhere"),
    ("evaluate", "--weights file --json folder", "folder is a folder"),
    ("evaluate", "--weights file --json file/a.json", "file"),
    ("evaluate", "--weights file --sheet a.doc", "must end in .png"),
    ("evaluate", "--weights file --frames 0", "whole number from 1"),
    ("evaluate", "--weights file --frames 999999997", "at most"),
    ("evaluate", "--weights file --pairs 0", "whole number from 1"),
    ("evaluate", "--weights file --steps 0", "whole number from 1"),
    ("evaluate", "--weights file --audio-guidance nan", "give a number"),
    ("evaluate", "--weights file --threads 100000", "from 1 to"),
    ("evaluation.speakers", "--weights nowhere", "nowhere"),
    ("evaluation.speakers", "--weights file --threads 0", "from 1 to"),
    ("evaluation.long", "--weights nowhere --json a.json", "nowhere"),
    ("evaluation.long", "--weights nowhere --json folder", "folder is a folder"),
    ("evaluation.long", "--weights nowhere --json a.json --beside list.yaml", "cannot read"),
    ("evaluation.long", "--json a.json --threads 100000", "from 1 to"),
    ("evaluation.chunked_encoding", "--weights nowhere", "nowhere"),
    ("evaluation.chunked_encoding", "--weights nowhere --minutes 1e300", "minutes up to 600"),
    ("evaluation.chunked_encoding", "--weights nowhere --chunks -1", "chunks from 0 on"),
    ("evaluation.chunked_encoding", "--weights nowhere --threads 100000", "from 1 to"),
    ("metrics.__main__", "--generated folder --real folder --weights . --out o", "no mp4"),
    ("metrics.__main__", "--generated . --real . --weights . --out file", "file"),
    ("metrics.__main__", "--generated . --real . --weights . --out o --device xpu:7", "available"),
    ("metrics.__main__", "--generated . --real . --weights . --out o --threads 0", "from 1 to"),
    ("reports.study", "nowhere.yaml", "there is no study"),
    ("reports.study", "utf16.yaml", "UTF-16"),
    ("reports.study", "folder", "cannot read the study folder"),
    ("reports.study", f"{STUDY} --only nothing", "there is no run nothing"),
    ("reports.results", "cp1252.yaml", "0xfc"),
    ("reports.results", f"{STUDY} --from-json --out broken", "distillation.json is damaged"),
    ("reports.results", f"{STUDY} --from-json --out nowhere", "there is no report"),
    ("reports.results", f"{STUDY} --threads 100000", "from 1 to"),
    ("tiny.vae", "--out a.json", "must end in .safetensors"),
    ("tiny.vae", "--out file/a.safetensors", "file"),
    ("tiny.vae", "--out a.safetensors --frames 6", "6 frames"),
    ("tiny.vae", "--out a.safetensors --clips 0", "got 0 clips"),
    ("tiny.vae", "--out a.safetensors --crop 0", "crops of 0 pixels"),
    ("tiny.vae", "--out a.safetensors --learning-rate nan", "give a number"),
    ("tiny.vae", "--out a.safetensors --init file", "file"),
    ("tiny.vae", "--out a.safetensors --threads 100000", "from 1 to"),
    ("tiny.audio_encoder", "--out folder", "must end in .safetensors"),
    ("tiny.audio_encoder", "--out a.safetensors --num-clips 0", "got 0 clips"),
    ("tiny.audio_encoder", "--out a.safetensors --num-steps 0", "0 steps"),
    ("tiny.audio_encoder", "--out a.safetensors --threads 100000", "from 1 to"),
    ("avatars.synthetic", "--seed 1 --out file", "file"),
    ("avatars.synthetic", "--seed 1 --out o --frames 99999999999", "at most"),
    ("avatars.synthetic", "--seed -1 --out o", "got the seed -1"),
    ("benchmark.step", "--size auto", "width x height"),
    ("benchmark.step", "--frames 80", "80 frames"),
    ("benchmark.step", "--json folder", "folder is a folder"),
]


@pytest.fixture
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("of the user")
    Path("list.yaml").write_text("- a\n")
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbfbase: tiny\n")
    Path("utf16.yaml").write_bytes("base: tiny\n".encode("utf-16"))
    Path("cp1252.yaml").write_bytes("# für\nbase: tiny\n".encode("cp1252"))
    Path("broken").mkdir()
    Path("broken", "distillation.json").write_text("{")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)


@pytest.mark.usefixtures("_place")
@pytest.mark.parametrize(("command", "line", "message"), CASES)
def test_what_cannot_be_is_refused_in_one_line(
    command: str,
    line: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main: Callable[[], int] = import_module(f"training.{command}").main
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", [command, *shlex.split(line)])
    try:
        code: object = main()
    except SystemExit as ended:  # of the parser
        code = ended.code
    assert code == REFUSED
    errors = [text for text in capsys.readouterr().err.splitlines() if "error: " in text]
    assert len(errors) == 1
    assert message in errors[0]
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("_place")
def test_a_report_that_another_process_makes_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from training.evaluate import main
    from training.outputs import hold_files

    line = ["evaluate", "--weights", "nowhere", "--json", "a.json"]
    monkeypatch.setattr(sys, "argv", line)
    with hold_files(Path("a.json")):
        assert main() == REFUSED
    assert "another process is making a.json" in capsys.readouterr().err
