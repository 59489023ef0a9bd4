"""Face tracking, and errors for clips without a face."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.metrics.clips import Clip
from training.metrics.faces import MOST_MISSING, cut_faces, follow_face, smooth_track
from turbotalk_core.errors import ImageError

from .conftest import MakeVideo

NONE = torch.zeros(0, 4)


def _box(x: float, y: float = 0.0, side: float = 20.0) -> Tensor:
    return torch.tensor([[x, y, x + side, y + side]])


class TestFollowing:
    def test_the_largest_face_is_followed_whatever_else_appears(self) -> None:
        small, other = _box(100, side=10), _box(200, side=60)
        faces = [
            torch.cat((small, _box(0))),
            torch.cat((_box(2), other)),
            torch.cat((other, _box(4))),
        ]
        track_T4 = follow_face(faces)
        assert track_T4[:, 0].tolist() == [0, 2, 4]
        assert track_T4[:, 2].tolist() == [20, 22, 24]

    def test_missed_frames_are_filled_from_those_around(self) -> None:
        track_T4 = follow_face([NONE, _box(0), NONE, NONE, NONE, _box(4), NONE])
        assert track_T4[:, 0].tolist() == [0, 0, 1, 2, 3, 4, 4]

    @pytest.mark.parametrize("at", ["start", "middle", "end"])
    def test_a_face_lost_for_too_long_is_told(self, at: str) -> None:
        gap = [NONE] * MOST_MISSING
        faces = {
            "start": [*gap, _box(0)],
            "middle": [_box(0), *gap, _box(0)],
            "end": [_box(0), *gap],
        }[at]
        assert len(follow_face(faces)) == len(faces)
        faces.insert(faces.index(NONE) if at == "start" else 1, NONE)
        with pytest.raises(ImageError, match=f"for {MOST_MISSING + 1} on end there is none"):
            follow_face(faces)

    def test_none_at_all_is_told(self) -> None:
        with pytest.raises(ImageError, match="through all 3 frames"):
            follow_face([NONE] * 3)


class TestSmoothing:
    def test_a_still_face_becomes_a_square_of_its_longer_side(self) -> None:
        track_T4 = torch.tensor([10.0, 20.0, 30.0, 60.0]).repeat(30, 1)
        assert torch.equal(smooth_track(track_T4), torch.tensor([0.0, 20, 40, 60]).repeat(30, 1))

    def test_a_stray_box_is_ignored_and_a_steady_move_kept(self) -> None:
        track_T4 = torch.cat([_box(float(t)) for t in range(40)])
        smooth_T4 = smooth_track(track_T4)
        assert torch.equal(smooth_T4[6:-6], track_T4[6:-6])
        stray_T4 = track_T4.clone()
        stray_T4[20] = _box(500)[0]
        assert (smooth_track(stray_T4) - smooth_T4).abs().max() <= 1


def test_faces_are_cut_out_where_they_are(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "clip.mp4", [(12, 0.25), (8, 0.75)], size=(64, 64))
    clip = Clip(name="clip", path=path, num_frames=20)
    calls = []

    def detect(picture_CHW: Tensor) -> Tensor:
        calls.append(picture_CHW.mean())
        return torch.tensor([[30.0, 30, 50, 50, 1.0]])

    faces_TCHW = cut_faces(clip, detect)
    assert faces_TCHW.shape == (20, 3, 224, 224)
    levels_T = faces_TCHW[:, :, 60:160, 60:160].mean((1, 2, 3))
    assert levels_T.tolist() == pytest.approx([0.25] * 12 + [0.75] * 8, abs=0.02)
    assert cut_faces(clip, detect) is faces_TCHW
    assert len(calls) == 20
