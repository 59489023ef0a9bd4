"""The core's networks, built from the reference's small weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.golden.figures import Golden, recipe
from turbotalk_core.checkpoints.networks import PROJECTION_PREFIX
from turbotalk_core.geometry import FIRST_WINDOW
from turbotalk_core.models.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanConfig, WanModel


def build_dit(weights: Golden) -> tuple[WanModel, AudioProjection]:
    """Build the transformer with its audio attention, and the projection.

    Without tensors they are drawn by the recipe.
    """
    config = weights.settings["config"]
    assert (config["window"], config["vae_scale"]) == (FIRST_WINDOW, 4), "fixed by Wan's VAE"
    model = WanModel(
        WanConfig(
            dim=config["dim"],
            ffn_dim=config["ffn"],
            num_heads=config["heads"],
            num_layers=config["layers"],
            text_dim=config["text_dim"],
            image_dim=config["clip_dim"],
            audio_heads=config["heads"],
            audio_token_dim=config["out"],
        )
    )
    heard = {k for k in weights.tensors if k.startswith(PROJECTION_PREFIX)}
    load(model, {k: t for k, t in weights.tensors.items() if k not in heard})
    projection = build_projection(config)
    load(projection, weights.under(PROJECTION_PREFIX), PROJECTION_PREFIX)
    return model, projection


def build_projection(config: dict[str, Any]) -> AudioProjection:
    """Build the projection, as torch draws it."""
    return AudioProjection(
        AudioAdapterConfig(
            frame_width=config["blocks"] * config["channels"],
            hidden_dim=config["inter"],
            num_tokens=config["tokens"],
            token_dim=config["out"],
        )
    )


def build_vae(weights: Golden) -> WanVAE:
    """Build the codec."""
    vae = WanVAE(weights.settings["config"]["dim"])
    load(vae, weights.tensors)
    return vae


def load(module: nn.Module, tensors: dict[str, Tensor], prefix: str = "") -> None:
    """Give a module its weights; without tensors they are drawn by the recipe."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    drawn = {} if tensors else {name: recipe(prefix + name, s) for name, s in shapes.items()}
    module.load_state_dict(tensors or drawn)  # names and shapes must be exactly these
    module.requires_grad_(False).eval()
