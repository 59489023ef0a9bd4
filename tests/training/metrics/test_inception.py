"""Inception features: one sample per frame; torch-fidelity's network loads the public weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import inception_v3

from training.metrics import inception
from training.metrics.clips import Clip
from training.metrics.inception import WIDTH, InceptionSpace, load_inception
from turbotalk_core.errors import CheckpointError, MissingToolError

from .conftest import MakeVideo, describe

CPU = torch.device("cpu")


@pytest.fixture
def clip(tmp_path: Path, make_video: MakeVideo) -> Clip:
    path = make_video(tmp_path / "clip.mp4", [(18, 0.3)])
    return Clip(name="clip", path=path, num_frames=18)


def test_a_sample_is_a_frame(clip: Clip) -> None:
    samples_ND = InceptionSpace(lambda pictures: describe(pictures, WIDTH), CPU)(clip)
    assert samples_ND.shape == (18, WIDTH)
    assert not torch.allclose(samples_ND[0], samples_ND[9])


def test_another_width_is_refused(clip: Clip) -> None:
    with pytest.raises(CheckpointError, match=r"Inception network returned \(16, 9\)"):
        InceptionSpace(lambda pictures: describe(pictures, 9), CPU)(clip)


@pytest.mark.slow
def test_weights_laid_out_as_the_public_ones_are_taken(clip: Clip, tmp_path: Path) -> None:
    # The public file is torchvision's layout with the 1008 classes of 2015.
    layout = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(layout.state_dict(), tmp_path / "inception.pth")
    short = Clip(name=clip.name, path=clip.path, num_frames=2)
    assert load_inception(tmp_path / "inception.pth", CPU)(short).shape == (2, WIDTH)
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match=r"empty\.pth does not fit"):
        load_inception(tmp_path / "empty.pth", CPU)


def test_without_the_library_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    with pytest.raises(MissingToolError, match=r"pip install -e '\.\[metrics\]'"):
        load_inception(tmp_path / "inception.pth", CPU)
