"""Recognition of public model files by their headers, with right names and shapes and no data.

Names, shapes and sizes are those of the published files, as far as they are documented. They are
written down here independently, so that they also check the networks. Each file is sparse: as long
as the real one, and empty.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.serialization import skip_data

from turbotalk_core.checkpoints.inspect import (
    ADAPTER,
    AUDIO_ENCODER,
    DIT,
    IMAGE_ENCODER,
    LORA,
    TEXT_ENCODER,
    VAE,
    CheckpointInfo,
    inspect,
)
from turbotalk_core.checkpoints.networks import PROJECTION_PREFIX
from turbotalk_core.checkpoints.tensors import PREFIXES
from turbotalk_core.models.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanConfig, WanModel

Shapes = dict[str, tuple[int, ...]]
Header = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
WIDTH, LAYERS = 5120, 40
ROOT = Path(__file__).parents[3]


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _wan(in_channels: int = 36, *, has_image: bool = True) -> Shapes:
    """Return Wan2.1-14B with the names of the reference."""
    shapes: Shapes = {
        "patch_embedding.weight": (WIDTH, in_channels, 1, 2, 2),
        "patch_embedding.bias": (WIDTH,),
        "head.modulation": (1, 2, WIDTH),
        **_linear("text_embedding.0", WIDTH, 4096),
        **_linear("text_embedding.2", WIDTH, WIDTH),
        **_linear("time_embedding.0", WIDTH, 256),
        **_linear("time_embedding.2", WIDTH, WIDTH),
        **_linear("time_projection.1", 30720, WIDTH),
        **_linear("head.head", 64, WIDTH),
    }
    if has_image:
        shapes |= _norm("img_emb.proj.0", 1280) | _linear("img_emb.proj.1", 1280, 1280)
        shapes |= _linear("img_emb.proj.3", WIDTH, 1280) | _norm("img_emb.proj.4", WIDTH)
    for n in range(LAYERS):
        block = f"blocks.{n}"
        shapes[f"{block}.modulation"] = (1, 6, WIDTH)
        shapes |= _norm(f"{block}.norm3", WIDTH)
        shapes |= _linear(f"{block}.ffn.0", 13824, WIDTH) | _linear(f"{block}.ffn.2", WIDTH, 13824)
        image = ["k_img", "v_img"] if has_image else []
        for attention, names in (("self_attn", []), ("cross_attn", image)):
            for name in ["q", "k", "v", "o", *names]:
                shapes |= _linear(f"{block}.{attention}.{name}", WIDTH, WIDTH)
            for name in ["norm_q", "norm_k", *["norm_k_img"][: len(names)]]:
                shapes[f"{block}.{attention}.{name}.weight"] = (WIDTH,)
    return shapes


def _audio() -> Shapes:
    """Return InfiniteTalk's audio modules."""
    shapes = {
        **_linear("audio_proj.proj1", 512, 46080),
        **_linear("audio_proj.proj1_vf", 512, 73728),
        **_linear("audio_proj.proj2", 512, 512),
        **_linear("audio_proj.proj3", 24576, 512),
        **_norm("audio_proj.norm", 768),
    }
    for n in range(LAYERS):
        shapes |= _linear(f"blocks.{n}.audio_cross_attn.q_linear", WIDTH, WIDTH)
        shapes |= _linear(f"blocks.{n}.audio_cross_attn.kv_linear", 2 * WIDTH, 768)
        shapes |= _linear(f"blocks.{n}.audio_cross_attn.proj", WIDTH, WIDTH)
        shapes |= _norm(f"blocks.{n}.norm_x", WIDTH)
    return shapes


def _vae() -> Shapes:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in WanVAE(96).state_dict().items()}


