"""Validation on held-out clips, and samples of a teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.training.data.sets import make_sample, write_set
from tests.training.tiny_networks import make_batch, make_networks
from tests.training.tiny_run import make_recipe, make_tiny_trainer
from training.data.footage import open_video
from training.methods.flow_matching import FlowMatching
from training.models.batch import Batch
from training.recipe import ValidationChoice
from training.trainer.validation import ValidationHook, sample_teacher
from turbotalk_core.checkpoints.networks import save_vae
from turbotalk_core.errors import TurboTalkError


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = {f"s{n}": make_sample(n, rows=4, columns=6) for n in range(3)}
    return write_set(tmp_path_factory.mktemp("heldout"), samples)


def _run(folder: Path, choice: ValidationChoice, **changes: Any) -> list[dict[str, Any]]:
    recipe = make_recipe(phases={"one": _phase("teacher"), "two": _phase("dmd")}, **changes)
    recipe = replace(
        recipe, validate=choice, clip=replace(recipe.clip, num_frames=17, num_image_tokens=0)
    )
    make_tiny_trainer(folder, recipe, hooks=[ValidationHook()]).run()
    text = (folder / "validation.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def _phase(name: str) -> dict[str, Any]:
    phase = make_recipe().phases[name]
    return {"method": phase.method, "steps": 2, "settings": dict(phase.settings)}


@pytest.mark.slow
def test_the_loss_of_the_same_clips_is_measured_every_few_steps(
    heldout: Path, tmp_path: Path
) -> None:
    lines = _run(tmp_path / "a", ValidationChoice(folder=heldout, every=1))
    assert [(line["step"], line["phase"]) for line in lines] == [
        (1, "one"),
        (2, "one"),
        (3, "two"),
        (4, "two"),
    ]
    losses = [line["heldout_loss"] for line in lines]
    assert losses[0] > losses[1]  # the teacher learns, and its clips and noise are the same
    assert not (tmp_path / "a" / "validation").exists()
    # Validation changes nothing, and the end of a phase is one in any case.
    rare = _run(tmp_path / "b", ValidationChoice(folder=heldout, every=100))
    assert rare == [lines[1], lines[3]]
    assert _log(tmp_path / "a") == _log(tmp_path / "b")


def _log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if key != "seconds"} for line in lines]


@pytest.mark.slow
def test_samples_become_videos_and_a_sheet(heldout: Path, tmp_path: Path) -> None:
    vae = tmp_path / "vae.safetensors"
    save_vae(vae, make_networks()[2], {})
    choice = ValidationChoice(folder=heldout, every=2, clips=2, vae=vae, steps=2)
    lines = _run(tmp_path / "run", choice)
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["motion_ratio"] > 0 for line in lines)
    for step in ("00000002", "00000004"):
        folder = tmp_path / "run" / "validation" / step
        assert sorted(path.name for path in folder.iterdir()) == [
            "clip_0.mp4",
            "clip_1.mp4",
            "sheet.png",
        ]
        with Image.open(folder / "sheet.png") as sheet:
            assert sheet.size == (8 * 48, 2 * 2 * 32)
        assert len(open_video(folder / "clip_0.mp4")) == 17


@pytest.mark.slow
def test_what_cannot_be_validated_is_known_before_the_first_step(
    heldout: Path, tmp_path: Path
) -> None:
    with pytest.raises(TurboTalkError, match="settings"):
        _run(tmp_path / "a", ValidationChoice(folder=tmp_path))
    with pytest.raises(TurboTalkError, match="no_vae"):
        _run(tmp_path / "b", ValidationChoice(folder=heldout, vae=tmp_path / "no_vae.safetensors"))
    for name in ("a", "b"):
        assert not (tmp_path / name / "log.jsonl").read_text()


def test_a_teacher_is_sampled_as_its_schedule_says() -> None:
    batch, levels, conditions = make_batch(), [], []

    def model(noisy: Tensor, sigma_B: Tensor, given: Batch, **which: bool) -> Tensor:
        levels.append(sigma_B[0].item())
        conditions.append((which["uses_text"], which["uses_audio"]))
        assert torch.equal(given.pin(noisy), noisy)
        return noisy - 2.0  # so that the clean latents at level 1 are 2

    generator = torch.Generator().manual_seed(0)
    made = sample_teacher(
        model, batch, generator, steps=3, shift=1.0, guidance_scale=5.0, audio_guidance_scale=4.0
    )
    assert levels == pytest.approx(3 * [1.0] + 3 * [0.5005] + 3 * [0.001], abs=1e-4)
    assert conditions == 3 * [(True, True), (False, True), (False, False)]
    assert torch.equal(batch.pin(made), made)
    conditions.clear()
    without_text = replace(batch, text_BND=None, null_text_BND=None)
    sample_teacher(model, without_text, generator, steps=1, shift=1.0, guidance_scale=5.0)
    assert conditions == [(True, True)]
    assert FlowMatching().shift == 7.0
