"""Complete family of very small networks with random weights, and inputs for them."""

import resource
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.family import (
    CONFIG,
    ENCODER_CONFIG,
    NUM_FRAMES,
    PROJECTION_CONFIG,
    SHIPPED,
    build_dit,
    seeded,
    write_family,
)
from turbotalk_core.audio.wav2vec2 import build_audio_encoder
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.vae import WanVAE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models folder in ComfyUI's layout."""
    folder = tmp_path_factory.mktemp("models")
    with seeded():
        model = build_dit(CONFIG)
        networks = model, AudioProjection(PROJECTION_CONFIG), WanVAE(4)
    with torch.no_grad():
        for weight in model.text_embedding.parameters():  # so that a prompt shows in 8 bits
            weight *= 20
    write_family(folder, networks, SHIPPED, build_audio_encoder(ENCODER_CONFIG, seed=0))
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Folder with a portrait and a voice."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 40, 3), dtype=np.uint8)).save(folder / "face.png")
    samples = rng.integers(-9000, 9000, NUM_FRAMES * 640 + 300, dtype=np.int16)
    with wave.open(str(folder / "voice.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return folder


@pytest.fixture
def small_files_only():
    """Limit on file size of 40 kB: the system refuses to write more, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
