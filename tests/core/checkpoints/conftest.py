"""Small networks, and files that were written from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.checkpoints.small import CONFIG, PROJECTION, SETTINGS, draw
from turbotalk_core.checkpoints.networks import save_adapter, save_dit, save_vae
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanModel


@pytest.fixture(scope="module")
def model() -> WanModel:
    model = WanModel(CONFIG)
    draw(model)
    return model


@pytest.fixture(scope="module")
def projection() -> AudioProjection:
    projection = AudioProjection(PROJECTION)
    draw(projection)
    return projection


@pytest.fixture
def dit_path(tmp_path: Path, model: WanModel) -> Path:
    path = tmp_path / "dit.safetensors"
    save_dit(path, model, SETTINGS)
    return path


@pytest.fixture
def adapter_path(tmp_path: Path, model: WanModel, projection: AudioProjection) -> Path:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, model, projection, {"family": "tiny"})
    return path


@pytest.fixture
def vae_path(tmp_path: Path) -> Path:
    path = tmp_path / "vae.safetensors"
    vae = WanVAE(2)
    draw(vae)
    save_vae(path, vae, {"seed": 3})
    return path
