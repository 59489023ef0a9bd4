"""Common code of all methods: construction of roles, noise, and logged statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.training.tiny_networks import make_batch, make_model
from training.engine.rng import Draws
from training.methods.method import (
    Learning,
    RoleSpec,
    describe_latents,
    draw_noise,
    prepare_role,
    round_as_stored,
)
from training.models.lora import list_adapters
from training.models.networks import Discriminator, TalkingModel
from turbotalk_core.errors import MismatchError

LORA = Learning(trains="lora", learning_rate=1e-3, rank=2, alpha=2)
FULL = Learning(learning_rate=1e-3)


def _learning(network: nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


def test_a_frozen_role_learns_nothing() -> None:
    assert not _learning(prepare_role(RoleSpec(begins_with="teacher"), make_model()))


def test_a_role_that_trains_in_full_learns_all_of_it() -> None:
    network = make_model().requires_grad_(False)
    network = prepare_role(RoleSpec(begins_with="teacher", learning=FULL), network)
    assert _learning(network) == {name for name, _ in network.named_parameters()}


def test_a_discriminator_with_lora_learns_its_heads_too() -> None:
    spec = RoleSpec(begins_with="student", learning=LORA, is_discriminator=True)
    discriminator = prepare_role(spec, make_model())
    assert isinstance(discriminator, Discriminator)
    for name in _learning(discriminator):
        assert "lora_" in name or name.startswith(("heads.", "logit."))
    heads = {f"heads.{name}" for name, _ in discriminator.heads.named_parameters()}
    assert heads | {"logit.weight"} < _learning(discriminator)


def test_a_discriminator_goes_on_with_its_heads_and_its_lora_layers() -> None:
    spec = RoleSpec(begins_with="student", learning=LORA, is_discriminator=True)
    discriminator = prepare_role(spec, make_model())
    state = {name: t.clone() for name, t in discriminator.state_dict().items()}
    discriminator.requires_grad_(False)
    again = prepare_role(spec, discriminator)
    assert again is discriminator
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())
    assert any("lora_up" in name for name in _learning(again))


def test_a_student_that_learnt_by_lora_goes_on_with_what_it_learnt() -> None:
    student = prepare_role(RoleSpec(begins_with="teacher", learning=LORA), make_model())
    assert isinstance(student, TalkingModel)
    with torch.no_grad():
        for _, layer in list_adapters(student):
            layer.lora_up.fill_(0.1)
        batch = make_batch()
        before = student(batch.latents_BCFHW, torch.ones(2), batch)
        for learning in (LORA, FULL):
            student = prepare_role(RoleSpec(begins_with="student", learning=learning), student)
            after = student(batch.latents_BCFHW, torch.ones(2), batch)
            torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert not list_adapters(student)


@pytest.mark.parametrize("network", [nn.Linear(1, 1), Discriminator(make_model())])
def test_a_network_that_is_no_talking_model_is_refused(network: nn.Module) -> None:
    with pytest.raises(MismatchError, match=f"got a {type(network).__name__} for a role"):
        prepare_role(RoleSpec(begins_with="teacher"), network)


def test_a_still_video_has_no_motion_energy() -> None:
    latents = torch.randn(2, 16, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    still = describe_latents("real", latents.expand(-1, -1, 5, -1, -1) * 3 + 7)
    assert still["real_motion"] == 0
    assert still["real_mean"].item() == pytest.approx(7, abs=0.5)
    assert still["real_std"].item() == pytest.approx(3, abs=0.5)
    steps = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(2, 16, -1, 3, 3)
    assert describe_latents("real", 2 * steps)["real_motion"] == 2


def test_noise_is_the_generator_s_in_float32() -> None:
    noise = draw_noise(torch.zeros(2, 3, dtype=torch.bfloat16), Draws(0, 0, 0).own("noise"))
    expected = torch.randn(2, 3, generator=Draws(0, 0, 0).own("noise"))
    assert torch.equal(noise, expected)


def test_rounding_as_stored_is_that_of_float16_and_passes_gradients() -> None:
    latents = (3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))).requires_grad_()
    rounded = round_as_stored(latents)
    assert torch.equal(rounded, latents.half().float())
    assert not torch.equal(rounded, latents)
    (gradient,) = torch.autograd.grad((rounded * latents.detach()).sum(), latents)
    assert torch.equal(gradient, latents)
    assert torch.equal(round_as_stored(rounded), rounded)
