"""Counted memory against closed forms, and on the meta device against a real one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from turbotalk_core.benchmark.memory import count_memory
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanConfig, WanModel

DEVICES = ("cpu", "meta")


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_alive_together_is_added_up(device: str) -> None:
    with torch.device(device):
        layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 16))
        count = count_memory(layers, lambda: layers(torch.zeros(10, 4)))
    assert count == 4 * (10 * 4 + 10 * 8 + 10 * 16)  # not the weights, in float32


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_given_back_is_not_counted_again(device: str) -> None:
    layer = nn.Identity()

    def call(repeats: int) -> None:
        for _ in range(repeats):
            torch.zeros(1000, device=device)

    assert count_memory(layer, lambda: call(1)) == 4000
    assert count_memory(layer, lambda: call(5)) == 4000


def test_views_and_writing_in_place_take_nothing() -> None:
    def call() -> Tensor:
        return torch.zeros(10, 10).view(100)[5:].add_(1).reshape(5, 19)

    assert count_memory(nn.Identity(), call) == 400


def test_weights_are_there_before_even_as_views() -> None:
    layer = nn.Linear(100, 100)
    assert count_memory(layer, lambda: layer.weight.flatten().add(1)) == 40_000


def test_attention_is_counted_without_its_scores() -> None:
    def call() -> Tensor:
        query = torch.zeros(1, 2, 5000, 8, device="meta")
        return nn.functional.scaled_dot_product_attention(query, query, query)

    assert count_memory(nn.Identity(), call) == 2 * 4 * 2 * 5000 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformer_takes_what_the_meta_device_tells(dtype: torch.dtype) -> None:
    config = WanConfig(
        dim=64, ffn_dim=160, num_heads=4, num_layers=2, text_dim=16, image_dim=24, audio_heads=2,
        audio_token_dim=12,
    )  # fmt: skip
    counts = []
    for device in DEVICES:
        with torch.device(device):
            model = WanModel(config).to(dtype)

            def call(model: WanModel = model) -> Tensor:
                return model(
                    torch.zeros(1, 16, 3, 8, 12),
                    torch.zeros(1),
                    torch.zeros(1, 20, 3, 8, 12),
                    text_BND=torch.zeros(1, 5, 16),
                    image_embeds_BND=torch.zeros(1, 7, 24),
                    audio_BFND=torch.zeros(1, 3, 4, 12),
                )

            counts.append(count_memory(model, call))
    assert counts[0] == counts[1] > 3 * 4 * 6 * 160 * dtype.itemsize


def test_a_vae_takes_what_the_meta_device_tells() -> None:
    counts = []
    for device in DEVICES:
        with torch.device(device):
            vae = WanVAE(2)
            encode = count_memory(vae, lambda v=vae: v.encode(torch.zeros(1, 3, 9, 32, 32)))
            decode = count_memory(vae, lambda v=vae: v.decode(torch.zeros(1, 16, 3, 4, 4)))
        counts.append((encode, decode))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 4 * 3 * 9 * 32 * 32
