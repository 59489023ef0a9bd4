"""Tiny networks with the interfaces that the metrics need, and clips for them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.data.conftest import MakeVideo, make_video
from training.metrics import evaluation, i3d, inception, syncnet, weights
from training.metrics.inception import InceptionSpace

__all__ = ["MakeVideo", "make_video"]


def describe(pictures_NCHW: Tensor, width: int) -> Tensor:
    """Compute fixed random features of pictures in [0, 255] that ignore positions."""
    generator = torch.Generator().manual_seed(0)
    small = nn.functional.adaptive_avg_pool2d(pictures_NCHW.float() / 255, 4).flatten(1)
    return small @ torch.randn(small.shape[1], width, generator=generator)


class TinyI3D(nn.Module):
    """Tiny network with the interface of the public I3D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixing = nn.Linear(6, width)

    def forward(
        self,
        video_BCTHW: Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> Tensor:
        assert rescale
        assert resize
        assert return_features
        pixels = video_BCTHW / 255
        return self.mixing(torch.cat((pixels.mean((2, 3, 4)), pixels.std((2, 3, 4))), 1))


def save_i3d(path: Path, width: int = i3d.WIDTH) -> None:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is what the public one is
        torch.manual_seed(0)
        torch.jit.script(TinyI3D(width)).save(path)


class MiddleFace(nn.Module):
    """Face detector with a box in the middle of every picture that is not black."""

    def forward(self, picture_CHW: Tensor) -> Tensor:
        height, width = picture_CHW.shape[1:]
        score = (picture_CHW.mean() > 0.1).float()
        sides = torch.tensor([0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height])
        return torch.cat((sides, score[None]))[None]


class Brightness(nn.Module):
    """Expression regressor with three numbers per face."""

    def forward(self, faces_TCHW: Tensor) -> Tensor:
        return torch.stack(
            (
                faces_TCHW.mean((1, 2, 3)),
                faces_TCHW[..., :112].mean((1, 2, 3)),
                faces_TCHW[..., :112, :].mean((1, 2, 3)),
            ),
            1,
        )


def save_program(module: nn.Module, example: Tensor, path: Path, sides: dict[int, object]) -> None:
    program = torch.export.export(module, (example,), dynamic_shapes=(sides,))
    torch.export.save(program, path)


@pytest.fixture(scope="session")
def all_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny or random network under each name."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / weights.INCEPTION).write_bytes(b"what it holds is the library's business")
    save_i3d(folder / weights.I3D)
    (folder / weights.SYNCNET).write_bytes(b"and this SyncNet's own")
    dynamic = torch.export.Dim.DYNAMIC
    save_program(
        MiddleFace(), torch.rand(3, 40, 50), folder / weights.FACE, {1: dynamic, 2: dynamic}
    )
    save_program(
        Brightness(), torch.rand(4, 3, 224, 224), folder / weights.EXPRESSION, {0: dynamic}
    )
    return folder


def judge_brightness(faces_TCHW: Tensor, waveform_S: Tensor) -> tuple[Tensor, Tensor]:
    """Embed brightness and loudness, for as many windows as SyncNet has."""
    num_windows = len(faces_TCHW) - syncnet.WINDOW_FRAMES
    video = faces_TCHW[:num_windows].mean((1, 2, 3))
    audio = waveform_S.view(-1, 640)[:num_windows].square().mean(1).sqrt()
    return video[:, None].repeat(1, syncnet.WIDTH), audio[:, None].repeat(1, syncnet.WIDTH)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacement of the public files by other files, and of large networks by tiny ones."""
    known = {name: replace(file, sha256=None) for name, file in weights.KNOWN_FILES.items()}
    monkeypatch.setattr(weights, "KNOWN_FILES", known)
    monkeypatch.setattr(
        evaluation,
        "load_inception",
        lambda path, device: InceptionSpace(
            lambda pictures: describe(pictures, inception.WIDTH), device
        ),
    )
    monkeypatch.setattr(evaluation, "load_syncnet", lambda path, device: judge_brightness)
