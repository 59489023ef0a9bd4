"""Model files: what goes in comes out, a header tells what a file is, and damage is named."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turbotalk_core.audio.encoder import EncoderConfig, build_audio_encoder, save_audio_encoder
from turbotalk_core.errors import CheckpointError, MismatchError, OutputError
from turbotalk_core.model.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.model.checkpoint import (
    ADAPTER,
    AUDIO_ENCODER,
    DIT,
    LORA,
    UNKNOWN,
    VAE,
    inspect,
    load_dit,
    load_vae,
    save_adapter,
    save_dit,
    save_vae,
)
from turbotalk_core.model.vae import WanVAE
from turbotalk_core.model.wan import WanConfig, WanModel

CONFIG = WanConfig(
    dim=24,
    ffn_dim=20,
    num_heads=2,
    num_layers=2,
    text_dim=8,
    frequency_dim=16,
    image_dim=10,
    audio_heads=4,
    audio_token_dim=6,
)
PROJECTION = AudioAdapterConfig(frame_width=2 * 7, hidden_dim=9, num_tokens=3, token_dim=6)
SETTINGS = {"kind": "student", "steps": 4, "shift": 5.0}
SILENT = {"audio_heads": None, "audio_token_dim": 768}  # as read from a file without audio


def _draw(module: nn.Module) -> None:
    """Give every weight a value that float16 has to round."""
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)


@pytest.fixture(scope="module")
def model() -> WanModel:
    model = WanModel(CONFIG)
    _draw(model)
    return model


@pytest.fixture(scope="module")
def projection() -> AudioProjection:
    projection = AudioProjection(PROJECTION)
    _draw(projection)
    return projection


@pytest.fixture
def dit_path(tmp_path: Path, model: WanModel) -> Path:
    path = tmp_path / "dit.safetensors"
    save_dit(path, model, SETTINGS)
    return path


@pytest.fixture
def adapter_path(tmp_path: Path, model: WanModel, projection: AudioProjection) -> Path:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, model, projection, {"family": "tiny"})
    return path


@pytest.fixture
def vae_path(tmp_path: Path) -> Path:
    path = tmp_path / "vae.safetensors"
    vae = WanVAE(2)
    _draw(vae)
    save_vae(path, vae, {"seed": 3})
    return path


def _rewrite(
    path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    metadata: dict[str, str] | None = None,
) -> None:
    """Change a file's tensors, and replace its metadata where some are given."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file(change(load_file(path)), path, old if metadata is None else metadata)


def _assert_rounded(loaded: nn.Module, saved: nn.Module) -> None:
    state, expected = loaded.state_dict(), saved.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key].half().float()) for key in state)


def _assert_ready(module: nn.Module) -> None:
    assert not module.training
    assert not any(weight.requires_grad for weight in module.parameters())


@pytest.mark.parametrize("image_dim", [None, 10])
def test_a_transformer_comes_back_rounded_to_float16(tmp_path: Path, image_dim: int | None) -> None:
    saved = WanModel(replace(CONFIG, image_dim=image_dim, audio_heads=None))
    _draw(saved)
    path = tmp_path / "dit.safetensors"
    save_dit(path, saved, {})
    loaded, projection = load_dit(path)
    assert projection is None
    assert loaded.config == replace(CONFIG, image_dim=image_dim, **SILENT)
    _assert_rounded(loaded, saved)
    _assert_ready(loaded)


def test_transformer_and_adapter_come_back_from_two_files(
    dit_path: Path, adapter_path: Path, model: WanModel, projection: AudioProjection
) -> None:
    loaded, loaded_projection = load_dit(dit_path, adapter_path)
    assert loaded_projection is not None
    assert loaded.config == CONFIG
    assert loaded_projection.config == PROJECTION
    _assert_rounded(loaded, model)
    _assert_rounded(loaded_projection, projection)
    _assert_ready(loaded)
    _assert_ready(loaded_projection)


def test_loras_are_merged_one_after_the_other(tmp_path: Path, dit_path: Path) -> None:
    plain, _ = load_dit(dit_path)
    for name, key in (("one", "blocks.0.ffn.0.diff_b"), ("two", "diffusion_model.head.head.diff")):
        shape = (20,) if name == "one" else (64, 24)
        save_file({key: torch.ones(shape)}, tmp_path / name)
    merged, _ = load_dit(dit_path, loras=[(tmp_path / "one", 2.0), (tmp_path / "two", 0.5)])
    changes = {"blocks.0.ffn.0.bias": 2.0, "head.head.weight": 0.5}
    before = plain.state_dict()
    for key, weight in merged.state_dict().items():
        assert torch.equal(weight, before[key] + changes.get(key, 0)), key


def test_no_tensor_stands_in_both_files(dit_path: Path, adapter_path: Path) -> None:
    dit, adapter = load_file(dit_path), load_file(adapter_path)
    assert not dit.keys() & adapter.keys()
    assert {tensor.dtype for tensor in (dit | adapter).values()} == {torch.float16}
    assert load_dit(dit_path)[0].config == replace(CONFIG, **SILENT)


