"""The image encoder's file, and pictures of any shape."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from turbotalk_core.errors import CheckpointError
from turbotalk_core.model.image_encoder import build_image_encoder
from turbotalk_core.ports import ImageEncoder

FIGURES = Path(__file__).parents[2] / "golden" / "data" / "clip_tiny.safetensors"


@pytest.fixture
def weights() -> dict[str, Tensor]:
    figures = load_file(FIGURES)
    return {name[2:]: tensor for name, tensor in figures.items() if name.startswith("w.")}


def test_the_prefix_and_what_is_not_used_change_nothing(weights: dict[str, Tensor]) -> None:
    image = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder: ImageEncoder = build_image_encoder(weights, 4)
    used = {
        name.removeprefix("visual."): tensor
        for name, tensor in weights.items()
        if "head" not in name and "post_norm" not in name
    }
    assert torch.equal(build_image_encoder(used, 4)(image), encoder(image))
    textual = weights | {"textual.token_embedding.weight": torch.zeros(2)}
    assert torch.equal(build_image_encoder(textual, 4)(image), encoder(image))


def test_the_shape_of_a_picture_is_not_kept(weights: dict[str, Tensor]) -> None:
    encoder = build_image_encoder(weights, 4)
    for size in ((20, 30), (300, 16)):
        tokens_BND = encoder(torch.full((2, 3, *size), 0.5))
        assert tokens_BND.shape == (2, 257, 32)
        torch.testing.assert_close(tokens_BND[0], encoder(torch.full((1, 3, 224, 224), 0.5))[0])


@pytest.mark.parametrize(
    "name",
    ["visual.patch_embedding.weight", "visual.pos_embedding", "visual.transformer.1.norm1.bias"],
)
def test_a_missing_tensor_is_refused(weights: dict[str, Tensor], name: str) -> None:
    del weights[name]
    with pytest.raises(CheckpointError, match="no complete CLIP image encoder"):
        build_image_encoder(weights, 4)
