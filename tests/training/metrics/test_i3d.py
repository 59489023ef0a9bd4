"""I3D features: one sample per span of sixteen frames, with the network's input format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.metrics.clips import Clip
from training.metrics.i3d import WIDTH, I3DSpace, load_i3d
from turbotalk_core.errors import CheckpointError, GeometryError

from .conftest import MakeVideo, save_i3d

CPU = torch.device("cpu")


@pytest.fixture
def clip(tmp_path: Path, make_video: MakeVideo) -> Clip:
    path = make_video(tmp_path / "clip.mp4", [(16, 0.2), (24, 0.8)])
    return Clip(name="clip", path=path, num_frames=40)


def test_whole_spans_are_samples(clip: Clip, tmp_path: Path) -> None:
    save_i3d(tmp_path / "i3d.pt")
    samples_ND = load_i3d(tmp_path / "i3d.pt", CPU)(clip)
    assert samples_ND.shape == (2, WIDTH)
    assert not torch.allclose(samples_ND[0], samples_ND[1])


def test_the_network_is_called_as_published_numbers_are_made(clip: Clip) -> None:
    calls = []

    def network(video_BCTHW: torch.Tensor, **options: bool) -> torch.Tensor:
        calls.append((tuple(video_BCTHW.shape), options, video_BCTHW.max().item()))
        assert video_BCTHW.is_contiguous()
        return torch.zeros(1, WIDTH)

    I3DSpace(network, CPU)(clip)
    (shape, options, most), _ = calls
    assert shape == (1, 3, 16, 32, 48)
    assert options == {"rescale": True, "resize": True, "return_features": True}
    assert 200 < most <= 255


def test_a_clip_shorter_than_a_span_is_told(clip: Clip) -> None:
    short = Clip(name="short", path=clip.path, num_frames=15)
    with pytest.raises(GeometryError, match="short has 15 frames, and a span has 16"):
        I3DSpace(lambda video: video, CPU)(short)


def test_files_of_another_kind_are_refused(clip: Clip, tmp_path: Path) -> None:
    save_i3d(tmp_path / "narrow.pt", width=7)
    with pytest.raises(CheckpointError, match=r"I3D network returned \(1, 7\).*\[1, 400\]"):
        load_i3d(tmp_path / "narrow.pt", CPU)(clip)
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(CheckpointError, match=r"text\.pt is no TorchScript"):
        load_i3d(tmp_path / "text.pt", CPU)