def test_a_vae_comes_back_rounded_to_float16(vae_path: Path) -> None:
    saved = WanVAE(2)
    _draw(saved)
    loaded = load_vae(vae_path)
    _assert_rounded(loaded, saved)
    _assert_ready(loaded)
    assert loaded.encode(torch.zeros(1, 3, 5, 16, 16)).isfinite().all()


def test_weights_load_in_the_dtype_asked_for(
    dit_path: Path, adapter_path: Path, vae_path: Path
) -> None:
    model, projection = load_dit(dit_path, adapter_path, torch.bfloat16)
    assert projection is not None
    for module in (model, projection, load_vae(vae_path, torch.bfloat16)):
        assert {weight.dtype for weight in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_public_prefixes_change_nothing(
    dit_path: Path, adapter_path: Path, model: WanModel, prefix: str
) -> None:
    for path in (dit_path, adapter_path):
        _rewrite(path, lambda tensors: {prefix + key: t for key, t in tensors.items()})
    assert inspect(dit_path).kind == DIT
    assert inspect(adapter_path).kind == ADAPTER
    _assert_rounded(load_dit(dit_path, adapter_path)[0], model)


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
    config = EncoderConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    path = tmp_path / "encoder.safetensors"
    save_audio_encoder(build_audio_encoder(config, seed=0), path)
    expected = (AUDIO_ENCODER, {"width": 16, "layers": 3})
    assert (inspect(path).kind, inspect(path).sizes) == expected
    _rewrite(path, lambda tensors: {f"wav2vec2.{key}": t for key, t in tensors.items()})
    assert (inspect(path).kind, inspect(path).sizes) == expected
    assert "--encoder" in inspect(path).uses


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", LORA),
        ("blocks.0.self_attn.q.lora_A.weight", LORA),
        ("lora_unet_blocks_0_self_attn_q.lora_up.weight", LORA),
        ("model.layers.0.mlp.weight", UNKNOWN),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, key: str, kind: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(4, 16, dtype=torch.bfloat16)}, path)
    info = inspect(path)
    assert (info.kind, info.sizes, info.settings, info.metadata) == (kind, {}, {}, {})
    assert (info.num_parameters, info.dtypes) == (64, {"BF16": 1})


def test_a_full_size_file_is_told_from_its_header(tmp_path: Path) -> None:
    with torch.device("meta"):
        full = WanModel(WanConfig(num_layers=2, audio_heads=None))
    shapes = {key: list(tensor.shape) for key, tensor in full.state_dict().items()}
    header: dict[str, Any] = {}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "full.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # no data: a sparse file of more than a gigabyte
    info = inspect(path)
    assert info.kind == DIT
    assert info.num_parameters == sum(math.prod(shape) for shape in shapes.values())
    assert info.sizes == {
        "width": 5120,
        "layers": 2,
        "heads": 40,
        "input channels": 36,
        "text width": 4096,
        "image width": 1280,
    }


def test_a_description_is_for_people_and_for_programs(dit_path: Path) -> None:
    _rewrite(dit_path, metadata={"turbotalk": json.dumps(SETTINGS), "format": "pt"})
    info = inspect(dit_path)
    lines = info.lines()
    assert lines[0] == f"dit.safetensors: video transformer, {info.num_parameters:,} parameters"
    for line in ("  width: 24", "  ships with steps: 4", "  metadata format: pt"):
        assert line in lines
    assert lines[-1] == f"  use: {info.uses}"
    told = json.loads(json.dumps(info.to_json()))
    assert told["file"] == "dit.safetensors"
    assert told["kind"] == DIT
    assert told["sizes"]["layers"] == 2
    assert told["settings"] == SETTINGS
    assert told["metadata"] == {"format": "pt"}


