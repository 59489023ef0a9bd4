"""The codec's training on pictures made here: what it counts, that it learns, what it writes."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.avatars.mouth import MOUTH_COLOUR
from training.avatars.synthetic import SyntheticClip
from training.tiny import vae as trainer
from training.tiny.vae import VaeRecipe, cut_crops, draw_frames, score_vae, train_vae, vae_loss
from turbotalk_core.checkpoints.inspect import inspect
from turbotalk_core.checkpoints.networks import load_vae
from turbotalk_core.models.vae import WanVAE


@dataclass(frozen=True, kw_only=True)
class SmallRecipe(VaeRecipe):
    """Seconds instead of an hour."""

    dim: int = 2
    num_clips: int = 2
    image_steps: int = 10
    image_batch: int = 2
    clip_steps: int = 3
    clip_batch: int = 2
    num_frames: int = 5
    crop_size: int = 16


RECIPE = SmallRecipe()


def _draw_pool(num_clips: int, num_frames: int, size: int) -> Tensor:
    """Clips of one random colour each, a little noisy."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(30, 226, (num_clips, 3, 1, 1, 1), generator=generator)
    noise = torch.randint(-20, 21, (num_clips, 3, num_frames, size, size), generator=generator)
    return (colours + noise).to(torch.uint8)


def _draw_noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class PerfectVae(WanVAE):
    """Reconstructs what it was given, off by a constant, from standard normal latents."""

    def __init__(self, offset: float) -> None:
        super().__init__(1)
        self.offset = offset
        self.seen = torch.empty(0)

    def posterior(self, frames_BCTHW: Tensor, stream: object = None) -> tuple[Tensor, Tensor]:
        self.seen = frames_BCTHW
        num_latents = (frames_BCTHW.shape[2] + 3) // 4
        mean, std = (x.view(-1, 1, 1, 1) for x in (self.latent_mean_C, self.latent_std_C))
        shape = (frames_BCTHW.shape[0], 16, num_latents, 2, 2)
        return mean.expand(shape), (2 * std.log()).expand(shape)

    def reconstruct(self, raw_BCFHW: Tensor, stream: object = None) -> Tensor:
        return self.seen + self.offset


def test_crops_are_pieces_of_the_pool_or_their_mirror_images() -> None:
    pool = torch.arange(2 * 3 * 2 * 6 * 6).remainder(256).view(2, 3, 2, 6, 6).to(torch.uint8)
    pieces = {
        tuple(piece.flatten().tolist()): is_mirrored
        for clip in pool
        for top in range(3)
        for left in range(3)
        for is_mirrored in (False, True)
        for piece in [clip[:, :, top : top + 4, left : left + 4]]
        for piece in [piece.flip(-1) if is_mirrored else piece]
    }
    crops = cut_crops(pool, 60, 4, torch.Generator().manual_seed(0))
    assert crops.shape == (60, 3, 2, 4, 4)
    found = [tuple(((crop + 1) * 127.5).round().int().flatten().tolist()) for crop in crops]
    assert all(piece in pieces for piece in found)
    assert len(set(found)) > 20
    assert 15 < sum(pieces[piece] for piece in found) < 45


def _score(offset: float, frames: Tensor) -> tuple[Tensor, Tensor]:
    return vae_loss(PerfectVae(offset), frames, _draw_noise(2, 16, 2, 2, 2), RECIPE)


def test_a_perfect_codec_with_normal_latents_loses_nothing() -> None:
    loss, error = _score(0.0, torch.rand(2, 3, 5, 16, 16) * 2 - 1)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert float(error) == 0


def test_a_constant_error_counts_once_and_not_as_edge_or_motion() -> None:
    loss, error = _score(0.25, torch.zeros(2, 3, 5, 16, 16))
    assert float(loss) == pytest.approx(0.25, abs=1e-5)
    assert float(error) == pytest.approx(0.0625, abs=1e-5)
    assert not error.requires_grad


def test_the_place_where_a_mouth_opens_counts_more_in_the_whole_clip() -> None:
    frames = torch.zeros(2, 3, 5, 16, 16)
    frames[1, :, 3, 7, 9] = torch.tensor(MOUTH_COLOUR) * 2 - 1  # one pixel, in one frame
    loss, _ = _score(0.25, frames)
    share = 9 / (2 * 16 * 16)  # the pixel and its neighbours, of two clips
    assert float(loss) == pytest.approx(0.25 * (1 + RECIPE.mouth_weight * share), abs=1e-5)


def test_single_frames_have_no_motion_to_miss() -> None:
    vae = WanVAE(1)
    frames, noise = torch.zeros(1, 3, 1, 16, 16), _draw_noise(1, 16, 1, 2, 2)
    still = vae_loss(vae, frames, noise, replace(RECIPE, motion_weight=0.0))[0]
    assert torch.equal(vae_loss(vae, frames, noise, replace(RECIPE, motion_weight=9.0))[0], still)


def test_training_lowers_the_loss() -> None:
    pool = _draw_pool(2, 5, 16)
    frames = cut_crops(pool, 4, 16, torch.Generator().manual_seed(5))
    noise = _draw_noise(4, 16, 2, 2, 2)
    trained, log = train_vae(RECIPE, pool, compiles=False)
    untrained, _ = train_vae(replace(RECIPE, image_steps=0, clip_steps=0), pool, compiles=False)
    with torch.no_grad():
        after, before = (vae_loss(vae, frames, noise, RECIPE)[0] for vae in (trained, untrained))
    assert after < 0.8 * before
    assert log == []  # an entry per hundred steps


