"""Expression features: one sample per face, with any width of the regressor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.data.scores import load_program
from training.metrics.clips import Clip
from training.metrics.expression import ExpressionSpace
from training.metrics.weights import EXPRESSION
from turbotalk_core.errors import CheckpointError

from .conftest import Brightness, MakeVideo, MiddleFace


@pytest.fixture
def clip(tmp_path: Path, make_video: MakeVideo) -> Clip:
    path = make_video(tmp_path / "clip.mp4", [(20, 0.3)])
    return Clip(name="clip", path=path, num_frames=20)


def test_a_sample_is_a_face(clip: Clip) -> None:
    samples_ND = ExpressionSpace(Brightness(), MiddleFace())(clip)
    assert samples_ND.shape == (20, 3)
    assert samples_ND[:, 0].mean() == pytest.approx(0.3, abs=0.05)


def test_an_exported_program_is_never_shown_a_single_face(clip: Clip, all_weights: Path) -> None:
    regressor = load_program(all_weights / EXPRESSION)
    odd = Clip(name=clip.name, path=clip.path, num_frames=17)
    samples_ND = ExpressionSpace(regressor, MiddleFace())(odd)
    torch.testing.assert_close(samples_ND, ExpressionSpace(Brightness(), MiddleFace())(odd))


def test_another_form_is_refused(clip: Clip) -> None:
    with pytest.raises(CheckpointError, match=r"regressor returned \(10,\).*\[10, any\]"):
        ExpressionSpace(lambda faces_TCHW: torch.zeros(len(faces_TCHW)), MiddleFace())(clip)
