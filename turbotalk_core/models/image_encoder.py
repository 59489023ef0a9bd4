"""The CLIP image encoder that encodes the reference image for Wan 2.1 image-to-video.

Module names are those of Wan's public checkpoint, without its leading ``visual.``; the names of
Hugging Face, which ComfyUI's files have, are translated. The last block of the ViT, the norm after
it and the head are not used: Wan takes the hidden states before them.

Axes: B batch, C channels, H height, W width, N tokens, D width.
Source: Radford et al., CLIP (2021); Wan 2.1, wan/modules/clip.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..safe_io.tensor_header import MAX_LAYERS

PREFIX = "visual."
HEAD_WIDTH = 80  # ViT-H: 1280 / 16
MAX_SIDE = 2048  # pixels of the square picture; ViT-H takes 224
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
VIT_H = {  # sizes of Wan 2.1's own encoder; the last of its 32 blocks is not used
    "dim": 1280,
    "mlp_dim": 5120,
    "num_heads": 16,
    "num_layers": 31,
    "patch": 14,
    "num_patches": 256,
}
_UNUSED = ("post_norm.", "head")
_BLOCK = r"transformer.\1"
_NAMES = {  # Hugging Face's names to Wan 2.1's own
    r"^vision_model\.embeddings\.class_embedding$": "cls_embedding",
    r"^vision_model\.embeddings\.position_embedding\.weight$": "pos_embedding",
    r"^vision_model\.embeddings\.patch_embedding\.": "patch_embedding.",
    r"^vision_model\.pre_layrnorm\.": "pre_norm.",
    r"^vision_model\.post_layernorm\.": "post_norm.",
    r"^visual_projection\.weight$": "head",
    r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm": f"{_BLOCK}.norm",
    r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.": f"{_BLOCK}.attn.proj.",
    r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.": f"{_BLOCK}.attn.to_qkv.",
    r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.": f"{_BLOCK}.mlp.0.",
    r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.": f"{_BLOCK}.mlp.2.",
}
_QUERY, _KEY_VALUE = ".self_attn.q_proj.", (".self_attn.k_proj.", ".self_attn.v_proj.")


class VisionBlock(nn.Module):
    """Pre-norm transformer block: self-attention among a picture's tokens, then feed-forward."""

    def __init__(self, dim: int, mlp_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"to_qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, hidden_BND: Tensor) -> Tensor:  # noqa: D102
        qkv = self.attn["to_qkv"](self.norm1(hidden_BND)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        hidden_BND = hidden_BND + self.attn["proj"](attended)
        return hidden_BND + self.mlp(self.norm2(hidden_BND))


class ImageEncoder(nn.Module):
    """Vision transformer up to its last block but one; satisfies ``protocols.ImageEncoder``.

    Args:
        dim: width of the tokens.
        mlp_dim: hidden width of the feed-forward layers.
        num_heads: attention heads.
        num_layers: blocks, without the unused last one.
        patch: side of a patch, pixels.
        num_patches: patches of a picture, a square number.

    Attributes:
        side: side of the square input picture, pixels.
    """

    def __init__(
        self,
        *,
        dim: int,
        mlp_dim: int,
        num_heads: int,
        num_layers: int,
        patch: int,
        num_patches: int,
    ) -> None:
        super().__init__()
        self.side = patch * math.isqrt(num_patches)
        self.patch_embedding = nn.Conv2d(3, dim, patch, stride=patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 1 + num_patches, dim))
        self.pre_norm = nn.LayerNorm(dim)
        self.transformer = nn.Sequential(
            *(VisionBlock(dim, mlp_dim, num_heads) for _ in range(num_layers))
        )

    def prepare(self, image_BCHW: Tensor) -> Tensor:
        """Resize a picture to the encoder's square and normalise it by CLIP's pixel statistics.

        Args:
            image_BCHW: picture in [-1, 1], any size; its aspect ratio is not kept.

        Returns:
            [B, 3, side, side].
        """
        size = (self.side, self.side)
        squashed = F.interpolate(image_BCHW, size, mode="bicubic", align_corners=False)
        # One copy, which waits for the device, per picture.
        statistics_2C = torch.tensor((PIXEL_MEAN, PIXEL_STD)).to(squashed)
        mean, std = statistics_2C.view(2, 3, 1, 1)
        return ((squashed + 1) / 2 - mean) / std

    @torch.no_grad()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Encode a picture.

        Args:
            image_BCHW: picture in [-1, 1], any size.

        Returns:
            Image tokens, [B, 1 + patches, D], float32 on the CPU; the class token is the first.
        """
        # The picture to the device and its tokens back: two waits per picture.
        prepared = self.prepare(image_BCHW.to(self.cls_embedding))
        patches_BND = self.patch_embedding(prepared).flatten(2).transpose(1, 2)
        start_BND = self.cls_embedding.expand(image_BCHW.shape[0], -1, -1)
        hidden_BND = torch.cat((start_BND, patches_BND), 1) + self.pos_embedding
        return self.transformer(self.pre_norm(hidden_BND)).to("cpu", torch.float32)


def build_image_encoder(
    weights: Mapping[str, Tensor], num_heads: int | None = None
) -> ImageEncoder:
    """Build an image encoder from the tensors of a checkpoint.

    Args:
        weights: tensors by Wan's names, with ``visual.`` or without, or by Hugging Face's. The last
            block, the norm after it and the head are ignored; if any name begins with ``visual.``,
            so are all others.
        num_heads: attention heads; None for heads of width 80, as in the released encoder.

    Returns:
        The encoder, float32, in evaluation mode.

    Raises:
        CheckpointError: if tensors are missing or of another shape.
    """
    if any(name.startswith(PREFIX) for name in weights):
        weights = {
            name.removeprefix(PREFIX): t for name, t in weights.items() if name.startswith(PREFIX)
        }
    try:
        if any(name.startswith("vision_model.") for name in weights):
            weights = _rename(weights)
        dim, _, patch, _ = weights["patch_embedding.weight"].shape
        blocks = {int(name.split(".")[1]) for name in weights if name.startswith("transformer.")}
        last = len(blocks) - 1
        num_patches = weights["pos_embedding"].shape[1] - 1
        side = patch * math.isqrt(num_patches)
        heads = num_heads or dim // HEAD_WIDTH
        if heads < 1 or dim % heads:
            raise ValueError(f"{heads} attention heads do not divide its width of {dim}")
        if last not in blocks or last > MAX_LAYERS:
            raise ValueError(f"its blocks are not numbered from 0 to at most {MAX_LAYERS}")
        if num_patches != math.isqrt(num_patches) ** 2 or not 0 < side <= MAX_SIDE:
            raise ValueError(f"{num_patches} patches of {patch} pixels make no square picture")
        with torch.device("meta"):
            encoder = ImageEncoder(
                dim=dim,
                mlp_dim=weights["transformer.0.mlp.0.weight"].shape[0],
                num_heads=heads,
                num_layers=last,
                patch=patch,
                num_patches=num_patches,
            )
        unused = (*_UNUSED, f"transformer.{last}.")
        used = {name: t.float() for name, t in weights.items() if not name.startswith(unused)}
        encoder.load_state_dict(used, assign=True)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"this is no complete CLIP image encoder ({error}); get Wan 2.1's own, "
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14, or ComfyUI's clip_vision_h"
        ) from error
    return encoder.requires_grad_(False).eval()


def _rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        if any(part in name for part in _KEY_VALUE) or name.endswith(".position_ids"):
            continue
        if _QUERY in name:  # Wan has one matrix for query, key and value
            others = [weights[name.replace(_QUERY, part)] for part in _KEY_VALUE]
            tensor = torch.cat((tensor, *others))
        for old, new in _NAMES.items():
            name = re.sub(old, new, name)
        renamed[name] = tensor
    renamed["cls_embedding"] = renamed["cls_embedding"].reshape(1, 1, -1)
    renamed["pos_embedding"] = renamed["pos_embedding"].unsqueeze(0)
    return renamed
