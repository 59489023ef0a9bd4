"""Model files of every dtype, and LoRAs, to networks on a fake CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.core.cuda.family import make_sizes, write_files
from tests.fake_cuda import CUDA, FakeCuda, write_unread
from turbotalk_core.checkpoints.networks import load_dit
from turbotalk_core.models.wan import WanModel

FLOAT8 = torch.float8_e4m3fn


def _call(model: WanModel) -> Tensor:
    return model(
        torch.zeros(1, 16, 3, 8, 12).to(CUDA),
        torch.full((1,), 500.0, device=CUDA),
        torch.zeros(1, 20, 3, 8, 12).to(CUDA),
        image_embeds_BND=torch.zeros(1, 257, 1280).to(CUDA),
        audio_BFND=torch.zeros(1, 3, 32, 768).to(CUDA),
    )


def _shapes() -> dict[str, Tensor]:
    with torch.device("meta"):
        return WanModel(make_sizes(1).transformer).half().state_dict()


def _scaled(per_row: bool) -> dict[str, Tensor]:
    """Return matrices in float8 with scales, and all other weights in float32."""
    weights = {}
    for name, weight in _shapes().items():
        if not (name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2):
            weights[name] = weight.float()
            continue
        weights[name] = torch.empty_like(weight, dtype=FLOAT8)
        shape = (weight.shape[0], 1) if per_row else ()
        scale = name.removesuffix("weight") + "scale_weight"
        weights[scale] = torch.empty(shape, device="meta")
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["float8", "scaled", "scaled per row", "prefixed"])
def test_a_file_of_any_dtype_computes_in_one(
    tmp_path: Path, stored: str, dtype: torch.dtype
) -> None:
    if stored == "float8":
        weights = {name: torch.empty_like(w, dtype=FLOAT8) for name, w in _shapes().items()}
    elif stored == "prefixed":
        weights = {f"model.diffusion_model.{name}": w for name, w in _shapes().items()}
    else:
        weights = _scaled(stored == "scaled per row")
    files = write_files(tmp_path, make_sizes(1))
    path = write_unread(tmp_path / "stored.safetensors", weights)
    with FakeCuda() as cuda, cuda.unread(), torch.no_grad():
        model, projection = load_dit(path, files.adapter, dtype)
        assert projection is not None
        model.to(CUDA)
        assert {(w.device.type, w.dtype) for w in model.parameters()} == {("cuda", dtype)}
        velocity = _call(model)
        assert (velocity.device.type, velocity.dtype) == ("cuda", torch.float32)
        projected = projection.to(CUDA)(
            torch.zeros(1, 5, 12, 768, dtype=dtype).to(CUDA),
            torch.zeros(1, 2, 8, 12, 768, dtype=dtype).to(CUDA),
        )
        assert (projected.device.type, projected.dtype) == ("cuda", dtype)


@pytest.mark.parametrize("names", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_loras_are_merged(tmp_path: Path, names: tuple[str, str]) -> None:
    files = write_files(tmp_path, make_sizes(1))
    down, up = names
    changes: dict[str, Tensor] = {}
    for name, weight in _shapes().items():
        layer = f"diffusion_model.{name.rpartition('.')[0]}"
        if name.startswith("blocks.0.ffn") and weight.ndim == 2:
            changes[f"{layer}.{down}.weight"] = torch.empty(32, weight.shape[1], device="meta")
            changes[f"{layer}.{up}.weight"] = torch.empty(weight.shape[0], 32, device="meta")
            changes[f"{layer}.alpha"] = torch.empty((), device="meta")
        elif name == "blocks.0.self_attn.q.bias":
            changes[f"{layer}.diff_b"] = torch.empty_like(weight)
    lora = write_unread(tmp_path / "lora.safetensors", changes)
    with FakeCuda() as cuda, cuda.unread(), torch.no_grad():
        model, _ = load_dit(files.dit, files.adapter, torch.bfloat16, [(lora, 0.5)])
        before = cuda.live
        model.to(CUDA)
        assert cuda.live - before == sum(weight.nbytes for weight in model.parameters())
        assert {(w.device.type, w.dtype) for w in model.parameters()} == {("cuda", torch.bfloat16)}
        assert _call(model).device.type == "cuda"
