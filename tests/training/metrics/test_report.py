"""Reports contain the context of their numbers, as JSON and as a page."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from training.metrics.clips import Skip
from training.metrics.report import (
    REPORT,
    RULE,
    TABLE,
    ClipMean,
    ClipScore,
    Report,
    SetScore,
    SideCount,
    average_clips,
    format_report,
    write_report,
)
from training.metrics.weights import UsedFile
from turbotalk_core.errors import OutputError

SCORES = (
    ClipScore(side="generated", clip="a", num_frames=81, sync_c=6.0, sync_d=8.0, offset=0),
    ClipScore(side="generated", clip="b|c", num_frames=50, sync_c=8.0, sync_d=7.0, offset=-1),
    ClipScore(side="real", clip="a", num_frames=81, sync_c=9.0, sync_d=6.5, offset=0),
)
REPORT_OF_ALL = Report(
    settings={"metrics": ["fid", "sync"], "num_frames": None, "seed": 3, "device": "cpu"},
    sides=(
        SideCount(side="generated", num_clips=2, num_frames=131),
        SideCount(side="real", num_clips=1, num_frames=81),
    ),
    set_scores=(
        SetScore(
            metric="kid",
            value=0.0123,
            spread=0.0045,
            sample="frame",
            width=2048,
            clips=(2, 1),
            frames=(131, 81),
            samples=(131, 81),
            notes=("unequal sets",),
        ),
    ),
    clip_means=average_clips(SCORES),
    clip_scores=SCORES,
    not_measured={"fvd": "there is no i3d_torchscript.pt"},
    skips=(Skip(side="real", clip="bad", of="all", reason="cannot\nread it"),),
    weights=(UsedFile(file="syncnet_v2.model", bytes=3, sha256="ab", is_public=True),),
)


def test_programs_read_all_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    empty = replace(REPORT_OF_ALL, set_scores=(), clip_means=(), clip_scores=(), skips=())
    for report in (REPORT_OF_ALL, empty):
        write_report(report, folder)
        plain = json.loads((folder / REPORT).read_text())
        assert plain == json.loads(json.dumps(asdict(report)))
    assert sorted(path.name for path in folder.iterdir()) == [REPORT, TABLE]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=f"at {tmp_path / 'file'};"):
        write_report(REPORT_OF_ALL, tmp_path / "file")


def test_people_are_told_the_same(tmp_path: Path) -> None:
    write_report(REPORT_OF_ALL, tmp_path)
    lines = (tmp_path / TABLE).read_text().splitlines()
    assert "| generated | 2 | 131 | 0 |" in lines
    assert "| real | 1 | 81 | 1 |" in lines
    assert RULE in lines
    assert "| kid | 0.0123 ± 0.0045 | 2 / 1 | 131 / 81 | 131 / 81 | frame, 2048 wide |" in lines
    assert "- kid: unequal sets" in lines
    assert "| generated | 2 | 131 | 7.000 | 7.500 |" in lines
    assert "| generated | b\\|c | 50 | 8.000 | 7.000 | -1 |" in lines
    assert "- fvd: not measured: there is no i3d_torchscript.pt" in lines
    assert "| real | bad | all | cannot read it |" in lines
    assert "| syncnet_v2.model | 3 | ab | yes |" in lines


def test_what_there_is_nothing_of_has_no_heading() -> None:
    nothing = Report(
        settings={},
        sides=REPORT_OF_ALL.sides,
        set_scores=(),
        clip_means=(),
        clip_scores=(),
        not_measured={},
        skips=(),
        weights=(),
    )
    assert "##" not in format_report(nothing)


def test_means_are_of_each_side() -> None:
    assert average_clips(SCORES) == (
        ClipMean(side="generated", num_clips=2, num_frames=131, sync_c=7.0, sync_d=7.5),
        ClipMean(side="real", num_clips=1, num_frames=81, sync_c=9.0, sync_d=6.5),
    )
    assert average_clips(()) == ()
