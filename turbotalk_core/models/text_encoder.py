"""The umT5 text encoder that encodes prompts for Wan 2.1, for programs without ComfyUI.

The network is that of the transformers library, whose output equals the reference's. This file
translates the tensor names of the public checkpoints and splits prompts into tokens.

Axes: B batch, N tokens, D width.
Source: Chung et al., UniMax (2023), umT5; Wan 2.1, wan/modules/t5.py and tokenizers.py.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dependencies import required_for
from ..errors import CheckpointError
from ..geometry import TEXT_LENGTH

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import UMT5EncoderModel

TOKENIZER = "spiece_model"  # tensor of ComfyUI's files that holds the tokenizer's bytes
MAX_DISTANCE = 128  # umT5: positions further apart share a bucket
_EMBEDDING = "shared.weight"
_TIED = "encoder.embed_tokens.weight"  # the same tensor; files contain it once
_BLOCK = r"encoder.block.\1.layer"
_NAMES = {  # Wan 2.1's own names to those of Hugging Face
    r"^token_embedding\.": "shared.",
    r"^norm\.": "encoder.final_layer_norm.",
    r"^blocks\.(\d+)\.norm1\.": f"{_BLOCK}.0.layer_norm.",
    r"^blocks\.(\d+)\.attn\.": f"{_BLOCK}.0.SelfAttention.",
    r"^blocks\.(\d+)\.pos_embedding\.embedding\.": (
        f"{_BLOCK}.0.SelfAttention.relative_attention_bias."
    ),
    r"^blocks\.(\d+)\.norm2\.": f"{_BLOCK}.1.layer_norm.",
    r"^blocks\.(\d+)\.ffn\.gate\.0\.": f"{_BLOCK}.1.DenseReluDense.wi_0.",
    r"^blocks\.(\d+)\.ffn\.fc1\.": f"{_BLOCK}.1.DenseReluDense.wi_1.",
    r"^blocks\.(\d+)\.ffn\.fc2\.": f"{_BLOCK}.1.DenseReluDense.wo.",
}


class TextEncoder:
    """umT5 text encoder."""

    def __init__(self, model: UMT5EncoderModel) -> None:
        """Wrap a network; use ``build_text_encoder`` to make one from a checkpoint."""
        self.model = model

    @torch.no_grad()
    def __call__(self, ids_BN: Tensor, mask_BN: Tensor) -> Tensor:
        """Encode tokens.

        Args:
            ids_BN: token numbers from the tokenizer that belongs to the weights, padded.
            mask_BN: 1 for a token, 0 for padding, which no token attends to.

        Returns:
            [B, N, D] in the weights' dtype. Wan uses the rows of tokens, not those of padding.
        """
        device = self.model.device
        output = self.model(input_ids=ids_BN.to(device), attention_mask=mask_BN.to(device))
        return output.last_hidden_state


class Tokenizer:
    """SentencePiece tokenizer of prompts."""

    def __init__(self, processor: SentencePieceProcessor) -> None:
        """Wrap a SentencePiece model; use ``build_tokenizer`` to make one from its bytes."""
        self._processor = processor

    @property
    def num_pieces(self) -> int:
        """Size of the vocabulary: one more than the largest token number."""
        return self._processor.get_piece_size()

    def __call__(self, prompt: str) -> Tensor:
        """Split a prompt into tokens.

        As in the reference, HTML entities are resolved twice and each run of white space becomes
        one space.

        Args:
            prompt: any text; tokens beyond ``TEXT_LENGTH`` are cut off.

        Returns:
            Token numbers, [1, N], with the end token last.
        """
        text = re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()
        ids = self._processor.encode(text)[: TEXT_LENGTH - 1]
        return torch.tensor([[*ids, self._processor.eos_id()]])


def build_tokenizer(model: bytes) -> Tokenizer:
    """Build the tokenizer of a text encoder.

    Args:
        model: bytes of a ``spiece.model`` file.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: if the bytes are no SentencePiece model, or the model has no end token.
        MissingToolError: if sentencepiece is not installed.
    """
    # Imported when used, like transformers: runs without a prompt do not need it.
    with required_for("the tokenizer of a prompt"):
        from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError:
        processor = None
    if processor is None or not 0 <= processor.eos_id() < processor.get_piece_size():
        raise CheckpointError(
            "this is no SentencePiece tokenizer; get spiece.model of google/umt5-xxl, which Wan "
            "2.1 ships in its folder of that name"
        )
    return Tokenizer(processor)


def encode_prompt(prompt: str, tokenizer: Tokenizer, encoder: TextEncoder) -> Tensor:
    """Encode a prompt to the text embedding for Wan.

    Args:
        prompt: any text; it may be empty.
        tokenizer: the tokenizer that belongs to the encoder.
        encoder: the network.

    Returns:
        Text embedding, [1, N, D], float32 on the CPU, without padding.
    """
    ids_BN = tokenizer(prompt)
    return encoder(ids_BN, torch.ones_like(ids_BN)).to("cpu", torch.float32)


def build_text_encoder(weights: Mapping[str, Tensor]) -> TextEncoder:
    """Build a text encoder from the tensors of a checkpoint; their shapes determine its sizes.

    Args:
        weights: tensors by the names of Wan 2.1's own file, or by those of Hugging Face, which
            ComfyUI's files have.

    Returns:
        The encoder, in the dtype of the weights, in evaluation mode.

    Raises:
        CheckpointError: if tensors are missing, unknown or of another shape.
        MissingToolError: if transformers is not installed.
    """
    # Imported when used: it takes seconds, and a run without a prompt never needs it.
    with required_for("the text encoder of a prompt"):
        from transformers import UMT5Config, UMT5EncoderModel

    renamed = {_rename(name): t for name, t in weights.items() if name != TOKENIZER}
    try:
        renamed[_TIED] = renamed[_EMBEDDING]
        attention = "encoder.block.0.layer.0.SelfAttention"
        num_buckets, num_heads = renamed[f"{attention}.relative_attention_bias.weight"].shape
        vocab_size, dim = renamed[_EMBEDDING].shape
        config = UMT5Config(
            vocab_size=vocab_size,
            d_model=dim,
            d_kv=renamed[f"{attention}.q.weight"].shape[0] // num_heads,
            d_ff=renamed["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
            num_layers=len({n.split(".")[2] for n in renamed if n.startswith("encoder.block.")}),
            num_heads=num_heads,
            relative_attention_num_buckets=num_buckets,
            relative_attention_max_distance=MAX_DISTANCE,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
        with torch.device("meta"):
            model = UMT5EncoderModel(config)
        model.load_state_dict(renamed, assign=True)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"this is no complete umT5 text encoder ({error}); get Wan 2.1's own, "
            "models_t5_umt5-xxl-enc-bf16, or ComfyUI's umt5_xxl_fp16"
        ) from error
    return TextEncoder(model.requires_grad_(False).eval())


def _rename(name: str) -> str:
    for old, new in _NAMES.items():
        name = re.sub(old, new, name)
    return name
