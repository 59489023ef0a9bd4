"""Networks that are written come back the same, and damage in their files is named."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.core.checkpoints.small import CONFIG, PROJECTION, draw, rewrite
from turbotalk_core.checkpoints.inspect import ADAPTER, DIT, VAE, inspect
from turbotalk_core.checkpoints.networks import load_dit, load_vae, save_dit, save_vae
from turbotalk_core.errors import CheckpointError, MismatchError, OutputError
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanModel
from turbotalk_core.safe_io.tensor_header import MAX_LAYERS

SILENT = {"audio_heads": None, "audio_token_dim": 768}  # as read from a file without audio


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
    draw(saved)
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
    draw(saved)
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
        rewrite(path, lambda tensors: {prefix + key: t for key, t in tensors.items()})
    assert inspect(dit_path).kind == DIT
    assert inspect(adapter_path).kind == ADAPTER
    _assert_rounded(load_dit(dit_path, adapter_path)[0], model)


def test_another_kind_of_file_is_named(dit_path: Path, adapter_path: Path, vae_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dit\.safetensors is: video transf.*needed.*VAE"):
        load_vae(dit_path)
    with pytest.raises(CheckpointError, match=r"vae\.safetensors is: video VAE.*--vae"):
        load_dit(vae_path)
    with pytest.raises(CheckpointError, match=r"dit\.safetensors is: .*needed.*audio adapter"):
        load_dit(dit_path, dit_path)
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors is: audio adapter"):
        load_dit(adapter_path)


def test_a_network_of_more_layers_than_any_is_not_built(
    tmp_path: Path, dit_path: Path, adapter_path: Path
) -> None:
    for path in (dit_path, adapter_path):
        extra = {f"blocks.{index}.x": torch.ones(1) for index in range(2, MAX_LAYERS + 1)}
        rewrite(path, lambda tensors, extra=extra: tensors | extra)
        with pytest.raises(CheckpointError, match=r"has 1001 layers, at most 1000 are read"):
            inspect(path)


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


def test_a_vae_comes_from_a_pickle_too(vae_path: Path) -> None:
    pickled = vae_path.with_name("Wan2.1_VAE.pth")
    torch.save(load_file(vae_path), pickled)
    assert inspect(pickled).kind == VAE
    expected = load_vae(vae_path).state_dict()
    loaded = load_vae(pickled)
    _assert_ready(loaded)
    assert all(torch.equal(t, expected[key]) for key, t in loaded.state_dict().items())


def _split(path: Path) -> Path:
    """Split a file into three shards and an index, in a folder of their own."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    folder = path.parent / "shards"
    folder.mkdir()
    weight_map = {}
    for i in range(3):
        part = {key: tensors[key] for key in list(tensors)[i::3]}
        name = f"diffusion_pytorch_model-{i + 1:05}-of-00003.safetensors"
        save_file(part, folder / name, metadata)
        weight_map |= dict.fromkeys(part, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_change_nothing(dit_path: Path, adapter_path: Path, model: WanModel) -> None:
    _assert_rounded(load_dit(_split(dit_path), adapter_path)[0], model)


def _merge(dit_path: Path, adapter_path: Path) -> Path:
    path = dit_path.with_name("merged.safetensors")
    config = {"transformer": {"num_heads": 2}, "audio_heads": 4}
    save_file(load_file(dit_path) | load_file(adapter_path), path, {"config": json.dumps(config)})
    return path


def test_a_merged_file_is_both(
    dit_path: Path, adapter_path: Path, model: WanModel, projection: AudioProjection
) -> None:
    path = _merge(dit_path, adapter_path)
    info = inspect(path)
    assert (info.kind, info.sizes["audio heads"], info.sizes["token width"]) == (DIT, 4, 6)
    assert info.speakers is not None
    for adapter in (None, path):
        loaded, loaded_projection = load_dit(path, adapter)
        assert loaded_projection is not None
        assert loaded.config == CONFIG
        _assert_rounded(loaded, model)
        _assert_rounded(loaded_projection, projection)


def test_an_adapter_wins_over_a_merged_file(dit_path: Path, adapter_path: Path) -> None:
    path = _merge(dit_path, adapter_path)
    rewrite(adapter_path, lambda tensors: {key: t + 1 for key, t in tensors.items()})
    model, projection = load_dit(path, adapter_path)
    expected, expected_projection = load_dit(dit_path, adapter_path)
    for got, wanted in ((model, expected), (projection, expected_projection)):
        assert got is not None
        assert wanted is not None
        state = got.state_dict()
        assert all(torch.equal(t, state[key]) for key, t in wanted.state_dict().items())


def _quantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Save in the format of the public mixed files: matrices of blocks small, biases in full."""
    stored = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for key, tensor in tensors.items():
        if key.startswith("blocks.") and tensor.ndim == 2:
            scale = tensor.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
            stored[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            stored[key.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
        else:
            stored[key] = tensor.float() if key.endswith("bias") else tensor
    return stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_and_mixed_files_become_one_dtype(
    dit_path: Path, adapter_path: Path, dtype: torch.dtype, prefix: str
) -> None:
    exact = load_dit(dit_path, adapter_path)[0].state_dict()
    for path in (dit_path, adapter_path):
        rewrite(path, lambda tensors: {prefix + key: t for key, t in _quantise(tensors).items()})
        assert inspect(path).quantization == "fp8-scaled"
        assert len(inspect(path).dtypes) == 3
    model, projection = load_dit(dit_path, adapter_path, dtype)
    assert projection is not None
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        is_small = key.startswith("blocks.") and key.endswith("weight") and tensor.ndim == 2
        # float8_e4m3fn keeps three bits behind the leading one.
        bound = exact[key].abs() * 2**-4 + 1e-3 * exact[key].abs().max()
        error = (tensor.float() - exact[key]).abs()
        assert bool((error <= (bound if is_small else 2**-8 * exact[key].abs())).all()), key
    if dtype != torch.float16:  # whose range is too small for what such random weights make
        velocity = model(
            torch.zeros(1, 16, 1, 4, 4),
            torch.tensor([500.0]),
            torch.zeros(1, 20, 1, 4, 4),
            audio_BFND=torch.zeros(1, 1, 3, 6),
        )
        assert velocity.isfinite().all()


def test_a_vae_of_mixed_dtypes_becomes_one(vae_path: Path) -> None:
    expected = load_vae(vae_path).state_dict()
    rewrite(
        vae_path,
        lambda tensors: {
            key: t.float() if key.endswith("bias") else t for key, t in tensors.items()
        },
    )
    assert inspect(vae_path).dtypes.keys() == {"F16", "F32"}
    loaded = load_vae(vae_path).state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in loaded.items())


@pytest.mark.parametrize(
    "key", ["blocks.1.self_attn.q.bias", "head.head.weight", "time_projection.1.weight"]
)
def test_a_missing_tensor_is_named(dit_path: Path, key: str) -> None:
    rewrite(dit_path, lambda tensors: {k: t for k, t in tensors.items() if k != key})
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing, 0 .*{key}"):
        load_dit(dit_path)


@pytest.mark.parametrize(
    "key", ["blocks.0.ffn.0.weight", "patch_embedding.weight", "text_embedding.0.weight"]
)
def test_a_missing_tensor_that_tells_a_size_is_named(dit_path: Path, key: str) -> None:
    rewrite(dit_path, lambda tensors: {k: t for k, t in tensors.items() if k != key})
    with pytest.raises(CheckpointError, match=rf"dit\.safetensors lacks {key}; .* incomplete"):
        load_dit(dit_path)


def test_a_tensor_too_many_is_named(dit_path: Path, vae_path: Path) -> None:
    for path, load in ((dit_path, load_dit), (vae_path, load_vae)):
        rewrite(path, lambda tensors: tensors | {"vace_blocks.0.weight": torch.zeros(1)})
        with pytest.raises(CheckpointError, match=rf"{path.name} .*1 unknown.*vace_blocks"):
            load(path)


def test_a_tensor_of_another_shape_is_named(vae_path: Path) -> None:
    rewrite(vae_path, lambda tensors: tensors | {"conv2.bias": torch.zeros(5)})
    with pytest.raises(CheckpointError, match=r"1 of another shape \(first: conv2\.bias\)"):
        load_vae(vae_path)


@pytest.mark.parametrize("key", ["blocks.1.norm_x.bias", "audio_proj.proj2.bias"])
def test_a_damaged_adapter_is_blamed_itself(dit_path: Path, adapter_path: Path, key: str) -> None:
    rewrite(adapter_path, lambda tensors: {k: t for k, t in tensors.items() if k != key})
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
    rewrite(dit_path, metadata=metadata)
    for read in (inspect, load_dit):
        with pytest.raises(CheckpointError, match=rf"dit\.safetensors.*{message}"):
            read(dit_path)


@pytest.mark.parametrize("heads", ['"two"', "0", "5", "null"])
def test_an_adapters_heads_must_fit_its_width(
    dit_path: Path, adapter_path: Path, heads: str
) -> None:
    rewrite(adapter_path, metadata={"config": f'{{"audio_heads": {heads}}}'})
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors.*heads.*24"):
        load_dit(dit_path, adapter_path)


def test_heads_that_no_file_names_are_128_wide(tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    wide = replace(CONFIG, dim=256, ffn_dim=8, num_heads=2, num_layers=1, image_dim=None)
    save_dit(path, WanModel(wide), {})
    rewrite(path, metadata={})
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
    blamed = {
        folder: folder,
        file / "a.safetensors": file,
        file / "b" / "a.safetensors": file / "b",
    }
    for path, culprit in blamed.items():
        with pytest.raises(OutputError, match=f"at {culprit};"):
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
