"""Which model files are found, and what they ship with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from turbotalk_core.errors import CheckpointError
from turbotalk_core.library import TEACHER, find_model_files, read_request
from turbotalk_core.model.checkpoint import save_dit
from turbotalk_core.model.wan import WanConfig, WanModel


def test_the_student_is_taken_where_there_is_one(models: Path, tmp_path: Path) -> None:
    assert find_model_files(models).dit.name == TEACHER
    for name in ("diffusion_models", "model_patches", "audio_encoders", "vae"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "diffusion_models").unlink()
    (tmp_path / "diffusion_models").mkdir()
    (tmp_path / "diffusion_models" / "turbotalk_tiny.safetensors").touch()
    assert find_model_files(tmp_path).dit.name == "turbotalk_tiny.safetensors"


def _save_dit(path: Path, settings: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        config = WanConfig(
            dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, image_dim=None,
            audio_heads=None,
        )  # fmt: skip
        save_dit(path, WanModel(config), settings)


def test_a_file_without_settings_gets_those_of_the_reference(tmp_path: Path) -> None:
    _save_dit(tmp_path / "bare.safetensors", {})
    request = read_request(tmp_path / "bare.safetensors")
    assert (request.num_inference_steps, request.schedule, request.shift) == (40, "reference", 7)
    assert (request.update, request.audio_guidance_scale) == ("euler", 4)
    assert (request.chunk_frames, request.num_motion_frames) == (81, 9)


def test_shipped_settings_out_of_range_blame_the_file(tmp_path: Path) -> None:
    _save_dit(tmp_path / "odd.safetensors", {"shift": -1})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors cannot be used: got shift -1"):
        read_request(tmp_path / "odd.safetensors")
