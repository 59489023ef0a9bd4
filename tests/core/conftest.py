"""Complete family of very small networks with random weights, and inputs for them."""

import resource
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.core.family import CONFIG, ENCODER_CONFIG, NUM_FRAMES, SHIPPED, build_dit
from turbotalk_core.audio.wav2vec2 import build_audio_encoder
from turbotalk_core.checkpoints.audio_encoder import save_audio_encoder
from turbotalk_core.checkpoints.networks import save_adapter, save_dit, save_vae
from turbotalk_core.loading import TEACHER
from turbotalk_core.models.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.models.vae import WanVAE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models folder in ComfyUI's layout."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("diffusion_models", "model_patches", "audio_encoders", "vae"):
        (folder / name).mkdir()
    encoder = build_audio_encoder(ENCODER_CONFIG, seed=0)
    save_audio_encoder(encoder, folder / "audio_encoders" / "turbotalk_tiny_wav2vec2.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_dit(CONFIG)
        projection = AudioProjection(
            AudioAdapterConfig(frame_width=2 * 16, hidden_dim=8, num_tokens=2, token_dim=16)
        )
        vae = WanVAE(4)
    with torch.no_grad():
        for weight in model.text_embedding.parameters():  # so that a prompt shows in 8 bits
            weight *= 20
    save_dit(folder / "diffusion_models" / TEACHER, model, SHIPPED)
    save_adapter(
        folder / "model_patches" / "turbotalk_tiny_adapter.safetensors", model, projection, {}
    )
    save_vae(folder / "vae" / "turbotalk_tiny_vae.safetensors", vae, {})
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
