"""Small videos, small models and small prepared sets, made from nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor

from training.data.precompute import EncoderFiles
from turbotalk_core.audio.wav2vec2 import EncoderConfig, build_audio_encoder
from turbotalk_core.checkpoints.audio_encoder import save_audio_encoder
from turbotalk_core.checkpoints.networks import save_vae
from turbotalk_core.geometry import FPS
from turbotalk_core.model.vae import WanVAE
from turbotalk_core.types import Waveform
from turbotalk_core.video.assemble import assemble

RATE = 16_000


def hum(seconds: float, pitch: float = 220.0) -> Tensor:
    """A tone that swells and fades, [S]."""
    times_S = torch.arange(round(RATE * seconds)) / RATE
    return 0.3 * (0.2 + torch.sin(3 * times_S) ** 2) * torch.sin(2 * torch.pi * pitch * times_S)


class MakeVideo(Protocol):
    """Writes a video."""

    def __call__(
        self,
        path: Path,
        scenes: list[tuple[int, float]],
        *,
        size: tuple[int, int] = (32, 48),
        sound_S: Tensor | None = None,
        is_mute: bool = False,
    ) -> Path:
        """Write scenes, each of so many frames and of one grey level, with a moving square."""
        ...


@pytest.fixture(scope="session")
def make_video() -> MakeVideo:
    def make(
        path: Path,
        scenes: list[tuple[int, float]],
        *,
        size: tuple[int, int] = (32, 48),
        sound_S: Tensor | None = None,
        is_mute: bool = False,
    ) -> Path:
        frames = []
        for count, level in scenes:
            shot_THWC = torch.full((count, *size, 3), level)
            for t in range(count):
                shot_THWC[t, 4:10, 4 + t % 20 : 10 + t % 20] = 1 - level
            frames.append((shot_THWC * 255).round().to(torch.uint8))
        video_THWC = torch.cat(frames)
        if sound_S is None:
            sound_S = hum(len(video_THWC) / FPS)
        waveform = Waveform(samples_CS=sound_S.unsqueeze(0), sample_rate=RATE)
        path.parent.mkdir(parents=True, exist_ok=True)
        assemble(path, [video_THWC], None if is_mute else waveform, crf=10)
        return path

    return make


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> EncoderFiles:
    """A random VAE and a random audio encoder, as small as they get."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = WanVAE(1)
        vae.initialize()
    save_vae(folder / "vae.safetensors", vae, {})
    config = EncoderConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    save_audio_encoder(build_audio_encoder(config, seed=0), folder / "encoder.safetensors")
    return EncoderFiles(vae=folder / "vae.safetensors", audio=folder / "encoder.safetensors")


@pytest.fixture
def count_lines() -> Callable[[Path], int]:
    """Counts the lines of all journals of a folder."""
    return lambda folder: sum(
        len(path.read_text().splitlines()) for path in folder.glob("items-*.jsonl")
    )
