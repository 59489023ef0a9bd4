"""Random weights of the released sizes, as files that ComfyUI's own nodes load as well.

ComfyUI's InfiniteTalk node loads only adapters of the released sizes, so the comparison and the
tests of the nodes need a family with these sizes that is otherwise small.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from turbotalk_core.checkpoints.networks import save_dit
from turbotalk_core.models.wan import WanConfig, WanModel

TEXT_DIM = 16
RELEASED_SIZES = "released_sizes.safetensors"  # file name of the transformer and of the adapter


def write_released_sizes(
    models: Path, *, dim: int = 80, ffn_dim: int = 64, num_heads: int = 10, num_layers: int = 2
) -> None:
    """Write an adapter that ComfyUI's own nodes load as well, and a transformer for it.

    ComfyUI requires 40 blocks, 40 heads, 32 tokens and 12 x 768 values per frame of the adapter;
    the transformer may have fewer blocks.

    Args:
        models: folder laid out as ComfyUI's ``models``.
        dim: width of the transformer, a multiple of 40.
        ffn_dim: width of its feed-forward networks.
        num_heads: heads of its self-attention.
        num_layers: number of its blocks.
    """
    token_dim, hidden_dim = 4, 8
    shapes = {
        "audio_proj.proj1": (hidden_dim, 5 * 12 * 768),
        "audio_proj.proj1_vf": (hidden_dim, 8 * 12 * 768),
        "audio_proj.proj2": (hidden_dim, hidden_dim),
        "audio_proj.proj3": (32 * token_dim, hidden_dim),
        "audio_proj.norm": (token_dim,),
    }
    for index in range(40):
        shapes |= {
            f"blocks.{index}.audio_cross_attn.q_linear": (dim, dim),
            f"blocks.{index}.audio_cross_attn.kv_linear": (2 * dim, token_dim),
            f"blocks.{index}.audio_cross_attn.proj": (dim, dim),
            f"blocks.{index}.norm_x": (dim,),
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = {}
        for name, shape in shapes.items():
            tensors[f"{name}.weight"] = (0.2 * torch.randn(shape)).half()
            tensors[f"{name}.bias"] = (0.2 * torch.randn(shape[0])).half()
        model = WanModel(
            WanConfig(
                dim=dim,
                ffn_dim=ffn_dim,
                num_heads=num_heads,
                num_layers=num_layers,
                text_dim=TEXT_DIM,
                image_dim=None,
                audio_heads=None,
            )
        )
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    for folder in ("model_patches", "diffusion_models"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    metadata = {"config": json.dumps({"audio_heads": 40})}
    save_file(tensors, models / "model_patches" / RELEASED_SIZES, metadata)
    save_dit(models / "diffusion_models" / RELEASED_SIZES, model, {})