def _wav2vec2() -> Shapes:
    """Return chinese-wav2vec2-base with the tensors of its pre-training."""
    kernels = (10, 3, 3, 3, 3, 2, 2)
    shapes: Shapes = {
        f"feature_extractor.conv_layers.{i}.conv.weight": (512, 512 if i else 1, kernel)
        for i, kernel in enumerate(kernels)
    }
    shapes |= _norm("feature_extractor.conv_layers.0.layer_norm", 512)
    shapes |= _norm("feature_projection.layer_norm", 512)
    shapes |= _linear("feature_projection.projection", 768, 512)
    shapes |= {
        "encoder.pos_conv_embed.conv.bias": (768,),
        "encoder.pos_conv_embed.conv.weight_g": (1, 1, 128),
        "encoder.pos_conv_embed.conv.weight_v": (768, 48, 128),
        "masked_spec_embed": (768,),
    }
    shapes |= _norm("encoder.layer_norm", 768)
    for n in range(12):
        layer = f"encoder.layers.{n}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _linear(f"{layer}.attention.{name}", 768, 768)
        shapes |= _norm(f"{layer}.layer_norm", 768) | _norm(f"{layer}.final_layer_norm", 768)
        shapes |= _linear(f"{layer}.feed_forward.intermediate_dense", 3072, 768)
        shapes |= _linear(f"{layer}.feed_forward.output_dense", 768, 3072)
    return shapes


def _umt5() -> Shapes:
    shapes: Shapes = {"shared.weight": (256384, 4096), "encoder.final_layer_norm.weight": (4096,)}
    for n in range(24):
        attention, mlp = f"encoder.block.{n}.layer.0", f"encoder.block.{n}.layer.1"
        for name in "qkvo":
            shapes[f"{attention}.SelfAttention.{name}.weight"] = (4096, 4096)
        shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (32, 64)
        shapes[f"{attention}.layer_norm.weight"] = shapes[f"{mlp}.layer_norm.weight"] = (4096,)
        for name, shape in (
            ("wi_0", (10240, 4096)),
            ("wi_1", (10240, 4096)),
            ("wo", (4096, 10240)),
        ):
            shapes[f"{mlp}.DenseReluDense.{name}.weight"] = shape
    return shapes


def _clip() -> Shapes:
    shapes: Shapes = {"vision_model.embeddings.class_embedding": (1280,)}
    for n in range(32):
        layer = f"vision_model.encoder.layers.{n}"
        shapes |= _linear(f"{layer}.mlp.fc1", 5120, 1280) | _linear(f"{layer}.mlp.fc2", 1280, 5120)
    return shapes


def _store(shapes: Shapes, dtype: str) -> Header:
    return {name: (dtype, shape) for name, shape in shapes.items()}


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2


def _mix(shapes: Shapes, dtype: str, *, wide: Callable[[str], bool]) -> Header:
    """Store matrices of the blocks in one dtype, some others in float32, the rest in float16."""
    return {
        name: (dtype if _is_matrix(name, shape) else "F32" if wide(name) else "F16", shape)
        for name, shape in shapes.items()
    }


def _scale(header: Header, dtype: str, scale: str = "scale_weight") -> Header:
    """Add the tensors that ComfyUI and kijai store beside float8 matrices."""
    scaled = dict(header)
    for name, (stored, _) in header.items():
        if stored == dtype:
            scaled[f"{name.removesuffix('weight')}{scale}"] = ("F32", (1,))
    return scaled | {"scaled_fp8": (dtype, (2,))}


def _quanto(shapes: Shapes) -> Header:
    header: Header = {}
    for name, shape in shapes.items():
        if _is_matrix(name, shape):
            header[f"{name}._data"] = ("F8_E4M3", shape)
            header[f"{name}._scale"] = ("BF16", (shape[0], 1))
            layer = name.removesuffix("weight")
            header |= {f"{layer}input_scale": ("F32", ()), f"{layer}output_scale": ("F32", ())}
        else:
            header[name] = ("BF16", shape)
    return header


def _write(path: Path, header: Header, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is as long as the real one and has no data."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in header.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _inspect(
    folder: Path, name: str, header: Header, metadata: dict[str, str] | None = None
) -> CheckpointInfo:
    _write(folder / name, header, metadata)
    return inspect(folder / name)


WAN_SIZES = {
    "width": 5120,
    "layers": 40,
    "heads": 40,
    "input channels": 36,
    "text width": 4096,
    "image width": 1280,
}
AUDIO_SIZES = {
    "audio values per frame": 9216,
    "tokens per latent frame": 32,
    "token width": 768,
}
ADAPTER_SIZES = {"video width": 5120, "layers": 40, "heads": 40} | AUDIO_SIZES
FITS_14B = "with a transformer of 40 layers of 5120 and an audio encoder of 9216 values per frame"


