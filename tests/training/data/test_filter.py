"""Filtering: all pieces are scored and kept, with their tier and its reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.data import filter as stage
from training.data.filter import PIECES, FilterSettings, list_pieces, run_filter
from training.data.resumable_stage import SKIPPED, Work, read_records
from training.data.scores import LIMITS, Limit
from training.data.split import SCENES, SplitSettings, run_split
from turbotalk_core.errors import CheckpointError, RequestError

from .conftest import RATE, MakeVideo, hum

SPLIT = SplitSettings(min_frames=9, max_frames=50)
SMALL = {**LIMITS, "side": Limit(good=32, fair=16)}


@pytest.fixture
def videos(tmp_path: Path, make_video: MakeVideo) -> Path:
    folder = tmp_path / "videos"
    make_video(folder / "talk.mp4", [(50, 0.2), (40, 0.8)])
    pause_S = torch.cat((hum(1.0), torch.zeros(RATE)))
    make_video(folder / "pause.mp4", [(50, 0.4)], sound_S=pause_S)
    make_video(folder / "silent.mp4", [(20, 0.4)], sound_S=torch.zeros(round(0.8 * RATE)))
    run_split(folder, tmp_path / "set", SPLIT, Work())
    return folder


def test_every_piece_is_kept_with_its_tier(videos: Path, tmp_path: Path) -> None:
    settings = FilterSettings(limits=SMALL)
    summary = run_filter(videos, tmp_path / "set", settings, Work())
    records = read_records(tmp_path / "set" / PIECES)
    assert list(records) == [
        "pause.mp4#0-50",
        "silent.mp4#0-20",
        "talk.mp4#0-50",
        "talk.mp4#50-90",
    ]
    assert {key: (record["tier"], record["reasons"]) for key, record in records.items()} == {
        "pause.mp4#0-50": (1, ["silence_share"]),
        "silent.mp4#0-20": (2, ["silence_share"]),
        "talk.mp4#0-50": (0, []),
        "talk.mp4#50-90": (0, []),
    }
    assert records["talk.mp4#50-90"]["start"] == 50
    assert records["talk.mp4#50-90"]["scores"]["seconds"] == 1.6
    assert records["pause.mp4#0-50"]["scores"]["silence_share"] == pytest.approx(0.5, abs=0.05)
    assert (summary.num_made, dict(summary.skips)) == (4, {})
    again = run_filter(videos, tmp_path / "set", settings, Work())
    assert (again.num_made, again.num_kept) == (0, 4)


def test_a_video_that_is_gone_is_a_recorded_skip(videos: Path, tmp_path: Path) -> None:
    (videos / "pause.mp4").unlink()
    summary = run_filter(videos, tmp_path / "set", FilterSettings(), Work())
    assert summary.skips == {"AudioError": 1}
    record = read_records(tmp_path / "set" / PIECES)["pause.mp4#0-50"]
    assert "there is no audio file" in record[SKIPPED]


def test_other_limits_or_other_scenes_are_refused(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    run_filter(videos, out, FilterSettings(), Work())
    with pytest.raises(RequestError, match="other settings: limits"):
        run_filter(videos, out, FilterSettings(limits=SMALL), Work())
    run_split(videos, out, SplitSettings(min_frames=9, max_frames=25), Work(overwrites=True))
    with pytest.raises(RequestError, match="other settings: scenes"):
        run_filter(videos, out, FilterSettings(), Work())
    run_filter(videos, out, FilterSettings(), Work(overwrites=True))
    assert list(read_records(out / PIECES)) == list(list_pieces(out))


def test_nothing_is_filtered_before_it_is_split(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="run the one before"):
        run_filter(tmp_path, tmp_path / "set", FilterSettings(), Work())


def test_a_judge_that_is_missing_is_told_at_once(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="give --face too"):
        FilterSettings(sync_network=tmp_path / "sync.pt2")
    with pytest.raises(CheckpointError, match=r"no judge at .*face\.pt2"):
        run_filter(
            videos, tmp_path / "set", FilterSettings(face_detector=tmp_path / "face.pt2"), Work()
        )
    assert not (tmp_path / "set" / PIECES).exists()


def test_judges_see_faces_and_hear_the_voice(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def detect(picture_CHW: Tensor) -> Tensor:
        # The two talking scenes are told apart by their grey.
        if picture_CHW.mean() < 0.3:
            return torch.tensor([[4.0, 4, 24, 24, 1.0]])
        return torch.zeros(0, 5)

    def embed(faces_TCHW: Tensor, waveform_S: Tensor) -> tuple[Tensor, Tensor]:
        assert faces_TCHW.shape == (50, 3, 224, 224)
        assert waveform_S.shape == (50 * 640,)
        both_ND = torch.randn(46, 8, generator=torch.Generator().manual_seed(0))
        return both_ND, both_ND.roll(2, 0)

    programs = {"face.pt2": detect, "sync.pt2": embed}
    for name in programs:
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(stage, "load_program", lambda path: programs[path.name])
    settings = FilterSettings(
        face_detector=tmp_path / "face.pt2", sync_network=tmp_path / "sync.pt2", limits=SMALL
    )
    run_filter(videos, tmp_path / "set", settings, Work())
    records = read_records(tmp_path / "set" / PIECES)
    seen, unseen = records["talk.mp4#0-50"], records["talk.mp4#50-90"]
    assert seen["scores"]["face_share"] == 1
    assert seen["scores"]["face_side"] == 20
    assert seen["scores"]["sync_offset"] == 2
    assert seen["scores"]["sync_confidence"] > 3
    assert (seen["tier"], seen["reasons"]) == (2, ["face_side", "sync_offset"])
    assert unseen["scores"]["face_share"] == 0
    assert "sync_offset" not in unseen["scores"]
    assert unseen["reasons"] == ["face_share"]
    assert (tmp_path / "set" / SCENES).exists()
