"""The teacher's training on made-up clips: what is drawn, what counts, and how it goes on."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training import teacher
from training.batch import CONTEXT_LATENTS, Batch
from training.data.precompute import weigh_places
from training.teacher import (
    Run,
    TeacherRecipe,
    build_networks,
    build_optimizers,
    draw_batch,
    draw_halves,
    teacher_loss,
)
from training.teacher_data import LONG_FRAMES, SHORT_FRAMES, TeacherClip, save_clip
from turbotalk_core.audio.windows import take_windows
from turbotalk_core.library import ADAPTER, TEACHER, read_request
from turbotalk_core.model.checkpoint import inspect, load_dit
from turbotalk_core.types import AudioFeatures, Chunk

OPENING, LATER = 1.0, -1.0  # mean brightness, which tells the clips apart
LATER_START = 40
NUM_ROWS = 225


@dataclass(frozen=True, kw_only=True)
class SmallRecipe(TeacherRecipe):
    """Seconds instead of hours."""

    dim: int = 24
    ffn_dim: int = 16
    num_heads: int = 2
    num_layers: int = 1
    hidden_dim: int = 8
    num_tokens: int = 2
    token_dim: int = 6
    short_steps: int = 3
    short_batch: int = 2
    long_steps: int = 1
    long_batch: int = 1


RECIPE = SmallRecipe()


def _make_clip(seed: int, num_frames: int, *, num_voices: int = 1) -> TeacherClip:
    generator = torch.Generator().manual_seed(seed)
    shape = (16, (num_frames - 1) // 4 + 1, 4, 4 * num_voices)

    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    return TeacherClip(
        opening_CFHW=(draw(*shape) + OPENING).half(),
        later_CFHW=(draw(*shape) + LATER).half(),
        later_start=LATER_START,
        reference_CFHW=draw(*shape).half(),
        features_PTLD=(1 + draw(num_voices, NUM_ROWS, 2, 3).abs()).half(),
        num_frames=NUM_ROWS - 25,
    )


@pytest.fixture(scope="module")
def clips() -> list[TeacherClip]:
    return [_make_clip(0, LONG_FRAMES), _make_clip(1, SHORT_FRAMES)]


def _draw(clips: list[TeacherClip], size: int, recipe: TeacherRecipe = RECIPE) -> Batch:
    weights = [weigh_places(clip.opening_CFHW, clip.later_CFHW) for clip in clips]
    generator = torch.Generator().manual_seed(0)
    return draw_batch(clips, weights, SHORT_FRAMES, size, recipe, generator)


def _is_later(batch: Batch) -> Tensor:
    return batch.latents_BCFHW.mean((1, 2, 3, 4)) < 0


def _make_run(clips: list[TeacherClip], recipe: TeacherRecipe = RECIPE) -> Run:
    return Run(recipe, clips, compiles=False)


def test_a_batch_holds_chunks_of_the_length_asked_for(clips: list[TeacherClip]) -> None:
    batch = _draw(clips, 5)
    assert batch.latents_BCFHW.shape == (5, 16, 9, 4, 4)
    assert batch.reference_BCFHW.shape == (5, 20, 9, 4, 4)
    assert batch.first_BPKLD.shape == (5, 1, 5, 2, 3)
    assert batch.later_BPFKLD.shape == (5, 1, 8, 8, 2, 3)
    assert batch.pinned_BF.shape == (5, 9)
    assert batch.weight_BHW is not None
    assert batch.weight_BHW.shape == (5, 4, 4)
    assert batch.regions_PHW is None
    tensors = (getattr(batch, field.name) for field in fields(batch))
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    assert dtypes == {torch.float32, batch.pinned_BF.dtype}


def test_only_the_first_latent_is_marked_as_given(clips: list[TeacherClip]) -> None:
    mask = _draw(clips, 3).reference_BCFHW[:, :4]
    assert bool((mask[:, :, 0] == 1).all())
    assert not mask[:, :, 1:].any()


def test_openings_and_later_clips_are_pinned_as_at_inference(clips: list[TeacherClip]) -> None:
    batch = _draw(clips, 200)
    num_pinned_B = batch.pinned_BF.sum(1)
    later_B = _is_later(batch)
    assert 60 < int(later_B.sum()) < 140
    assert set(num_pinned_B[later_B].tolist()) == {CONTEXT_LATENTS}
    assert set(num_pinned_B[~later_B].tolist()) == {1, CONTEXT_LATENTS}
    # Pinned latents are the first ones.
    assert torch.equal(batch.pinned_BF, torch.arange(9) < num_pinned_B[:, None])


@pytest.mark.parametrize("num_voices", [1, 2])
def test_each_chunk_hears_its_own_part_of_each_voice(num_voices: int) -> None:
    clip = _make_clip(0, SHORT_FRAMES, num_voices=num_voices)
    batch = _draw([clip], 20, replace(RECIPE, audio_dropout=0.0))
    for place, is_later in enumerate(_is_later(batch).tolist()):
        start = LATER_START if is_later else 0
        stop = start + SHORT_FRAMES
        chunk = Chunk(index=0, start=start, stop=stop, keep_start=start, keep_stop=stop)
        for voice, features_TLD in enumerate(clip.features_PTLD.float()):
            features = AudioFeatures(features_TLD=features_TLD, num_frames=clip.num_frames)
            windows = take_windows(features, chunk)
            assert torch.equal(batch.first_BPKLD[place, voice], windows.first_KLD)
            assert torch.equal(batch.later_BPFKLD[place, voice], windows.later_FKLD)


@pytest.mark.parametrize("share", [0.0, 0.125, 1.0])
def test_the_wanted_share_hears_nothing(clips: list[TeacherClip], share: float) -> None:
    batch = _draw(clips, 400, replace(RECIPE, audio_dropout=share))
    silent_B = ~batch.first_BPKLD.flatten(1).any(1)
    assert torch.equal(silent_B, ~batch.later_BPFKLD.flatten(1).any(1))
    tolerance = 4 * math.sqrt(share * (1 - share) / 400)
    assert abs(float(silent_B.float().mean()) - share) <= tolerance


def test_each_of_a_pair_has_a_box_in_its_half() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        left, right, background = draw_halves(16, 32, generator)
        assert left[4:12, 4:12].all()
        assert right[4:12, 20:28].all()
        assert not left[:, 16:].any()
        assert not right[:, :16].any()
        assert torch.equal(left + right + background, torch.ones(16, 32))


def test_the_voices_of_a_pair_are_heard_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = _draw([_make_clip(0, SHORT_FRAMES, num_voices=2)], 2)
    networks = build_networks(RECIPE, frame_width=6)
    heard: list[Tensor] = []

    def predict(
        latents: Tensor, *_: Tensor, audio_BFND: Tensor, regions_PHW: Tensor, **_more: object
    ) -> Tensor:
        assert regions_PHW.shape == (3, 4, 8)
        heard.append(audio_BFND)
        return torch.zeros_like(latents)

    monkeypatch.setattr(networks.dit, "forward", predict)
    teacher_loss(networks, batch, torch.ones(2), torch.zeros_like(batch.latents_BCFHW))
    for voice in (0, 1):
        alone_BFND = networks.projection(batch.first_BPKLD[:, voice], batch.later_BPFKLD[:, voice])
        part_BFND = heard[0][:, :, RECIPE.num_tokens * voice : RECIPE.num_tokens * (voice + 1)]
        torch.testing.assert_close(part_BFND, alone_BFND)


class TestFlowLoss:
    """The loss of known velocities."""

    sigma_B = torch.tensor([0.3, 0.9])

    @pytest.fixture
    def batch(self, clips: list[TeacherClip]) -> Batch:
        return _draw(clips, 2)

    @pytest.fixture
    def noise(self, batch: Batch) -> Tensor:
        return torch.randn(batch.latents_BCFHW.shape, generator=torch.Generator().manual_seed(2))

    def _loss(
        self,
        monkeypatch: pytest.MonkeyPatch,
        batch: Batch,
        noise: Tensor,
        error: Tensor | float,
    ) -> tuple[float, Tensor]:
        """The loss where the network is off by an error, and the latents that it was shown."""
        networks = build_networks(RECIPE, frame_width=6)
        shown: list[Tensor] = []

        def predict(
            latents: Tensor,
            timestep: Tensor,
            *_: Tensor,
            audio_BFND: Tensor,
            regions_PHW: Tensor | None,
            **_more: object,
        ) -> Tensor:
            assert torch.equal(timestep, 1000 * self.sigma_B)
            assert audio_BFND.shape == (2, 9, 2, 6)
            assert regions_PHW is None
            shown.append(latents)
            return noise - batch.latents_BCFHW + error

        monkeypatch.setattr(networks.dit, "forward", predict)
        return float(teacher_loss(networks, batch, self.sigma_B, noise)), shown[0]

    def test_a_perfect_velocity_loses_nothing(
        self, monkeypatch: pytest.MonkeyPatch, batch: Batch, noise: Tensor
    ) -> None:
        loss, shown = self._loss(monkeypatch, batch, noise, 0.0)
        assert loss == 0
        pinned = batch.pinned_BF[:, None, :, None, None].expand_as(shown)
        assert torch.equal(shown[pinned], batch.latents_BCFHW[pinned])
        sigma = self.sigma_B.view(-1, 1, 1, 1, 1)
        noisy = (1 - sigma) * batch.latents_BCFHW + sigma * noise
        torch.testing.assert_close(shown[~pinned], noisy[~pinned])

    def test_a_constant_error_counts_its_square(
        self, monkeypatch: pytest.MonkeyPatch, batch: Batch, noise: Tensor
    ) -> None:
        assert self._loss(monkeypatch, batch, noise, 0.5)[0] == pytest.approx(0.25)

    def test_pinned_latents_do_not_count(
        self, monkeypatch: pytest.MonkeyPatch, batch: Batch, noise: Tensor
    ) -> None:
        error = 7.0 * batch.pinned_BF[:, None, :, None, None].float()
        assert self._loss(monkeypatch, batch, noise, error)[0] == 0

    def test_an_error_counts_by_its_place(
        self, monkeypatch: pytest.MonkeyPatch, batch: Batch, noise: Tensor
    ) -> None:
        error = torch.zeros(4, 4)
        error[1, 2] = 1.0
        free_B = (~batch.pinned_BF).sum(1)
        assert batch.weight_BHW is not None
        expected = float((batch.weight_BHW[:, 1, 2] * free_B).sum() / free_B.sum()) / 16
        assert self._loss(monkeypatch, batch, noise, error)[0] == pytest.approx(expected)


def test_muon_takes_the_matrices_of_the_blocks_and_all_weights_are_taken() -> None:
    networks = build_networks(RECIPE, frame_width=6)
    before = {name: weight.detach().clone() for name, weight in networks.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for weight in networks.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizers = build_optimizers(networks, RECIPE)
    optimizers.step(1.0)
    for name, weight in networks.named_parameters():
        assert not torch.equal(weight, before[name]), name
    muon, adam = (
        len(group["params"]) for state in optimizers.state_dict() for group in state["param_groups"]
    )
    matrices = [w for w in networks.dit.blocks.parameters() if w.ndim == 2]
    assert muon == len(matrices)
    assert muon + adam == len(before)


def test_training_learns(clips: list[TeacherClip]) -> None:
    run = _make_run(clips, replace(RECIPE, short_steps=40, long_steps=0, short_batch=4))
    losses = [run.advance() for _ in range(run.num_steps)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_every_weight_is_updated_sooner_or_later(clips: list[TeacherClip]) -> None:
    run = _make_run(clips)
    before = {name: weight.detach().clone() for name, weight in run.networks.named_parameters()}
    while run.step < run.num_steps:
        run.advance()
    untouched = {
        name
        for name, weight in run.networks.named_parameters()
        if torch.equal(weight, before[name])
    }
    # One row of null text is attended to whatever the question.
    kept = {"cross_attn.q", "cross_attn.k", "cross_attn.norm_q", "cross_attn.norm_k"}
    assert all(any(part in name for part in kept) for name in untouched)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    clips: list[TeacherClip], tmp_path: Path
) -> None:
    whole = _make_run(clips)
    expected = [whole.advance() for _ in range(4)]
    first = _make_run(clips)
    losses = [first.advance() for _ in range(2)]
    first.log.append({"step": 2, "loss": losses[-1]})
    first.save(tmp_path / "checkpoint.pt")
    second = _make_run(clips)
    second.load(tmp_path / "checkpoint.pt")
    assert second.log == first.log
    losses += [second.advance() for _ in range(2)]
    assert losses == expected
    assert second.step == whole.step == whole.num_steps
    state = second.networks.state_dict()
    assert all(torch.equal(state[k], t) for k, t in whole.networks.state_dict().items())
    assert second.ema.num_updates == whole.ema.num_updates
    assert all(torch.equal(second.ema.weights[k], t) for k, t in whole.ema.weights.items())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_last_steps_see_long_chunks_alone(
    clips: list[TeacherClip], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []
    real = teacher.draw_batch

    def spy(
        clips: Sequence[TeacherClip],
        weights_HW: Sequence[Tensor],
        num_frames: int,
        size: int,
        recipe: TeacherRecipe,
        generator: torch.Generator,
    ) -> Batch:
        seen.append((len(clips), num_frames, size))
        return real(clips, weights_HW, num_frames, size, recipe, generator)

    monkeypatch.setattr(teacher, "draw_batch", spy)
    run = _make_run(clips, replace(RECIPE, short_steps=1))
    for _ in range(run.num_steps):
        run.advance()
    assert seen == [(2, SHORT_FRAMES, 2), (1, LONG_FRAMES, 1)]

    seen.clear()
    with_pairs = [*clips, *(_make_clip(i, LONG_FRAMES, num_voices=2) for i in range(3))]
    recipe = replace(RECIPE, short_steps=3, long_steps=3, long_batch=4, pair_every=2)
    run = _make_run(with_pairs, recipe)
    for _ in range(run.num_steps):
        run.advance()
    short, long = (2, SHORT_FRAMES, 2), (1, LONG_FRAMES, 4)
    pairs_short, pairs_long = (3, SHORT_FRAMES, 1), (3, LONG_FRAMES, 2)
    assert seen == [pairs_short, short, pairs_short, long, pairs_long, long]


def test_what_is_exported_is_the_average_and_loads(
    clips: list[TeacherClip], tmp_path: Path
) -> None:
    run = _make_run(clips)
    run.advance()
    before = {key: tensor.clone() for key, tensor in run.networks.state_dict().items()}
    run.export(tmp_path, {"kind": "teacher", "steps": 20, "shift": 3.0})
    assert all(torch.equal(t, before[k]) for k, t in run.networks.state_dict().items())
    dit = tmp_path / "diffusion_models" / TEACHER
    model, projection = load_dit(dit, tmp_path / "model_patches" / ADAPTER)
    assert projection is not None
    assert model.config == run.networks.dit.config
    assert projection.config == run.networks.projection.config
    for name, module in (("dit.", model), ("projection.", projection)):
        for key, weight in module.named_parameters():
            assert torch.equal(weight, run.ema.weights[name + key].half().float())
    assert inspect(dit).settings == {"kind": "teacher", "steps": 20, "shift": 3.0}


def test_a_run_begins_with_the_weights_of_an_earlier_one(
    clips: list[TeacherClip], tmp_path: Path
) -> None:
    earlier = _make_run(clips)
    earlier.advance()
    earlier.export(tmp_path, {})
    later = _make_run(clips, replace(RECIPE, seed=1))
    later.begin_with(tmp_path)
    for name, weight in later.networks.named_parameters():
        assert torch.equal(weight, earlier.ema.weights[name].half().float())
        assert torch.equal(weight, later.ema.weights[name])
    assert later.step == 0


def test_the_command_goes_on_and_writes_its_files(
    clips: list[TeacherClip], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for place, clip in enumerate(clips):
        save_clip(data / f"{place:06d}.safetensors", clip)
    models, run = tmp_path / "models", tmp_path / "run"
    folders = ["--data", str(data), "--out", str(models), "--run", str(run)]
    monkeypatch.setattr(teacher, "TeacherRecipe", SmallRecipe)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)

    def train(long_steps: int) -> dict:
        steps = ["--short-steps", "1", "--long-steps", str(long_steps)]
        monkeypatch.setattr(sys, "argv", ["teacher", *folders, *steps])
        teacher.main()
        return torch.load(run / "checkpoint.pt", weights_only=True)

    assert train(0)["step"] == 1
    assert train(1)["step"] == 2
    folders += ["--init", str(tmp_path / "nowhere")]  # a run that was begun goes on
    assert train(1)["step"] == 2
    request = read_request(models / "diffusion_models" / TEACHER)
    assert (request.chunk_frames, request.height, request.shift) == (81, 128, 3.0)
    written = json.loads((run / "teacher.json").read_text())
    assert (written["avatars"], written["pairs"]) == (2, 0)
    assert written["recipe"]["long_steps"] == 1
