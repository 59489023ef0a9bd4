"""A talking model of a few thousand weights and chunks for it, for tests of the training."""

from __future__ import annotations

import torch
from torch import Tensor

from training.batch import Batch
from training.networks import TalkingModel
from turbotalk_core.model.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.model.wan import WanConfig, WanModel

FRAMES, ROWS, COLUMNS = 4, 4, 6
TEXT_WIDTH = 8


def make_model(seed: int = 0, num_layers: int = 2) -> TalkingModel:
    """Draw a model whose every weight, gate and shift says something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dit = WanModel(
            WanConfig(
                dim=24,
                ffn_dim=16,
                num_heads=2,
                num_layers=num_layers,
                text_dim=TEXT_WIDTH,
                frequency_dim=16,
                image_dim=None,
                audio_heads=2,
                audio_token_dim=6,
            )
        )
        projection = AudioProjection(
            AudioAdapterConfig(frame_width=6, hidden_dim=8, num_tokens=2, token_dim=6)
        )
    return TalkingModel(dit, projection)


def make_batch(size: int = 2, seed: int = 0, num_pinned: tuple[int, ...] = (1, 3)) -> Batch:
    """Draw chunks; as many first latents of each are pinned as ``num_pinned`` says in turn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pinned_B = torch.tensor([num_pinned[i % len(num_pinned)] for i in range(size)])
    return Batch(
        latents_BCFHW=draw(size, 16, FRAMES, ROWS, COLUMNS),
        reference_BCFHW=draw(size, 20, FRAMES, ROWS, COLUMNS),
        first_BPKLD=draw(size, 1, 5, 2, 3),
        later_BPFKLD=draw(size, 1, FRAMES - 1, 8, 2, 3),
        pinned_BF=torch.arange(FRAMES) < pinned_B[:, None],
        text_BND=draw(size, 5, TEXT_WIDTH),
        null_text_BND=draw(size, 3, TEXT_WIDTH),
    )
