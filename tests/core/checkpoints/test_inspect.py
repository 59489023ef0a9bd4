"""The header of a model file gives its kind, sizes and use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.checkpoints.small import SETTINGS, rewrite
from tests.family import ENCODER_CONFIG
from turbotalk_core.audio.wav2vec2 import build_audio_encoder
from turbotalk_core.checkpoints.audio_encoder import save_audio_encoder
from turbotalk_core.checkpoints.inspect import (
    ADAPTER,
    AUDIO_ENCODER,
    DIT,
    IMAGE_ENCODER,
    LORA,
    TEXT_ENCODER,
    UNKNOWN,
    VAE,
    inspect,
)
from turbotalk_core.checkpoints.networks import load_dit
from turbotalk_core.errors import CheckpointError


def test_a_transformers_header_tells_its_sizes(dit_path: Path) -> None:
    info = inspect(dit_path)
    tensors = load_file(dit_path)
    assert info.kind == DIT
    assert info.sizes == {
        "width": 24,
        "layers": 2,
        "heads": 2,
        "input channels": 36,
        "text width": 8,
        "image width": 10,
    }
    assert info.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert info.dtypes == {"F16": len(tensors)}
    assert info.settings == SETTINGS
    assert info.metadata.keys() == {"config"}
    assert "--dit" in info.uses


def test_an_adapters_header_tells_its_sizes(adapter_path: Path) -> None:
    info = inspect(adapter_path)
    assert info.kind == ADAPTER
    assert info.sizes == {
        "video width": 24,
        "layers": 2,
        "heads": 4,
        "audio values per frame": 14,
        "tokens per latent frame": 3,
        "token width": 6,
    }
    assert info.settings == {"family": "tiny"}
    assert "--adapter" in info.uses


def test_a_vaes_header_tells_its_width(vae_path: Path) -> None:
    info = inspect(vae_path)
    assert (info.kind, info.sizes, info.settings) == (VAE, {"width": 2}, {"seed": 3})
    assert "--vae" in info.uses


def test_an_audio_encoders_header_tells_its_sizes(tmp_path: Path) -> None:
    config = replace(ENCODER_CONFIG, num_hidden_layers=3)
    path = tmp_path / "encoder.safetensors"
    save_audio_encoder(build_audio_encoder(config, seed=0), path)
    expected = (AUDIO_ENCODER, {"width": 16, "layers": 3})
    assert (inspect(path).kind, inspect(path).sizes) == expected
    rewrite(path, lambda tensors: {f"wav2vec2.{key}": t for key, t in tensors.items()})
    assert (inspect(path).kind, inspect(path).sizes) == expected
    assert "--encoder" in inspect(path).uses


@pytest.mark.parametrize(
    ("key", "kind", "sizes"),
    [
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", LORA, {"rank": 4, "layers": 1}),
        ("blocks.0.self_attn.q.lora_A.weight", LORA, {"rank": 4, "layers": 1}),
        ("lora_unet_blocks_0_self_attn_q.lora_up.weight", LORA, {}),
        ("model.layers.0.mlp.weight", UNKNOWN, {}),
    ],
)
def test_other_files_are_told_apart(
    tmp_path: Path, key: str, kind: str, sizes: dict[str, int]
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(4, 16, dtype=torch.bfloat16)}, path)
    info = inspect(path)
    assert (info.kind, info.sizes, info.settings, info.metadata) == (kind, sizes, {}, {})
    assert (info.num_parameters, info.dtypes) == (64, {"BF16": 1})


@pytest.mark.parametrize(
    ("shapes", "kind", "sizes"),
    [
        (
            {"token_embedding.weight": (9, 4), "blocks.1.attn.q.weight": (4, 4)},
            TEXT_ENCODER,
            {"width": 4, "layers": 1, "vocabulary": 9},
        ),
        (
            {
                "visual.transformer.0.attn.to_qkv.weight": (12, 4),
                "visual.transformer.1.attn.to_qkv.weight": (12, 4),
                "textual.token_embedding.weight": (9, 4),
            },
            IMAGE_ENCODER,
            {"width": 4, "layers": 2},
        ),
    ],
)
def test_the_references_own_text_and_image_encoders_are_told(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], kind: str, sizes: dict[str, int]
) -> None:
    path = tmp_path / "models.pth"
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    assert (inspect(path).kind, inspect(path).sizes) == (kind, sizes)
    assert "models/" in inspect(path).uses


def test_a_description_is_for_people_and_for_programs(dit_path: Path) -> None:
    rewrite(dit_path, metadata={"turbotalk": json.dumps(SETTINGS), "format": "pt"})
    info = inspect(dit_path)
    lines = info.lines()
    assert lines[0] == f"dit.safetensors: video transformer, {info.num_parameters:,} parameters"
    size = f"  tensors: {info.dtypes['F16']} x F16; {dit_path.stat().st_size / 1e9:.3f} GB"
    for line in ("  width: 24", size, "  ships with steps: 4", "  metadata format: pt"):
        assert line in lines
    assert lines[-1] == f"  use: {info.uses}"
    told = json.loads(json.dumps(info.to_json()))
    assert told["file"] == "dit.safetensors"
    assert told["kind"] == DIT
    assert told["sizes"]["layers"] == 2
    assert told["settings"] == SETTINGS
    assert told["metadata"] == {"format": "pt"}
    assert (told["num_files"], told["num_bytes"]) == (1, dit_path.stat().st_size)
    assert (told["prefix"], told["quantization"], told["speakers"]) == ("", None, None)


@pytest.mark.parametrize("key", ["turbotalk", "config"])
@pytest.mark.parametrize("text", ["{", "[]", '{"a": ' * 100_000, "9" * 5_000, '{"a": NaN}'])
def test_metadata_that_cannot_be_are_refused(dit_path: Path, key: str, text: str) -> None:
    rewrite(dit_path, metadata={key: text})
    with pytest.raises(CheckpointError, match=r"metadata of dit\.safetensors is not"):
        load_dit(dit_path)


def test_odd_audio_heads_serve_one_speaker(dit_path: Path, adapter_path: Path) -> None:
    told = adapter_path.with_name("infinitetalk_multi.safetensors")
    adapter_path.rename(told)
    assert str(inspect(told).speakers).startswith("several")  # heads of 24 / 4
    rewrite(told, metadata={"config": '{"audio_heads": 8}'})
    assert str(inspect(told).speakers).startswith("one: ")  # heads of 3
    assert inspect(dit_path).speakers is None