def test_another_kind_of_file_is_named(dit_path: Path, adapter_path: Path, vae_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dit\.safetensors is: video transf.*needed.*VAE"):
        load_vae(dit_path)
    with pytest.raises(CheckpointError, match=r"vae\.safetensors is: video VAE.*--vae"):
        load_dit(vae_path)
    with pytest.raises(CheckpointError, match=r"dit\.safetensors is: .*needed.*audio adapter"):
        load_dit(dit_path, dit_path)
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors is: audio adapter"):
        load_dit(adapter_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for load in (inspect, load_dit, load_vae):
        with pytest.raises(CheckpointError, match=r"no model file .*gone\.safetensors"):
            load(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(dit_path: Path, size: int) -> None:
    data = dit_path.read_bytes()
    dit_path.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"dit\.safetensors is not a readable safetensors"):
        load_dit(dit_path)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"head.modulation": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"model\.pth is not a readable safetensors"):
        inspect(path)


@pytest.mark.parametrize(
    "key", ["blocks.1.self_attn.q.bias", "head.head.weight", "time_projection.1.weight"]
)
def test_a_missing_tensor_is_named(dit_path: Path, key: str) -> None:
    _rewrite(dit_path, lambda tensors: {k: t for k, t in tensors.items() if k != key})
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing, 0 .*{key}"):
        load_dit(dit_path)


@pytest.mark.parametrize(
    "key", ["blocks.0.ffn.0.weight", "patch_embedding.weight", "text_embedding.0.weight"]
)
def test_a_missing_tensor_that_tells_a_size_is_named(dit_path: Path, key: str) -> None:
    _rewrite(dit_path, lambda tensors: {k: t for k, t in tensors.items() if k != key})
    with pytest.raises(CheckpointError, match=rf"dit\.safetensors lacks {key}; .* incomplete"):
        load_dit(dit_path)


def test_a_tensor_too_many_is_named(dit_path: Path, vae_path: Path) -> None:
    for path, load in ((dit_path, load_dit), (vae_path, load_vae)):
        _rewrite(path, lambda tensors: tensors | {"vace_blocks.0.weight": torch.zeros(1)})
        with pytest.raises(CheckpointError, match=rf"{path.name} .*1 unknown.*vace_blocks"):
            load(path)


def test_a_tensor_of_another_shape_is_named(vae_path: Path) -> None:
    _rewrite(vae_path, lambda tensors: tensors | {"conv2.bias": torch.zeros(5)})
    with pytest.raises(CheckpointError, match=r"1 of another shape \(first: conv2\.bias\)"):
        load_vae(vae_path)


@pytest.mark.parametrize("key", ["blocks.1.norm_x.bias", "audio_proj.proj2.bias"])
def test_a_damaged_adapter_is_blamed_itself(dit_path: Path, adapter_path: Path, key: str) -> None:
    _rewrite(adapter_path, lambda tensors: {k: t for k, t in tensors.items() if k != key})
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors .*1 tensors are missing"):
        load_dit(dit_path, adapter_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 32}, "of width 24 and 2 layers, .* has width 32 and 2 layers"),
        ({"num_layers": 3}, "of width 24 and 2 layers, .* has width 24 and 3 layers"),
    ],
)
def test_an_adapter_for_another_transformer_is_refused(
    tmp_path: Path, adapter_path: Path, changes: dict[str, int], message: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_dit(path, WanModel(replace(CONFIG, **changes)), {})
    with pytest.raises(MismatchError, match=rf"adapter\.safetensors is for .*{message}"):
        load_dit(path, adapter_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"turbotalk": "{"}, "is not JSON"),
        ({"turbotalk": "[4]"}, "not a JSON object"),
        ({"config": "none"}, "is not JSON"),
        ({"config": '"tiny"'}, "not a JSON object"),
        ({"config": '{"transformer": [4]}'}, r"\[4\]"),
        ({"config": '{"transformer": {"num_heads": "two"}}'}, "'two'"),
        ({"config": '{"transformer": {"num_heads": 0}}'}, "0"),
        ({"config": '{"transformer": {"num_heads": 5}}'}, "5.*24"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused(
    dit_path: Path, metadata: dict[str, str], message: str
) -> None:
    _rewrite(dit_path, metadata=metadata)
    for read in (inspect, load_dit):
        with pytest.raises(CheckpointError, match=rf"dit\.safetensors.*{message}"):
            read(dit_path)


@pytest.mark.parametrize("heads", ['"two"', "0", "5", "null"])
def test_an_adapters_heads_must_fit_its_width(
    dit_path: Path, adapter_path: Path, heads: str
) -> None:
    _rewrite(adapter_path, metadata={"config": f'{{"audio_heads": {heads}}}'})
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors.*heads.*24"):
        load_dit(dit_path, adapter_path)


def test_heads_that_no_file_names_are_128_wide(tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    wide = replace(CONFIG, dim=256, ffn_dim=8, num_heads=2, num_layers=1, image_dim=None)
    save_dit(path, WanModel(wide), {})
    _rewrite(path, metadata={})
    assert load_dit(path)[0].config.num_heads == 2


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_as_open_as_the_user_wants(tmp_path: Path, umask: int, mode: int) -> None:
    path = tmp_path / "models" / "vae.safetensors"
    before = os.umask(umask)
    try:
        save_vae(path, WanVAE(1), {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    file = tmp_path / "file"
    file.write_bytes(b"")
    for path in (folder, file / "vae.safetensors", file / "deeper" / "vae.safetensors"):
        with pytest.raises(OutputError, match=f"cannot write .*{path.name}"):
            save_vae(path, WanVAE(1), {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == [file.name, folder.name]


def test_a_full_disk_leaves_the_old_file(vae_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = vae_path.read_bytes()
    write_all = Path.write_bytes

    def write_half(path: Path, data: bytes) -> int:
        write_all(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OutputError, match="No space left"):
        save_vae(vae_path, WanVAE(1), {})
    assert vae_path.read_bytes() == old
    assert [path.name for path in vae_path.parent.iterdir()] == [vae_path.name]
