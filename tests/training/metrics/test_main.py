"""The command, from video files to a report and its pictures."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from training.metrics.__main__ import main
from training.metrics.report import REPORT, TABLE
from training.metrics.weights import I3D, KNOWN_FILES

from .conftest import MakeVideo


@pytest.fixture
def folders(tmp_path: Path, make_video: MakeVideo) -> list[str]:
    for side, level in (("generated", 0.4), ("real", 0.6)):
        for number, name in enumerate(("one", "two")):
            video = [(40, level + 0.1 * number)]
            make_video(tmp_path / side / f"{name}.mp4", video, size=(48, 48))
    (tmp_path / "generated" / "broken.mp4").write_bytes(b"no video")
    make_video(tmp_path / "real" / "short.mp4", [(10, 0.5)])
    sides = ["--generated", str(tmp_path / "generated"), "--real", str(tmp_path / "real")]
    return [*sides, "--out", str(tmp_path / "out"), "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.usefixtures("_tiny")
def test_every_metric_of_real_files(
    folders: list[str],
    tmp_path: Path,
    all_weights: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*folders, "--weights", str(all_weights), "--frames", "38"]) == 0
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert {score["metric"] for score in report["set_scores"]} == {"fid", "kid", "fvd", "e_fid"}
    frames = {score["metric"]: score["frames"] for score in report["set_scores"]}
    assert frames == {"fid": [76, 76], "kid": [76, 76], "fvd": [64, 64], "e_fid": [76, 76]}
    assert all(score["value"] > 0 for score in report["set_scores"])
    assert [(score["side"], score["clip"]) for score in report["clip_scores"]] == [
        ("generated", "one"),
        ("generated", "two"),
        ("real", "one"),
        ("real", "two"),
    ]
    assert all(score["sync_c"] >= 0 and score["sync_d"] > 0 for score in report["clip_scores"])
    assert {(skip["side"], skip["clip"], skip["of"]) for skip in report["skips"]} == {
        ("generated", "broken", "all"),
        ("real", "short", "all"),
    }
    assert {file["file"] for file in report["weights"]} == set(KNOWN_FILES)
    assert report["not_measured"] == {}
    assert (tmp_path / "out" / TABLE).read_text() == capsys.readouterr().out
    with Image.open(tmp_path / "out" / "sheets" / "000.png") as sheet:
        assert sheet.size == (8 * 160, 4 * 160)


def test_what_is_missing_is_left_out_unless_asked_for(
    folders: list[str], tmp_path: Path, all_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / I3D).symlink_to(all_weights / I3D)
    places = [*folders, "--weights", str(weights)]
    assert main(places) == 0
    shown = capsys.readouterr().out
    assert "| fvd |" in shown
    assert "- fid: not measured: there is no pt_inception" in shown
    assert main([*places, "--metrics", "fvd", "fid", "--threads", "1"]) == 2
    refusal = capsys.readouterr().err
    assert refusal.startswith("error: there is no pt_inception")
    assert refusal.count("\n") == 1


def test_the_module_is_a_program(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["training.metrics", *folders, "--weights", str(tmp_path), "--metrics", "sync"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.delitem(sys.modules, "training.metrics.__main__", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("training.metrics", run_name="__main__", alter_sys=True)
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main([*folders, "--weights", str(tmp_path), "--metrics", "psnr"])
    assert stopped.value.code == 2
