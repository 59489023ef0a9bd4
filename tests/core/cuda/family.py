"""Model files of the full sizes, which have a header and no weights, and videos made with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.fake_cuda import write_unread
from turbotalk_core.benchmark.report import FULL_REQUEST, FULL_SIZES, Sizes
from turbotalk_core.checkpoints.networks import PROJECTION_PREFIX
from turbotalk_core.loading import ModelFiles
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.image_encoder import ImageEncoder
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanModel
from turbotalk_core.request import TalkRequest

LORA_RANK = 32


def make_sizes(num_layers: int) -> Sizes:
    """Return the sizes of Wan2.1-I2V-14B with InfiniteTalk, with fewer blocks."""
    return replace(FULL_SIZES, transformer=replace(FULL_SIZES.transformer, num_layers=num_layers))


def make_request(**changes: Any) -> TalkRequest:
    """Return the request of ``bench --model 14b``, with changes."""
    return replace(FULL_REQUEST, **changes)


def write_files(folder: Path, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> ModelFiles:
    """Write the files of a family without weights, CLIP included."""
    with torch.device("meta"):
        model, vae = WanModel(sizes.transformer), WanVAE(sizes.vae_width)
        projection = AudioProjection(sizes.projection)
        clip = ImageEncoder(
            dim=1280, mlp_dim=5120, num_heads=16, num_layers=32, patch=14, num_patches=256
        )
    weights = model.to(dtype).state_dict()
    audio = {key: weights.pop(key) for key in list(weights) if ".audio_" in key or "norm_x" in key}
    audio |= {PROJECTION_PREFIX + key: w for key, w in projection.to(dtype).state_dict().items()}
    visual = {f"visual.{key}": weight for key, weight in clip.half().state_dict().items()}
    return ModelFiles(
        dit=write_unread(folder / "dit.safetensors", weights),
        adapter=write_unread(folder / "adapter.safetensors", audio),
        audio_encoder=folder / "none",
        vae=write_unread(folder / "vae.safetensors", vae.state_dict()),
        image_encoder=write_unread(folder / "clip.safetensors", visual),
    )
