"""Search of model files, and their shipped settings."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.family import CONFIG
from turbotalk_core.audio.windows import take_windows
from turbotalk_core.benchmark.report import read_sizes
from turbotalk_core.checkpoints.networks import save_dit
from turbotalk_core.chunking.plan import plan_chunks
from turbotalk_core.errors import CheckpointError, RequestError
from turbotalk_core.loading import (
    ADAPTER,
    DMD,
    DMD_ADAPTER,
    EMBEDDED_MODELS,
    STUDENT,
    STUDENT_ADAPTER,
    TEACHER,
    compile_networks,
    find_model_files,
    load_models,
    read_request,
)
from turbotalk_core.models.denoiser import WanDenoiser
from turbotalk_core.models.wan import WanModel
from turbotalk_core.types import AudioFeatures, Conditioning


def test_the_student_is_taken_where_there_is_one(models: Path, tmp_path: Path) -> None:
    files = find_model_files(models)
    assert (files.dit.name, files.adapter.name) == (TEACHER, ADAPTER)
    for name in ("audio_encoders", "vae"):
        (tmp_path / name).symlink_to(models / name)
    for folder, name in (("diffusion_models", STUDENT), ("model_patches", STUDENT_ADAPTER)):
        shutil.copytree(models / folder, tmp_path / folder)
        (tmp_path / folder / name).touch()
    files = find_model_files(tmp_path)
    assert (files.dit.name, files.adapter.name) == (STUDENT, STUDENT_ADAPTER)
    assert find_model_files(tmp_path, num_steps=1) == files
    assert find_model_files(tmp_path, num_steps=2).dit.name == TEACHER
    for folder, name in (("diffusion_models", DMD), ("model_patches", DMD_ADAPTER)):
        (tmp_path / folder / name).touch()
    for num_steps in (2, 4):
        files = find_model_files(tmp_path, num_steps=num_steps)
        assert (files.dit.name, files.adapter.name) == (DMD, DMD_ADAPTER)
    assert find_model_files(tmp_path, num_steps=5).dit.name == TEACHER
    # Each has learnt with its own adapter.
    assert find_model_files(tmp_path, dit=TEACHER).adapter.name == ADAPTER


def test_the_student_named_has_its_own_adapter(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    for folder, teachers, students in (
        ("diffusion_models", TEACHER, STUDENT),
        ("model_patches", ADAPTER, STUDENT_ADAPTER),
    ):
        (tmp_path / folder / teachers).rename(tmp_path / folder / students)
    assert find_model_files(tmp_path, dit=STUDENT).adapter.name == STUDENT_ADAPTER


def _save_dit(path: Path, settings: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        save_dit(path, WanModel(replace(CONFIG, audio_heads=None)), settings)


def test_a_file_without_settings_gets_those_of_the_reference(tmp_path: Path) -> None:
    _save_dit(tmp_path / "bare.safetensors", {})
    request = read_request(tmp_path / "bare.safetensors")
    assert (request.num_inference_steps, request.schedule, request.shift) == (40, "reference", 7)
    assert (request.update, request.audio_guidance_scale) == ("euler", 4)
    assert (request.chunk_frames, request.num_motion_frames) == (81, 9)
    assert not request.anchors_chunks


def test_the_embedded_students_are_anchored() -> None:
    folder = EMBEDDED_MODELS / "diffusion_models"
    shipped = {name: read_request(folder / name).anchors_chunks for name in (STUDENT, DMD, TEACHER)}
    assert shipped == {STUDENT: True, DMD: True, TEACHER: False}


def test_shipped_settings_out_of_range_blame_the_file(tmp_path: Path) -> None:
    _save_dit(tmp_path / "odd.safetensors", {"shift": -1})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors cannot be used: got shift -1"):
        read_request(tmp_path / "odd.safetensors")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_networks_say_the_same(
    models: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As graphs that torch runs as they are, and as graphs that g++ compiles for minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    files = find_model_files(models)
    plain, compiled = (load_models(files, torch.device("cpu")) for _ in range(2))
    compile_networks(compiled, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    latents_BCFHW = torch.randn(1, 16, 3, 4, 4, generator=generator)
    conditioning = Conditioning(reference_BCFHW=torch.randn(1, 20, 3, 4, 4, generator=generator))
    width = read_sizes(files).projection.frame_width
    rows_TLD = torch.randn(9, 1, width, generator=generator)
    features = AudioFeatures(features_TLD=rows_TLD, num_frames=9)
    chunk = plan_chunks(9, 9, 1).chunks[0]
    said = []
    for networks in (plain, compiled):
        with torch.no_grad():
            tokens = networks.adapter(take_windows(features, chunk))
            velocity = networks.denoiser(latents_BCFHW, 0.5, conditioning, tokens)
            said.append((velocity, networks.vae.decode(latents_BCFHW)))
    for expected, told in zip(*said, strict=True):
        torch.testing.assert_close(told, expected, atol=1e-4, rtol=1e-4)
    assert isinstance(compiled.denoiser, WanDenoiser)
    assert all(block._compiled_call_impl is not None for block in compiled.denoiser.model.blocks)


def test_compiling_for_a_cpu_needs_a_compiler(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbotalk_core.loading.which", lambda _: None)
    loaded = load_models(find_model_files(models), torch.device("cpu"))
    with pytest.raises(RequestError, match="there is none; install g"):
        compile_networks(loaded, torch.device("cpu"))
