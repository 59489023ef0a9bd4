"""Progress: what a run says of itself."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.training.toy import make_trainer
from training.trainer import progress
from training.trainer.progress import ProgressHook, TensorBoardHook, describe_terms


def test_a_step_is_told_in_a_line() -> None:
    terms = {"critic/loss": 0.5, "critic/real": 2.0, "student/skipped": 1.0}
    assert describe_terms(terms, torch.device("cpu")) == "critic 0.5, student left out"


@pytest.mark.slow
def test_without_a_terminal_there_is_a_line_now_and_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    make_trainer(tmp_path, hooks=[ProgressHook()]).run()
    lines = [record.message for record in caplog.records if ": step " in record.message]
    assert len(lines) == 8
    assert lines[0].startswith("first: step 1 of 8, critic ")
    assert lines[-1].startswith("second: step 8 of 8, critic ")


@pytest.mark.slow
def test_on_a_terminal_there_is_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    make_trainer(tmp_path, hooks=[ProgressHook()]).run()
    shown = capsys.readouterr().err
    assert "second" in shown
    assert "8/8" in shown
    assert "critic" in shown


@pytest.mark.slow
def test_tensorboard_gets_all_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, int]] = []
    opened: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert isinstance(value, float)
            written.append((name, step))

        def flush(self) -> None:
            written.append(("flush", 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    make_trainer(tmp_path / "without", hooks=[TensorBoardHook()]).run()
    assert not opened
    monkeypatch.setattr(progress, "find_spec", lambda name: object())
    make_trainer(tmp_path / "with", hooks=[TensorBoardHook()]).run()
    assert opened == [(str(tmp_path / "with" / "tensorboard"), 1)]
    assert ("critic/loss", 8) in written
    assert ("generator/gradient_norm", 1) in written
    assert written[-1][0] == "flush"
