"""Trained networks: their inputs, and the initial discriminator."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.tiny_networks import make_batch, make_model
from training.models.batch import Batch
from training.models.lora import add_adapters
from training.models.networks import Discriminator, TalkingModel, predict_denoised, tap_blocks
from turbotalk_core.checkpoints.inspect import inspect
from turbotalk_core.errors import MismatchError
from turbotalk_core.models.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.models.denoiser import ProjectionAdapter, WanDenoiser
from turbotalk_core.types import AudioWindows, Conditioning

SIGMA_B = torch.tensor([0.9, 0.3])


@torch.no_grad()
def _call(model: TalkingModel, **conditions: bool | Tensor) -> Tensor:
    batch = make_batch()
    return model(batch.latents_BCFHW, SIGMA_B, batch, **conditions)


def test_it_is_the_network_of_the_pipeline() -> None:
    model, batch = make_model(), make_batch()
    for i in range(batch.size):
        windows = AudioWindows(
            first_KLD=batch.first_BPKLD[i, 0], later_FKLD=batch.later_BPFKLD[i, 0]
        )
        assert batch.text_BND is not None
        expected = WanDenoiser(model.dit)(
            batch.latents_BCFHW[i : i + 1],
            SIGMA_B[i].item(),
            Conditioning(
                reference_BCFHW=batch.reference_BCFHW[i : i + 1], text_BND=batch.text_BND[i : i + 1]
            ),
            ProjectionAdapter(model.projection)(windows),
        )
        torch.testing.assert_close(_call(model)[i : i + 1], expected, rtol=1e-4, atol=1e-5)


def test_the_null_voice_is_windows_of_zeros() -> None:
    model, batch = make_model(), make_batch()
    silent = replace(
        batch,
        first_BPKLD=torch.zeros_like(batch.first_BPKLD),
        later_BPFKLD=torch.zeros_like(batch.later_BPFKLD),
    )
    with torch.no_grad():
        expected = model(batch.latents_BCFHW, SIGMA_B, silent)
    assert torch.equal(_call(model, uses_audio=False), expected)
    assert not torch.allclose(_call(model), expected)


def _make_two_speakers() -> Batch:
    """Make chunks of two speakers; the right one's features are the negative of the left one's."""
    batch = make_batch()
    regions = torch.zeros(3, 4, 6)
    regions[0, :, :3] = regions[1, :, 3:] = 1
    return replace(
        batch,
        first_BPKLD=torch.cat((batch.first_BPKLD, -batch.first_BPKLD), 1),
        later_BPFKLD=torch.cat((batch.later_BPFKLD, -batch.later_BPFKLD), 1),
        regions_PHW=regions,
    )


def test_the_voices_of_a_pair_are_heard_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, two = make_model(), _make_two_speakers()
    attended: list[Tensor] = []

    def predict(
        latents: Tensor, *_: Tensor, audio_BFND: Tensor, regions_PHW: Tensor, **_more: object
    ) -> Tensor:
        assert two.regions_PHW is not None
        assert torch.equal(regions_PHW, two.regions_PHW)
        attended.append(audio_BFND)
        return torch.zeros_like(latents)

    monkeypatch.setattr(model.dit, "forward", predict)
    with torch.no_grad():
        model(two.latents_BCFHW, SIGMA_B, two)
        alone = [
            model.projection(two.first_BPKLD[:, voice], two.later_BPFKLD[:, voice])
            for voice in (0, 1)
        ]
    torch.testing.assert_close(attended[0], torch.cat(alone, 2))


def test_the_null_voice_of_a_pair_is_one_voice_everywhere() -> None:
    two = _make_two_speakers()
    with torch.no_grad():
        null = make_model()(two.latents_BCFHW, SIGMA_B, two, uses_audio=False)
    assert torch.equal(null, _call(make_model(), uses_audio=False))


@pytest.mark.parametrize("null", ["negative prompt", "zeros"])
def test_the_null_text_is_the_negative_prompt_or_zeros(null: str) -> None:
    batch = make_batch()
    if null == "zeros":
        batch = replace(batch, null_text_BND=None)
    conditions = replace(batch, text_BND=batch.null_text_BND)
    with torch.no_grad():
        model = make_model()
        expected = model(batch.latents_BCFHW, SIGMA_B, conditions)
        unread = model(batch.latents_BCFHW, SIGMA_B, batch, uses_text=False)
    assert torch.equal(unread, expected)
    assert not torch.allclose(unread, _call(model))


@pytest.mark.parametrize("what", ["uses_audio", "uses_text"])
def test_each_chunk_may_be_told_something_else(what: str) -> None:
    model = make_model()
    mixed = _call(model, **{what: torch.tensor([True, False])})
    torch.testing.assert_close(mixed[:1], _call(model)[:1], rtol=1e-4, atol=1e-5)
    without = _call(model, **{what: False})
    torch.testing.assert_close(mixed[1:], without[1:], rtol=1e-4, atol=1e-5)


def test_clean_latents_are_those_of_the_velocity_with_the_given_ones_put_in() -> None:
    model, batch = make_model(), make_batch()
    noisy = batch.add_noise(batch.latents_BCFHW, torch.ones_like(batch.latents_BCFHW), SIGMA_B)
    with torch.no_grad():
        denoised = predict_denoised(model, noisy, SIGMA_B, batch)
        velocity = model(noisy, SIGMA_B, batch)
    assert torch.equal(denoised[1, :, :3], batch.latents_BCFHW[1, :, :3])
    torch.testing.assert_close(denoised[1, :, 3], (noisy - 0.3 * velocity)[1, :, 3])


def test_an_adapter_of_another_family_is_refused() -> None:
    projection = AudioProjection(
        AudioAdapterConfig(frame_width=6, hidden_dim=8, num_tokens=2, token_dim=8)
    )
    with pytest.raises(MismatchError, match="8 wide, the transformer attends to 6"):
        TalkingModel(make_model().dit, projection)


def test_files_hold_the_networks_with_their_lora_layers(tmp_path: Path) -> None:
    model = make_model()
    add_adapters(model, 2, 2.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_up"):
                weight.fill_(0.01)
    expected = _call(model)
    files = tmp_path / "dit.safetensors", tmp_path / "adapter.safetensors"
    model.save(*files, {"kind": "student", "steps": 4})
    assert inspect(files[0]).settings == {"kind": "student", "steps": 4}
    assert inspect(files[1]).settings == {"kind": "student"}
    # Files are in float16.
    loaded = TalkingModel.load(*files)
    torch.testing.assert_close(_call(loaded), expected, rtol=0.02, atol=0.02)
    assert all(weight.requires_grad for weight in loaded.parameters())
    with pytest.raises(MismatchError, match=r"dit\.safetensors has no audio adapter"):
        TalkingModel.load(files[0])


def test_taps_are_where_apt_has_them() -> None:
    assert tap_blocks(36) == (15, 25, 35)
    assert tap_blocks(40) == (17, 28, 39)
    assert tap_blocks(6) == (2, 3, 5)
    assert tap_blocks(1) == (0, 0, 0)


def test_hidden_states_are_those_between_the_blocks() -> None:
    model, batch = make_model(), make_batch()
    hidden: dict[int, Tensor] = {}
    outputs: list[Tensor] = []
    for block in model.dit.blocks:
        block.register_forward_hook(lambda *call: outputs.append(call[-1]))
    plain = _call(model)
    with torch.no_grad():
        tapped = model(batch.latents_BCFHW, SIGMA_B, batch, hidden_after=hidden)
    assert torch.equal(tapped, plain)
    assert list(hidden) == [0, 1]
    assert all(torch.equal(hidden[i], outputs[i]) for i in hidden)


def test_under_autocast_time_and_velocity_are_float32() -> None:
    model, batch = make_model(), make_batch()
    seen: list[Tensor] = []

    def keep(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend((*inputs, output))

    model.dit.head.register_forward_hook(keep)
    with torch.no_grad():
        model(batch.latents_BCFHW, SIGMA_B, batch)
        _, exact, _ = seen
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(batch.latents_BCFHW, SIGMA_B, batch)
    hidden, time_BD, head = seen
    assert {t.dtype for t in (time_BD, head, velocity)} == {torch.float32}
    assert torch.equal(time_BD, exact)
    # More digits than bfloat16 has: nothing rounded them on the way.
    assert not torch.equal(velocity, velocity.bfloat16().float())
    with torch.no_grad():
        assert torch.equal(model.dit.head.forward(hidden, time_BD), head)


def test_only_tapped_tokens_are_kept_and_the_last_tap_ends_the_call() -> None:
    model, batch = make_model(num_layers=5), make_batch()
    alive: list[int] = []
    outputs: list[weakref.ref[Tensor]] = []

    def follow(_: object, __: object, output: Tensor) -> None:
        outputs.append(weakref.ref(output))
        alive.append(sum(output() is not None for output in outputs))

    for block in model.dit.blocks:
        block.register_forward_hook(follow)
    model.dit.head.register_forward_hook(lambda *_: pytest.fail("nobody reads the velocity"))
    hidden: dict[int, Tensor] = {}
    with torch.no_grad():
        last = model(batch.latents_BCFHW, SIGMA_B, batch, hidden_after=hidden, taps={0, 3})
    assert list(hidden) == [0, 3]
    assert last is hidden[3]
    # The input and the output of the current block, and the one tapped before.
    assert alive == [1, 2, 3, 3]


class TestDiscriminator:
    def _score(self, discriminator: Discriminator, latents: Tensor) -> Tensor:
        batch = make_batch()
        return discriminator(batch.pin(latents), SIGMA_B, batch)

    def _experienced(self) -> Discriminator:
        discriminator = Discriminator(make_model())
        with torch.no_grad():
            discriminator.logit.weight.copy_(
                torch.linspace(-1, 1, discriminator.logit.weight.numel())
            )
        return discriminator

    def test_it_begins_undecided_and_without_a_constant(self) -> None:
        discriminator = Discriminator(make_model())
        logit_B = self._score(discriminator, make_batch().latents_BCFHW)
        assert logit_B.tolist() == [0, 0]
        assert [name for name, _ in discriminator.logit.named_parameters()] == ["weight"]
        logit_B.sum().backward()
        assert discriminator.logit.weight.grad is not None
        assert discriminator.logit.weight.grad.any()

    def test_one_logit_per_video_that_depends_on_every_free_latent(self) -> None:
        latents = make_batch().latents_BCFHW.requires_grad_()
        logit_B = self._score(self._experienced(), latents)
        assert logit_B.shape == (2,)
        assert logit_B.dtype == torch.float32
        logit_B.sum().backward()
        assert latents.grad is not None
        frames_BF = latents.grad.abs().sum((1, 3, 4))
        assert torch.equal(frames_BF > 0, ~make_batch().pinned_BF)

    def test_all_heads_and_all_depths_learn(self) -> None:
        discriminator = self._experienced()
        self._score(discriminator, make_batch().latents_BCFHW).square().sum().backward()
        untouched = {
            n for n, p in discriminator.named_parameters() if p.grad is None or not p.grad.any()
        }
        # The transformer's own output, which nobody makes, and shifts that softmax does not see.
        assert all(".dit.head." in name or ".k.bias" in name for name in untouched)

    def test_recomputing_blocks_changes_no_gradient(self) -> None:
        gradients = []
        for uses_checkpointing in (False, True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                discriminator = self._experienced()
            discriminator.backbone.dit.uses_checkpointing = uses_checkpointing
            self._score(discriminator, make_batch().latents_BCFHW).sum().backward()
            gradients.append(
                {n: p.grad for n, p in discriminator.named_parameters() if p.grad is not None}
            )
        torch.testing.assert_close(gradients[0], gradients[1])


def test_in_bfloat16_velocities_and_logits_are_float32() -> None:
    batch = make_batch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        discriminator = Discriminator(make_model().bfloat16())
    with torch.no_grad():
        discriminator.logit.weight.fill_(1.0)
        logit_B = discriminator(batch.latents_BCFHW, SIGMA_B, batch)
        velocity = discriminator.backbone(batch.latents_BCFHW, SIGMA_B, batch)
        assert {p.dtype for p in discriminator.parameters()} == {torch.bfloat16}
        exact = discriminator.float()(batch.latents_BCFHW, SIGMA_B, batch)
    assert logit_B.dtype == velocity.dtype == torch.float32
    torch.testing.assert_close(logit_B, exact, rtol=0.1, atol=0.5)
