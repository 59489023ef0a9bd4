"""Small transformer of the reference, and its output for one input."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from turbotalk_core.checkpoints.networks import PROJECTION_PREFIX
from turbotalk_core.models.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.models.wan import WanConfig, WanModel

DATA = Path(__file__).parents[2] / "golden" / "data"
DIT_CONFIG = WanConfig(
    dim=64,
    ffn_dim=96,
    num_heads=4,
    num_layers=2,
    text_dim=32,
    image_dim=32,
    audio_heads=4,
    audio_token_dim=24,
)
PROJECTION_CONFIG = AudioAdapterConfig(
    frame_width=12 * 8, hidden_dim=16, num_tokens=8, token_dim=24
)


@pytest.fixture(scope="session")
def dit_weights() -> dict[str, Tensor]:
    """Transformer, audio attention and projection under their public names."""
    return load_file(DATA / "dit_weights.safetensors")


@pytest.fixture(scope="session")
def dit_io() -> dict[str, Tensor]:
    return load_file(DATA / "dit_single.safetensors")


@pytest.fixture
def dit(dit_weights: dict[str, Tensor]) -> WanModel:
    model = WanModel(DIT_CONFIG)
    model.load_state_dict(
        {k: t for k, t in dit_weights.items() if not k.startswith(PROJECTION_PREFIX)}
    )
    return model


@pytest.fixture
def projection(dit_weights: dict[str, Tensor]) -> AudioProjection:
    projection = AudioProjection(PROJECTION_CONFIG)
    projection.load_state_dict(
        {
            key.removeprefix(PROJECTION_PREFIX): tensor
            for key, tensor in dit_weights.items()
            if key.startswith(PROJECTION_PREFIX)
        }
    )
    return projection