def test_the_networks_have_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        # All blocks are alike, and one is made quickly.
        model, projection = WanModel(WanConfig(num_layers=1)), AudioProjection(AudioAdapterConfig())
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in projection.state_dict().items():
        ours[PROJECTION_PREFIX + name] = tuple(tensor.shape)
    published = _wan() | _audio()
    assert ours == {
        name: shape
        for name, shape in published.items()
        if not name.startswith("blocks.") or name.startswith("blocks.0.")
    }
    assert len(_audio()) == 330
    assert len(_vae()) == 194
    assert round(_count(_wan()) / 1e9, 3) == 16.395
    assert round(_count(_audio()) / 1e9, 3) == 2.487
    assert round(_count(_vae()) / 1e6, 1) == 126.9
    assert round(_count(_wav2vec2()) / 1e6, 1) == 94.4


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3"])
def test_a_repackaged_transformer(tmp_path: Path, prefix: str, dtype: str) -> None:
    header = {prefix + name: stored for name, stored in _store(_wan(), dtype).items()}
    info = _inspect(tmp_path, "wan2.1_i2v_480p_14B.safetensors", header, {"format": "pt"})
    assert (info.kind, info.sizes) == (DIT, WAN_SIZES)
    assert info.num_parameters == _count(_wan())
    assert info.dtypes == {dtype: len(header)}
    assert info.quantization == ("fp8" if dtype == "F8_E4M3" else None)
    assert (info.prefix, info.speakers, info.num_files) == (prefix, None, 1)
    assert info.metadata == {"format": "pt"}
    assert info.uses.endswith("--dit; with an audio adapter for 40 layers of 5120")


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_scaled_transformer(tmp_path: Path, dtype: str, scale: str) -> None:
    header = _scale(_mix(_wan(), dtype, wide=lambda name: "modulation" in name), dtype, scale)
    info = _inspect(tmp_path, "Wan2_1-I2V-14B-480p_fp8_e4m3fn_scaled_KJ.safetensors", header)
    assert (info.kind, info.sizes, info.quantization) == (DIT, WAN_SIZES, "fp8-scaled")
    assert info.num_parameters == _count(_wan())
    num_matrices, num_modulations = 40 * 12, 41
    assert info.dtypes == {
        dtype: num_matrices + 1,  # and the mark
        "F32": num_modulations + num_matrices,  # and their scales
        "F16": len(_wan()) - num_matrices - num_modulations,
    }


