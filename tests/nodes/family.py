"""A family of small models with random weights, written as files: for what needs no learning."""

from __future__ import annotations

from pathlib import Path

import torch

from tools.benchmark.random_family import TEXT_DIM
from turbotalk_core.audio.wav2vec2 import EncoderConfig, build_audio_encoder
from turbotalk_core.checkpoints.audio_encoder import save_audio_encoder
from turbotalk_core.checkpoints.networks import save_adapter, save_dit, save_vae
from turbotalk_core.loading import ADAPTER, AUDIO_ENCODER, TEACHER, VAE, ModelFiles
from turbotalk_core.models.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanConfig, WanModel

NUM_AUDIO_LAYERS, AUDIO_WIDTH = 2, 16


def write_family(
    models: Path, *, dim: int = 48, audio_width: int = AUDIO_WIDTH, image_dim: int | None = None
) -> ModelFiles:
    """Write the four files under the names of the embedded ones.

    Args:
        models: a folder laid out as ComfyUI's ``models``.
        dim: width of the transformer.
        audio_width: width of the audio encoder.
        image_dim: width of the CLIP tokens, 1280 in ComfyUI; None: no image branch.

    Returns:
        Their paths.
    """
    files = ModelFiles(
        dit=models / "diffusion_models" / TEACHER,
        adapter=models / "model_patches" / ADAPTER,
        audio_encoder=models / "audio_encoders" / AUDIO_ENCODER,
        vae=models / "vae" / VAE,
    )
    for path in (files.dit, files.adapter, files.audio_encoder, files.vae):
        path.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _write_transformer(files, dim, audio_width, image_dim)
        vae = WanVAE(4)
        save_vae(files.vae, vae, {})
    encoder = EncoderConfig(
        hidden_size=audio_width,
        num_hidden_layers=NUM_AUDIO_LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    save_audio_encoder(build_audio_encoder(encoder, seed=0), files.audio_encoder)
    return files


def _write_transformer(
    files: ModelFiles, dim: int, audio_width: int, image_dim: int | None
) -> None:
    # audio heads other than the model's, and a width that neither 128 nor 40 divides
    model = WanModel(
        WanConfig(
            dim=dim,
            ffn_dim=96,
            num_heads=4,
            num_layers=2,
            text_dim=TEXT_DIM,
            image_dim=image_dim,
            audio_heads=2,
            audio_token_dim=24,
        )
    )
    projection = AudioProjection(
        AudioAdapterConfig(
            frame_width=NUM_AUDIO_LAYERS * audio_width, hidden_dim=32, num_tokens=4, token_dim=24
        )
    )
    for module in (model, projection):
        for parameter in module.parameters():
            # far from any initial state: biases, norms and gates all matter
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_dit(files.dit, model, {})
    save_adapter(files.adapter, model, projection, {})
