"""Sizes come from files that are there, else from presets, and a stored recipe needs neither."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.family import write_family
from tests.training.tiny_networks import AUDIO_CONFIG, SHIPPED, VIDEO_CONFIG, make_networks
from training.recipe import FOLDER, WeightSource, load_recipe, store_recipe
from training.train import network_kind
from training.trainer.sizes import PRESETS, resolve_recipe, resolve_source
from turbotalk_core.errors import MismatchError
from turbotalk_core.loading import ADAPTER, EMBEDDED_MODELS, TEACHER
from turbotalk_core.models.audio_adapter import AudioAdapterConfig
from turbotalk_core.models.wan import WanConfig

VIDEO = replace(VIDEO_CONFIG, num_layers=1)


@pytest.fixture
def source(tmp_path: Path) -> WeightSource:
    write_family(tmp_path, make_networks(), SHIPPED)
    return WeightSource(
        dit=tmp_path / "diffusion_models" / TEACHER,
        adapter=tmp_path / "model_patches" / ADAPTER,
        preset="tiny",
    )


def test_sizes_are_those_of_the_files(source: WeightSource) -> None:
    resolved = resolve_source(source)
    assert (WanConfig(**resolved.video), AudioAdapterConfig(**resolved.audio)) == (
        VIDEO,
        AUDIO_CONFIG,
    )
    assert resolve_source(resolved) == resolved
    network = network_kind(load_recipe("tiny")).load(source)
    assert all(weight.dtype == torch.float32 for weight in network.parameters())


def test_files_that_are_not_there_have_the_sizes_of_the_preset(source: WeightSource) -> None:
    for preset, sizes in PRESETS.items():
        for dit in (None, Path("nowhere.safetensors")):
            resolved = resolve_source(WeightSource(dit=dit, preset=preset))
            assert (resolved.video, resolved.audio) == (sizes.video, sizes.audio)
    # Without its adapter a transformer says nothing of the audio.
    alone = resolve_source(replace(source, adapter=None))
    assert alone.audio == PRESETS["tiny"].audio
    assert WanConfig(**alone.video) == replace(VIDEO, audio_heads=6, audio_token_dim=64)


def test_what_the_recipe_says_wins_and_other_files_are_refused(source: WeightSource) -> None:
    changed = replace(source, video={"frequency_dim": 32})
    assert resolve_source(changed).video["frequency_dim"] == 32
    with pytest.raises(MismatchError, match="the sizes are read from the file"):
        network_kind(load_recipe("tiny")).load(changed)
    full = WeightSource(video=asdict(VIDEO), audio=asdict(AUDIO_CONFIG))
    assert resolve_source(full) == full  # as it was, so that its fingerprint is


def test_a_stored_recipe_is_read_without_files(source: WeightSource, tmp_path: Path) -> None:
    recipe = resolve_recipe(replace(load_recipe("tiny"), weights={"teacher": source}))
    store_recipe(recipe, tmp_path / "recipe.yaml")
    for path in (source.dit, source.adapter):
        assert path is not None
        path.unlink()
    stored = resolve_recipe(load_recipe(str(tmp_path / "recipe.yaml")))
    assert stored == recipe
    assert stored.fingerprint(0) == recipe.fingerprint(0)


# Settings as they were, where they have changed: a run goes on with the recipe stored with it.
STAGE_2 = """{num_steps: 3, shift: 11.0, student: {learning_rate: 4e-7}, warmup_steps: 500,
  discriminator: {trains: lora, learning_rate: 2e-5}}"""
BEFORE = {
    "turbotalk_14b_adversarial": ("phases.three.settings=null", f"phases.three.settings={STAGE_2}"),
    "turbotalk_14b_dmd": ("phases.dmd.settings.score_shift=11.0",),
}
# Of the recipes as they were when they repeated the sizes, in the phase that a run begins with.
FINGERPRINTS = {
    "ablation": "d7fe3eab67f37e92",
    "tiny": "6b1ff7c433632927",
    "tiny_continuation": "ef231325ed9b7d54",
    "tiny_teacher": "23c35d00d90e9bea",
    "turbotalk_14b_adversarial": "4a38f33c6213713a",
    "turbotalk_14b_dmd": "8d2aabe64bcf16ec",
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_runs_from_before_can_be_resumed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)  # where no file of theirs is
    recipe = resolve_recipe(load_recipe(name, BEFORE.get(name, ())))
    assert FINGERPRINTS[name] in recipe.list_fingerprints(0)


@pytest.mark.weights
def test_the_embedded_files_have_the_sizes_of_their_preset() -> None:
    source = WeightSource(
        dit=EMBEDDED_MODELS / "diffusion_models" / TEACHER,
        adapter=EMBEDDED_MODELS / "model_patches" / ADAPTER,
    )
    resolved = resolve_source(source)
    assert (resolved.video, resolved.audio) == (PRESETS["tiny"].video, PRESETS["tiny"].audio)