def test_official_shards(tmp_path: Path) -> None:
    header = _store(_wan(), "BF16")
    names = list(header)
    weight_map: dict[str, str] = {}
    for number in range(7):
        part = names[number::7]
        shard = f"diffusion_pytorch_model-{number + 1:05}-of-00007.safetensors"
        _write(tmp_path / shard, {name: header[name] for name in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in (tmp_path, index, tmp_path / weight_map["head.modulation"]):
        info = inspect(path)
        assert (info.kind, info.sizes, info.num_files) == (DIT, WAN_SIZES, 7)
        assert info.num_parameters == _count(_wan())
        assert info.num_bytes == pytest.approx(2 * _count(_wan()), abs=200_000)
        assert info.uses.startswith("command line: --dit (ComfyUI wants one file")
    assert "in 7 files" in "\n".join(inspect(index).lines())


def test_a_merged_file(tmp_path: Path) -> None:
    info = _inspect(tmp_path, "merged.safetensors", _store(_wan() | _audio(), "BF16"))
    assert (info.kind, info.sizes) == (DIT, WAN_SIZES | {"audio heads": 40} | AUDIO_SIZES)
    assert info.num_parameters == _count(_wan() | _audio())
    assert info.speakers == "one, perhaps several: neither tensors nor name tell"
    assert info.uses.endswith("its audio adapter is inside")


def test_the_official_quantised_file(tmp_path: Path) -> None:
    header = _quanto(_wan() | _audio())
    info = _inspect(tmp_path, "quant_models/infinitetalk_single_fp8.safetensors", header)
    assert (info.kind, info.quantization) == (DIT, "quanto")
    assert info.uses.startswith("command line: --dit (")
    assert info.sizes == WAN_SIZES | {"audio heads": 40} | AUDIO_SIZES
    assert info.num_parameters == _count(_wan() | _audio())
    assert info.speakers == 'one, going by the word "single" in its name'


@pytest.mark.parametrize(
    ("name", "speakers"),
    [
        ("wan2.1_infiniteTalk_single_fp16.safetensors", "one"),
        ("wan2.1_infiniteTalk_multi_fp16.safetensors", "several"),
        ("single/infinitetalk.safetensors", "one"),
        ("multi/infinitetalk.safetensors", "several"),
    ],
)
def test_adapters_of_one_dtype(tmp_path: Path, name: str, speakers: str) -> None:
    info = _inspect(tmp_path / "folder", name, _store(_audio(), "F16"))
    assert (info.kind, info.sizes) == (ADAPTER, ADAPTER_SIZES)
    assert info.speakers is not None
    assert info.speakers.startswith(f"{speakers}, going by the word")
    assert info.uses.endswith(FITS_14B)


# Their lengths in bytes are published; the header is what is left beside the tensors.
@pytest.mark.parametrize(
    ("name", "speakers", "published"),
    [
        ("Wan2_1-InfiniTetalk-Single_fp16.safetensors", "one", 5_125_258_232),
        ("Wan2_1-InfiniteTalk-Multi_fp16.safetensors", "several", 5_124_439_112),
    ],
)
def test_adapters_of_mixed_dtypes(tmp_path: Path, name: str, speakers: str, published: int) -> None:
    def is_wide(key: str) -> bool:
        return "norm_x" not in key or speakers == "one"

    info = _inspect(tmp_path, name, _mix(_audio(), "F16", wide=is_wide))
    assert (info.kind, info.sizes, info.quantization) == (ADAPTER, ADAPTER_SIZES, None)
    assert info.dtypes.keys() == {"F16", "F32"}
    assert info.num_parameters == _count(_audio())
    assert info.num_bytes == pytest.approx(published, abs=1_000)
    assert info.speakers is not None
    assert info.speakers.startswith(f"{speakers}, going by the word")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize(("version", "speakers"), [("Single", "one"), ("Multi", "several")])
def test_scaled_adapters(tmp_path: Path, dtype: str, version: str, speakers: str) -> None:
    header = _scale(_mix(_audio(), dtype, wide=lambda _: True), dtype)
    name = f"Wan2_1-InfiniteTalk-{version}_{dtype.lower()}_scaled_KJ.safetensors"
    info = _inspect(tmp_path, name, header)
    assert (info.kind, info.sizes, info.quantization) == (ADAPTER, ADAPTER_SIZES, "fp8-scaled")
    assert info.num_parameters == _count(_audio())
    assert round(info.num_bytes / 1e9, 2) == 2.71
    assert info.dtypes == {dtype: 121, "F32": 330}
    assert info.uses.startswith("command line: --adapter (")
    assert info.uses.endswith(FITS_14B)
    assert info.speakers is not None
    assert info.speakers.startswith(f"{speakers}, going by the word")


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_vae_as_safetensors(tmp_path: Path, dtype: str) -> None:
    info = _inspect(tmp_path, "Wan2_1_VAE_bf16.safetensors", _store(_vae(), dtype))
    assert (info.kind, info.sizes) == (VAE, {"width": 96})
    assert info.num_parameters == _count(_vae())
    assert info.dtypes == {dtype: 194}
    assert "models/vae" in info.uses


def test_the_vae_as_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "Wan2.1_VAE.pth"
    with skip_data():
        torch.save({name: torch.empty(shape) for name, shape in _vae().items()}, path)
    info = inspect(path)
    assert (info.kind, info.sizes) == (VAE, {"width": 96})
    assert info.num_parameters == _count(_vae())
    assert info.dtypes == {"F32": 194}
    assert info.num_bytes == pytest.approx(4 * _count(_vae()), rel=0.001)


@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
@pytest.mark.parametrize("is_new", [False, True])
def test_the_audio_encoder_in_both_spellings(tmp_path: Path, prefix: str, is_new: bool) -> None:
    shapes = {prefix + name: shape for name, shape in _wav2vec2().items()}
    if is_new:
        names = {"weight_g": "original0", "weight_v": "original1"}
        shapes = {
            name.replace(old, f"parametrizations.weight.{new}"): shape
            for name, shape in shapes.items()
            for old, new in names.items()
            if old in name
        } | {name: shape for name, shape in shapes.items() if not name.endswith(tuple(names))}
    if prefix:
        shapes |= {"quantizer.codevectors": (1, 640, 128)} | _linear("project_q", 256, 256)
    name = "wav2vec2-chinese-base_fp16.safetensors"
    info = _inspect(tmp_path, name, _store(shapes, "F16"))
    assert (info.kind, info.sizes) == (AUDIO_ENCODER, {"width": 768, "layers": 12})
    assert info.uses.endswith("with an adapter of 9216 values per frame")


def test_the_text_encoder(tmp_path: Path) -> None:
    header = _scale(_store(_umt5(), "F8_E4M3"), "F8_E4M3") | {"spiece_model": ("U8", (4_548_313,))}
    info = _inspect(tmp_path, "umt5_xxl_fp8_e4m3fn_scaled.safetensors", header)
    assert info.kind == TEXT_ENCODER
    assert info.sizes == {"width": 4096, "layers": 24, "vocabulary": 256384}
    assert info.quantization == "fp8-scaled"


def test_the_image_encoder(tmp_path: Path) -> None:
    info = _inspect(tmp_path, "clip_vision_h.safetensors", _store(_clip(), "F16"))
    assert (info.kind, info.sizes) == (IMAGE_ENCODER, {"width": 1280, "layers": 32})


def test_a_step_distilled_lora(tmp_path: Path) -> None:
    header: Header = {}
    for name, shape in _wan().items():
        if _is_matrix(name, shape):
            layer = "diffusion_model." + name.removesuffix(".weight")
            header[f"{layer}.lora_down.weight"] = ("BF16", (64, shape[1]))
            header[f"{layer}.lora_up.weight"] = ("BF16", (shape[0], 64))
            header[f"{layer}.diff_b"] = ("BF16", (shape[0],))
    name = "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors"
    info = _inspect(tmp_path, name, header)
    assert (info.kind, info.sizes) == (LORA, {"rank": 64, "layers": 480})
    assert info.prefix == "diffusion_model."


def test_a_transformer_that_turbotalk_cannot_drive_is_told(tmp_path: Path) -> None:
    name = "wan2.1_t2v_14B_fp16.safetensors"
    info = _inspect(tmp_path, name, _store(_wan(16, has_image=False), "F16"))
    assert (info.kind, info.sizes["image width"]) == (DIT, 0)
    assert info.uses.startswith("nothing here: TurboTalk drives image-to-video Wan 2.1")
    assert "36 input channels, this one has 16" in info.uses


# Linux counts pages of mapped files that were looked at, and its peak can be set back.
MEASURE = """
import sys
from pathlib import Path
import torch
from turbotalk_core.checkpoints.inspect import inspect

def grow(call):
    def peak():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    call()
    return peak() - before

def read_all(path):
    for tensor in torch.load(path, mmap=True, weights_only=True).values():
        tensor.sum()

first, *paths = map(Path, sys.argv[1:])
inspect(first)  # imports what it needs
print(grow(lambda: [inspect(path) for path in paths]), grow(lambda: read_all(paths[-1])))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone measures this")
def test_a_header_is_read_without_the_data(tmp_path: Path) -> None:
    names = ("small.pth", "merged.safetensors", "vae.pth")
    small, merged, pickled = (tmp_path / name for name in names)
    torch.save({"a": torch.zeros(1)}, small)
    _write(merged, _store(_wan() | _audio(), "BF16"))
    with skip_data():
        torch.save({name: torch.empty(shape) for name, shape in _vae().items()}, pickled)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, merged, pickled],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    told, all_read = map(int, done.stdout.split())
    assert merged.stat().st_size > 37e9
    assert told < 50e6  # of 38 GB
    assert all_read > 0.9 * pickled.stat().st_size  # the measure does see what is read
