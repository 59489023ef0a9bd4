"""Losses against their closed forms."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from training.methods.losses import (
    AdversarialLoss,
    difference_penalty,
    discriminator_loss,
    dmd_direction,
    dmd_loss,
    flow_loss,
    free_mean,
    linearize,
    relativistic_loss,
    student_loss,
)

SHAPE = (2, 16, 4, 2, 3)
FREE = torch.ones(2, 1, 4, 1, 1)
FREE[0, :, 0] = 0
FREE[1, :, :3] = 0
NUM_FREE = (3 + 1) * 16 * 6


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def test_given_latents_count_in_no_mean() -> None:
    values = torch.where(FREE == 1, 3.0, 1e9).expand(SHAPE)
    assert free_mean(values, FREE) == 3


def test_flow_loss_is_a_weighted_mean_square() -> None:
    target, weight_HW = _draw(0), torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 3.5]])
    velocity = target + 2
    assert flow_loss(velocity, target, FREE) == pytest.approx(4)
    velocity = target.clone()
    velocity[..., 1, 2] += 2
    weight_BHW = weight_HW.expand(2, -1, -1)
    assert flow_loss(velocity, target, FREE, weight_BHW).item() == pytest.approx(4 * 3.5 / 6)


def test_the_gradient_of_the_dmd_loss_is_the_direction() -> None:
    sample, direction = _draw(0).requires_grad_(), _draw(1)
    loss = dmd_loss(sample, direction, FREE)
    loss.backward()
    assert sample.grad is not None
    torch.testing.assert_close(sample.grad, direction * FREE / NUM_FREE)
    expected = 0.5 * (direction * FREE).square().sum() / NUM_FREE
    torch.testing.assert_close(loss.detach(), expected)


def test_the_dmd_direction_goes_from_fake_to_real_at_each_sample_s_own_scale() -> None:
    sample, fake = _draw(0), _draw(1)
    distance_B = torch.tensor([4.0, 0.5]).view(-1, 1, 1, 1, 1)
    real = sample + distance_B * _draw(2).sign()
    # What a network says of given latents must not matter.
    real = torch.where(FREE == 1, real, 1e6)
    direction = dmd_direction(sample, fake, real, FREE)
    torch.testing.assert_close(direction, torch.where(FREE == 1, (fake - real) / distance_B, 0.0))


def test_a_sample_that_is_the_teacher_s_own_has_a_finite_direction() -> None:
    sample = _draw(0)
    assert dmd_direction(sample, sample, sample, FREE).eq(0).all()
    assert dmd_direction(sample, sample + 1e-6, sample, FREE).isfinite().all()


def test_what_is_not_finite_is_not_hidden() -> None:
    real = _draw(1)
    real[1] = math.nan
    assert dmd_direction(_draw(0), _draw(2), real, FREE)[1].isnan().any()


def test_equal_logits_lose_ln_2() -> None:
    assert relativistic_loss(_draw(0, 5), _draw(0, 5)).item() == pytest.approx(math.log(2))


def test_a_relativistic_loss_sees_differences_alone() -> None:
    better, worse = _draw(0, 5), _draw(1, 5)
    loss = relativistic_loss(better, worse)
    torch.testing.assert_close(relativistic_loss(better + 7, worse + 7), loss)
    torch.testing.assert_close(loss, -torch.sigmoid(better - worse).log().mean())


@pytest.mark.parametrize(
    ("kind", "of_discriminator", "of_student"),
    [
        ("r3gan", math.log1p(math.exp(-3)), math.log1p(math.exp(3))),
        ("gan", math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)), math.log1p(math.exp(1))),
        ("hinge", 0.0, 1.0),
    ],
)
def test_adversarial_losses_at_logits_2_and_minus_1(
    kind: AdversarialLoss, of_discriminator: float, of_student: float
) -> None:
    real, student = torch.tensor([2.0]), torch.tensor([-1.0])
    assert discriminator_loss(real, student, kind).item() == pytest.approx(of_discriminator)
    assert student_loss(real, student, kind).item() == pytest.approx(of_student)


@pytest.mark.parametrize("kind", ["r3gan", "gan", "hinge"])
def test_student_and_discriminator_pull_the_student_s_logit_apart(kind: AdversarialLoss) -> None:
    real, student = torch.zeros(3), torch.zeros(3, requires_grad=True)
    (up,) = torch.autograd.grad(student_loss(real, student, kind), student)
    (down,) = torch.autograd.grad(discriminator_loss(real, student, kind), student)
    assert (up < 0).all()
    assert (down > 0).all()


def test_the_penalty_of_a_linear_discriminator_is_the_size_of_its_gradient() -> None:
    weight_D, samples_BD, size = _draw(0, 12), _draw(1, 1, 12), 0.1
    noise_BD = _draw(2, 100_000, 12)
    penalty = difference_penalty(samples_BD @ weight_D, (samples_BD + size * noise_BD) @ weight_D)
    # s^2 |w|^2; of 100,000 squares of a normal the mean has a spread of 0.45 %
    assert penalty.item() == pytest.approx(size**2 * weight_D.square().sum().item(), rel=0.02)


def test_both_logits_of_a_penalty_have_a_gradient() -> None:
    logit, perturbed = torch.tensor([1.0], requires_grad=True), torch.tensor([3.0]).requires_grad_()
    difference_penalty(logit, perturbed).backward()
    assert logit.grad == -4
    assert perturbed.grad == 4


def test_a_linearised_loss_has_the_gradient_of_the_loss() -> None:
    weight = _draw(0, 7).requires_grad_()
    inputs_KBD = _draw(1, 4, 3, 7)

    def loss(logits_KB: Tensor) -> Tensor:
        adversarial = discriminator_loss(logits_KB[0], logits_KB[1], "r3gan")
        return adversarial + 5 * difference_penalty(logits_KB[2], logits_KB[3])

    plain = loss(inputs_KBD @ weight)
    (expected,) = torch.autograd.grad(plain, weight)
    with torch.no_grad():
        value, weights_KB = linearize(loss, inputs_KBD @ weight)
    torch.testing.assert_close(value, plain.detach())
    for inputs_BD, weights_B in zip(inputs_KBD, weights_KB, strict=True):
        (inputs_BD @ weight * weights_B).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)


def test_linearising_leaves_no_graph() -> None:
    logits_KB = _draw(0, 2, 3).requires_grad_()
    value, weights_KB = linearize(partial(torch.sum, dim=()), logits_KB)
    assert not value.requires_grad
    assert not weights_KB.requires_grad
    assert logits_KB.grad is None
