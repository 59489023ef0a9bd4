"""A small transformer with its audio adapter, and files of both to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.family import make_config
from turbotalk_core.models.audio_adapter import AudioAdapterConfig

CONFIG = make_config(ffn_dim=20, num_layers=2, image_dim=10, audio_heads=4, audio_token_dim=6)
PROJECTION = AudioAdapterConfig(frame_width=2 * 7, hidden_dim=9, num_tokens=3, token_dim=6)
SETTINGS = {"kind": "student", "steps": 4, "shift": 5.0}


def draw(module: nn.Module) -> None:
    """Give every weight a value that float16 has to round."""
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)


def rewrite(
    path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    metadata: dict[str, str] | None = None,
) -> None:
    """Change a file's tensors, and replace its metadata where some are given."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file(change(load_file(path)), path, old if metadata is None else metadata)
