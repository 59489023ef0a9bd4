"""The command writes settings, summary and pairs, and says what is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.family import FakeEncoder, write_family
from tests.training.evaluation.conftest import REQUIRED
from tests.training.tiny_networks import SHIPPED, SIZE, make_networks
from training import evaluate
from training.avatars.synthetic import SyntheticClip
from training.evaluation import generation, scores
from turbotalk_core.loading import ADAPTER, TEACHER, read_request
from turbotalk_core.request import TalkRequest

NUM_FRAMES = 26


@pytest.fixture
def weights(
    draw_humming_clip: Callable[[str, int, int], SyntheticClip],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Path:
    """A models folder; the audio encoder is a fake."""
    folder = tmp_path / "models"
    write_family(folder, make_networks(), SHIPPED)
    monkeypatch.setattr(generation, "load_audio_encoder", lambda path: FakeEncoder())
    monkeypatch.setattr(scores, "draw_clip", draw_humming_clip)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return folder


def _run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", *options])
    return evaluate.main()


def test_the_command_reports_settings_summary_and_pairs(
    weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report, sheet = tmp_path / "out" / "report.json", tmp_path / "sheet.png"
    options = ["--weights", str(weights), "--frames", str(NUM_FRAMES), "--pairs", "2"]
    outputs = ["--json", str(report), "--sheet", str(sheet)]
    settings = ["--steps", "1", "--audio-guidance", "1", "--seed", "3"]
    assert _run(monkeypatch, *options, *outputs, *settings) == 0
    written = json.loads(report.read_text())
    assert written.keys() == {"settings", "summary", "pairs"}
    assert written["summary"].keys() >= REQUIRED
    assert all(np.isfinite(value) for value in written["summary"].values())
    assert len(written["pairs"]) == 2
    expected = replace(
        read_request(weights / "diffusion_models" / TEACHER),
        num_inference_steps=1,
        audio_guidance_scale=1.0,
        seed=3,
    )
    assert TalkRequest(**{k: written["settings"][k] for k in TalkRequest.__slots__}) == expected
    # Frames 0, 10 and 20, two rows a pair.
    with Image.open(sheet) as picture:
        assert picture.size == (3 * SIZE, 4 * SIZE)


def test_the_command_explains_what_is_missing(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "--weights", str(weights), "--model", "student") == 2
    assert "there is no turbotalk_tiny.safetensors" in capsys.readouterr().err


@pytest.mark.slow
def test_other_model_files_and_another_schedule_are_taken(
    weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The teacher's own files, elsewhere and by another name, make the same clips."""
    dit = weights / "diffusion_models" / TEACHER
    adapter = weights / "model_patches" / ADAPTER
    moved = [tmp_path / "run" / name for name in ("student.safetensors", "adapter.safetensors")]
    moved[0].parent.mkdir()
    for source, target in zip((dit, adapter), moved, strict=True):
        target.write_bytes(source.read_bytes())
    options = ["--weights", str(weights), "--frames", "17", "--pairs", "2"]
    options += ["--schedule", "distilled", "--steps", "2"]
    files = ["--dit", str(moved[0]), "--adapter", str(moved[1])]
    reports = []
    for extra in ([], files):
        path = tmp_path / "report.json"
        assert _run(monkeypatch, *options, *extra, "--json", str(path)) == 0
        reports.append(json.loads(path.read_text()))
    own, other = reports
    assert own["settings"]["schedule"] == other["settings"]["schedule"] == "distilled"
    assert own["pairs"] == other["pairs"]
    assert other["settings"]["model"] == str(moved[0])