@pytest.mark.slow
def test_a_decoder_alone_learns_from_noisy_latents_and_leaves_the_encoder() -> None:
    recipe = replace(RECIPE, image_steps=20, decoder_noise=0.5)
    pool = _draw_pool(2, 5, 16)
    frames = cut_crops(pool, 4, 16, torch.Generator().manual_seed(5))
    noise = 0.25 * _draw_noise(4, 16, 2, 2, 2)
    initial, _ = train_vae(RECIPE, pool)
    before = copy.deepcopy(initial)
    trained, _ = train_vae(recipe, pool, initial=initial)
    with torch.no_grad():
        after, earlier = (vae_loss(vae, frames, noise, recipe)[0] for vae in (trained, before))
    assert after < 0.95 * earlier
    assert torch.equal(trained.encode(frames), before.encode(frames))


def test_noise_on_the_latents_of_the_decoder_reaches_it_as_it_is() -> None:
    vae = WanVAE(1)
    vae.initialize()
    frames, noise = torch.zeros(1, 3, 5, 16, 16), _draw_noise(1, 16, 2, 2, 2)
    recipe = replace(
        RECIPE, mouth_weight=0.0, edge_weight=0.0, motion_weight=0.0, decoder_noise=1.0
    )
    loss, _ = vae_loss(vae, frames, noise, recipe)
    expected = vae.decode(vae.encode(frames) + noise)  # cut to the range of pixels, as a file is
    assert float(expected.abs().max()) < 1
    assert loss.item() == pytest.approx(expected.abs().mean().item(), rel=1e-4)


def test_the_seed_decides_the_weights() -> None:
    def train(seed: int) -> Tensor:
        recipe = replace(RECIPE, seed=seed, image_steps=1, clip_steps=1)
        vae, _ = train_vae(recipe, _draw_pool(2, 5, 16), compiles=False)
        return torch.cat([weight.flatten() for weight in vae.parameters()])

    assert torch.equal(train(0), train(0))
    assert not torch.equal(train(0), train(1))


def test_scores_of_a_known_error(
    draw_humming_clip: Callable[[str, int, int], SyntheticClip], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = WanVAE(1)
    monkeypatch.setattr(vae, "encode", lambda frames: frames)
    monkeypatch.setattr(vae, "decode", lambda frames: frames + 0.2)
    clips = [draw_humming_clip("heldout", seed, 21) for seed in (3, 4)]
    scores = score_vae(vae, clips)
    flat = torch.stack([clip.frames_CTHW for clip in clips])
    assert scores["psnr"] == 20  # 0.2 of a range of 2 is a tenth
    assert scores["edge_ratio"] == scores["motion_ratio"] == 1
    assert scores["sync_correlation"] > 0.95
    assert scores["latent_mean"] == pytest.approx(float(flat.mean()), abs=1e-4)
    assert scores["latent_std"] == pytest.approx(float(flat.std()), abs=1e-4)


def test_a_codec_that_freezes_the_picture_has_no_motion_and_no_voice(
    draw_humming_clip: Callable[[str, int, int], SyntheticClip], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = WanVAE(1)
    monkeypatch.setattr(vae, "encode", lambda frames: frames)
    monkeypatch.setattr(vae, "decode", lambda frames: frames[:, :, :1].expand_as(frames))
    scores = score_vae(vae, [draw_humming_clip("heldout", 3, 21)])
    assert scores["motion_ratio"] == scores["sync_correlation"] == 0


def test_a_snapshot_is_a_codec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainer, "SNAPSHOT_STEPS", 4)
    recipe = replace(RECIPE, image_steps=5, clip_steps=0)
    path = tmp_path / "snapshot.safetensors"
    train_vae(recipe, _draw_pool(2, 5, 16), snapshot=path)
    assert load_vae(path).dim == RECIPE.dim
    assert inspect(path).settings["step"] == 4


@pytest.mark.usefixtures("_espeak")
def test_frames_are_a_piece_of_an_utterance() -> None:
    frames = draw_frames("heldout", 1, 5, seconds=0.8)
    assert frames.shape == (3, 5, 128, 128)
    assert frames.dtype == torch.uint8
    assert torch.equal(frames, draw_frames("heldout", 1, 5, seconds=0.8))
    assert not torch.equal(frames, draw_frames("train", 1, 5, seconds=0.8))


def test_the_command_writes_the_codec_and_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[tuple[str, int]] = []

    def draw(split: str, seed: int, num_frames: int) -> Tensor:
        drawn.append((split, seed))
        return _draw_pool(1, num_frames, 16)[0]

    monkeypatch.setattr(trainer, "VaeRecipe", SmallRecipe)
    monkeypatch.setattr(trainer, "draw_frames", draw)
    monkeypatch.setattr(trainer, "draw_pairs", lambda seed, count, frames: [(0, None)] * count)
    monkeypatch.setattr(trainer, "score_vae", lambda vae, clips: {"clips": len(clips)})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    path = tmp_path / "vae.safetensors"
    options = ["--image-steps", "1", "--clip-steps", "0", "--clips", "2", "--seed", "7"]
    monkeypatch.setattr(sys, "argv", ["vae", "--out", str(path), *options])
    trainer.main()
    assert load_vae(path).dim == RECIPE.dim
    assert drawn == [("train", 0), ("train", 1)]
    note = inspect(path).settings
    written = json.loads(path.with_suffix(".json").read_text())
    assert note["recipe"] == written["recipe"]
    assert written["recipe"]["seed"] == 7
    assert written["scores"] == note["scores"] == {"clips": 12}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["vae.json", "vae.safetensors"]
    again = tmp_path / "again.safetensors"
    options = ["--init", str(path), "--decoder-noise", "0.1", *options]
    monkeypatch.setattr(sys, "argv", ["vae", "--out", str(again), *options])
    trainer.main()
    record = json.loads(again.with_suffix(".json").read_text())
    assert record["recipe"]["decoder_noise"] == 0.1
    assert record["before"] == written
