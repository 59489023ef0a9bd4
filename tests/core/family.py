"""Sizes of a very small model family, shared expectations of tests, and its rarer files."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from turbotalk_core.audio.wav2vec2 import EncoderConfig
from turbotalk_core.checkpoints.networks import save_dit
from turbotalk_core.models.image_encoder import ImageEncoder
from turbotalk_core.models.wan import WanConfig, WanModel

CONFIG = WanConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=1,
    text_dim=8,
    frequency_dim=16,
    image_dim=None,
    audio_heads=2,
    audio_token_dim=16,
)
ENCODER_CONFIG = EncoderConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    conv_dim=(8,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)

SHIPPED = {
    "kind": "student",
    "steps": 2,
    "schedule": "distilled",
    "shift": 5.0,
    "update": "renoise",
    "audio_guidance_scale": 1.0,
    "height": 32,
    "width": 32,
    "chunk_frames": 13,
    "num_motion_frames": 5,
}
NUM_FRAMES = 20  # two chunks of 13 that share 5


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a refused command prints."""
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in captured.err
    return last


def build_dit(config: WanConfig) -> WanModel:
    """Build a transformer whose output depends on all inputs: the head has random weights too."""
    model = WanModel(config)
    model.initialize()
    torch.nn.init.xavier_uniform_(model.head.head.weight)
    return model


def train_tokenizer() -> bytes:
    """Train a SentencePiece model of very few words, with the special tokens of umT5."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a man speaks", "a dog", "she speaks to him"] * 4),
        model_writer=model,
        vocab_size=20,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def save_text_encoder(folder: Path, dim: int) -> None:
    """Save a umT5 with the tokenizer inside (whole) and without (bare), and spiece.model."""
    folder.mkdir()
    tokenizer = train_tokenizer()
    config = UMT5Config(
        vocab_size=20,
        d_model=dim,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = UMT5EncoderModel(config).state_dict()
    weights = {k: t.contiguous() for k, t in weights.items() if k != "encoder.embed_tokens.weight"}
    save_file(weights, folder / "bare.safetensors")
    inside = {"spiece_model": torch.tensor(list(tokenizer), dtype=torch.uint8)}
    save_file(weights | inside, folder / "whole.safetensors")
    (folder / "spiece.model").write_bytes(tokenizer)


def save_image_encoder(path: Path, dim: int) -> None:
    """Save a CLIP image encoder of one block and four patches, in the layout of Wan 2.1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ImageEncoder(
            dim=dim, mlp_dim=16, num_heads=1, num_layers=2, patch=14, num_patches=4
        )
    weights = {f"visual.{name}": t.contiguous() for name, t in encoder.state_dict().items()}
    save_file(weights, path)


def save_dit_with_image_branch(path: Path, image_dim: int) -> None:
    """Save the family's transformer with other weights and an image branch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build_dit(replace(CONFIG, image_dim=image_dim))
    save_dit(path, model, SHIPPED)
