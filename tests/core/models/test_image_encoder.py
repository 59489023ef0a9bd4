"""The image encoder's file, and pictures of any shape."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from turbotalk_core.errors import CheckpointError
from turbotalk_core.models.image_encoder import build_image_encoder
from turbotalk_core.protocols import ImageEncoder

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual.transformer.999999999.norm1.bias": (32,)}, "not numbered from 0"),
        ({"visual.transformer.-1.norm1.bias": (32,)}, "not numbered from 0"),
        ({"visual.transformer.x.norm1.bias": (32,)}, "invalid literal"),
        ({"visual.pos_embedding": (1, 256, 32)}, "255 patches of 14 pixels make no square"),
        ({"visual.pos_embedding": (32,)}, "index out of range"),
        ({"visual.pos_embedding": (1, 1, 32)}, "0 patches of 14"),
        ({"visual.pos_embedding": (1, 1 + 147**2, 32)}, "21609 patches of 14 pixels"),  # 2058 wide
        ({"visual.patch_embedding.weight": (31, 3, 14, 14)}, "do not divide its width of 31"),
        ({"visual.patch_embedding.weight": (32, 3)}, "not enough values"),
    ],
)
def test_a_network_that_cannot_be_is_refused(
    weights: dict[str, Tensor], changes: dict[str, tuple[int, ...]], message: str
) -> None:
    weights |= {name: torch.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(CheckpointError, match=f"no complete CLIP image encoder.*{message}"):
        build_image_encoder(weights, 4)


def test_the_files_of_hugging_face_give_the_states_before_the_last_block() -> None:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = CLIPVisionModelWithProjection(config).eval()
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        image = torch.rand(1, 3, 20, 30) * 2 - 1
    weights = {**theirs.state_dict(), "vision_model.embeddings.position_ids": torch.arange(5)[None]}
    encoder = build_image_encoder(weights, 4)
    with torch.no_grad():
        states = theirs(pixel_values=encoder.prepare(image), output_hidden_states=True)
    torch.testing.assert_close(encoder(image), states.hidden_states[-2])
    del weights["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match="no complete CLIP image encoder"):
        build_image_encoder(weights, 4)
