"""The text encoder's file: both spellings, and what is missing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from turbotalk_core.errors import CheckpointError
from turbotalk_core.model.text_encoder import build_text_encoder

FIGURES = Path(__file__).parents[2] / "golden" / "data" / "t5_tiny.safetensors"


@pytest.fixture(scope="module")
def figures() -> dict[str, Tensor]:
    return load_file(FIGURES)


@pytest.fixture
def weights(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[2:]: tensor for name, tensor in figures.items() if name.startswith("w.")}


def test_both_spellings_are_one_network(
    figures: dict[str, Tensor], weights: dict[str, Tensor]
) -> None:
    encoder = build_text_encoder(weights)
    respelt = {
        name: tensor.clone()
        for name, tensor in encoder.model.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }
    respelt["spiece_model"] = torch.zeros(3, dtype=torch.uint8)
    told = figures["ids"], figures["mask"]
    assert torch.equal(build_text_encoder(respelt)(*told), encoder(*told))


def test_padding_is_not_attended_to(figures: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    encoder = build_text_encoder(weights)
    ids, mask = figures["ids"], figures["mask"]
    other = torch.where(mask.bool(), ids, ids + 1)
    tokens = mask.bool()
    torch.testing.assert_close(encoder(other, mask)[tokens], encoder(ids, mask)[tokens])


@pytest.mark.parametrize(
    "name", ["token_embedding.weight", "blocks.0.pos_embedding.embedding.weight", "norm.weight"]
)
def test_a_missing_tensor_is_refused(weights: dict[str, Tensor], name: str) -> None:
    del weights[name]
    with pytest.raises(CheckpointError, match="no complete umT5"):
        build_text_encoder(weights)


def test_an_unknown_tensor_is_refused(weights: dict[str, Tensor]) -> None:
    weights["blocks.0.attn.q.scale_weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"q\.scale_weight"):
        build_text_encoder(weights)
