"""Files of a family of a few thousand random weights; its audio encoder is a fake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.training.tiny_networks import AUDIO_CONFIG, VIDEO_CONFIG
from turbotalk_core.checkpoints.networks import save_adapter, save_dit, save_vae
from turbotalk_core.loading import ADAPTER, AUDIO_ENCODER, TEACHER, VAE
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanModel
from turbotalk_core.types import SoundMoments

SIZE = 48


class LoudnessEncoder:
    """Audio encoder with the loudness of each frame, in two layers of three features."""

    first_kernel = None

    def fingerprint(self) -> str:
        return "5b"

    def encode(
        self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
    ) -> Tensor:
        loudness_T1 = waveform_S[: 640 * num_frames].view(num_frames, 640).abs().mean(1)
        return loudness_T1.view(-1, 1, 1).expand(-1, 2, 3)


def make_networks() -> tuple[WanModel, AudioProjection, WanVAE]:
    """Make transformer, projection and VAE."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WanModel(replace(VIDEO_CONFIG, num_layers=1))
        projection = AudioProjection(AUDIO_CONFIG)
        vae = WanVAE(1)
        vae.initialize()
    return model, projection, vae


def write_family(
    folder: Path, networks: tuple[WanModel, AudioProjection, WanVAE], **settings: Any
) -> None:
    """Write a models folder; the file of the audio encoder has no useful content."""
    model, projection, vae = networks
    shipped = {
        "steps": 2,
        "shift": 3.0,
        "audio_guidance_scale": 2.0,
        "height": SIZE,
        "width": SIZE,
        "chunk_frames": 17,
        "num_motion_frames": 5,
        **settings,
    }
    save_dit(folder / "diffusion_models" / TEACHER, model, shipped)
    save_adapter(folder / "model_patches" / ADAPTER, model, projection, {})
    save_vae(folder / "vae" / VAE, vae, {})
    encoder = folder / "audio_encoders" / AUDIO_ENCODER
    encoder.parent.mkdir()
    save_file({"nothing": torch.zeros(1)}, encoder)
