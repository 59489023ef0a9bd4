"""Listing, lengths and decoding of clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.metrics.clips import SPAN_FRAMES, check_features, iterate_spans, list_clips
from turbotalk_core.errors import CheckpointError, RequestError

from .conftest import MakeVideo


@pytest.fixture
def folder(tmp_path: Path, make_video: MakeVideo) -> Path:
    make_video(tmp_path / "long.mp4", [(40, 0.2)])
    make_video(tmp_path / "deep" / "short.mp4", [(20, 0.4)])
    (tmp_path / "broken.webm").write_bytes(b"no video")
    return tmp_path


def test_all_of_every_clip_counts(folder: Path) -> None:
    clips, skips = list_clips(folder, "real", None)
    assert {clip.name: clip.num_frames for clip in clips} == {"deep/short": 20, "long": 40}
    assert [(skip.side, skip.clip, skip.of) for skip in skips] == [("real", "broken", "all")]
    assert "cannot read a video" in skips[0].reason


def test_or_so_many_frames_of_each(folder: Path) -> None:
    clips, skips = list_clips(folder, "real", 30)
    assert {clip.name: clip.num_frames for clip in clips} == {"long": 30}
    assert {skip.clip: skip.reason for skip in skips}["deep/short"] == (
        "deep/short has 20 frames, and 30 are to count"
    )


def test_folders_without_videos_and_two_of_a_name_are_refused(
    folder: Path, make_video: MakeVideo
) -> None:
    for empty in (folder / "gone", folder / "deep" / "short.mp4"):
        with pytest.raises(RequestError, match="give the folder of the generated clips"):
            list_clips(empty, "generated", None)
    make_video(folder / "broken.mp4", [(5, 0.5)])
    with pytest.raises(RequestError, match="several videos called broken"):
        list_clips(folder, "real", None)


def test_spans_tile_a_clip(folder: Path) -> None:
    clip = next(clip for clip in list_clips(folder, "real", 37)[0] if clip.name == "long")
    spans = list(iterate_spans(clip))
    assert [len(span) for span in spans] == [SPAN_FRAMES, SPAN_FRAMES, 5]
    assert spans[0].shape == (SPAN_FRAMES, 3, 32, 48)
    assert spans[0].dtype == torch.uint8
    # Grey of 0.2, where nothing moves.
    assert spans[0][:, :, 20:, :].float().mean() / 255 == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    ("features", "got"),
    [
        (torch.zeros(3, 5), r"\(3, 5\) instead of features of shape \[3, 4\]"),
        (torch.zeros(2, 4), r"\(2, 4\)"),
        (torch.zeros(4), r"\(4,\)"),
        ((torch.zeros(3, 4),), "tuple"),
        (torch.full((3, 4), torch.nan), "not finite"),
    ],
)
def test_features_of_another_shape_are_refused(features: object, got: str) -> None:
    with pytest.raises(CheckpointError, match=f"the network returned {got}|{got}"):
        check_features(features, 3, 4, "the network")


def test_features_of_the_right_shape_are_given_on() -> None:
    features = torch.rand(3, 4, dtype=torch.float64)
    assert torch.equal(check_features(features, 3, 4, "it"), features.float())
    assert check_features(features, 3, None, "it").shape == (3, 4)
