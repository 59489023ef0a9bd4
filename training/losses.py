"""Every loss, as a pure function of tensors.

Equation numbers are TurboTalk's (arXiv 2604.14580). Its formulas are lost from the text; each
docstring says whether a form was [read] somewhere, or is [inferred] from the words around it.

Given latent frames count in none of them: what is made there is thrown away ([inferred] for
adversarial losses, where the given frames are put in before a sample is scored).

Axes: B batch, C channels, F latent frames, H height, W width, K kinds of samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AdversarialLoss = Literal["r3gan", "gan", "hinge"]
"""TurboTalk's table 3: relativistic (its choice), non-saturating, hinge."""

NORMALIZER_FLOOR = 1e-6  # FastGen


def free_mean(values_BCFHW: Tensor, free_B1F11: Tensor) -> Tensor:
    """Average over all latents of a batch that are to be made.

    Args:
        values_BCFHW: one number per latent value.
        free_B1F11: 1 where a latent frame is to be made, 0 where it is given; between them it
            counts in part.

    Returns:
        A scalar; 0 where nothing is to be made.
    """
    per_frame = values_BCFHW[0, :, 0].numel()
    return (values_BCFHW * free_B1F11).sum() / (free_B1F11.sum() * per_frame).clamp_min(1)


def flow_loss(
    velocity_BCFHW: Tensor,
    target_BCFHW: Tensor,
    free_B1F11: Tensor,
    weight_BHW: Tensor | None = None,
) -> Tensor:
    """Flow matching: the squared error of the velocity, without a weight of the noise level.

    Args:
        velocity_BCFHW: predicted.
        target_BCFHW: noise - data.
        free_B1F11: 1 where a latent frame is to be made.
        weight_BHW: how much a place counts.

    Returns:
        Weighted mean per latent value.

    Source: Lipman et al., Flow Matching (2210.02747), Eq. 14; as the loss of the fake score
    [read: Self-Forcing].
    """
    error = (velocity_BCFHW - target_BCFHW).square()
    if weight_BHW is not None:
        error = error * weight_BHW[:, None, None]
    return free_mean(error, free_B1F11)


def dmd_direction(
    sample_BCFHW: Tensor, fake_BCFHW: Tensor, real_BCFHW: Tensor, free_B1F11: Tensor
) -> Tensor:
    """Distribution matching's gradient at a sample, Eq. 3: (fake - real) / mean |sample - real|.

    The score difference of Eq. 3 is that of two clean predictions times a factor of the noise
    level, which the normaliser makes up for. It is each sample's own, so that one hard sample does
    not silence the others, and in float32. Nothing is done about values that are not finite: the
    guard of the run has to see them.

    Args:
        sample_BCFHW: what the student made.
        fake_BCFHW: the fake score's clean prediction from it, noised.
        real_BCFHW: the teacher's, guided.
        free_B1F11: 1 where a latent frame is to be made.

    Returns:
        Direction to go against, the same shape, 0 at given latents.

    Source: Eq. 3 [inferred, high confidence: LiveAvatar's Eq. 4]; normaliser [read: DMD2,
    Self-Forcing, FastGen].
    """
    distance = (sample_BCFHW - real_BCFHW).abs() * free_B1F11
    num_free_B = free_B1F11.flatten(1).sum(1) * sample_BCFHW[0, :, 0].numel()
    mean_B = distance.flatten(1).sum(1) / num_free_B
    scale_B = mean_B.clamp_min(NORMALIZER_FLOOR).view(-1, 1, 1, 1, 1)
    return (fake_BCFHW - real_BCFHW) * free_B1F11 / scale_B


def dmd_loss(sample_BCFHW: Tensor, direction_BCFHW: Tensor, free_B1F11: Tensor) -> Tensor:
    """A loss whose gradient at the sample is the direction: 0.5 |x - sg(x - g)|^2, averaged.

    Args:
        sample_BCFHW: what the student made, with its graph.
        direction_BCFHW: g, of ``dmd_direction``.
        free_B1F11: 1 where a latent frame is to be made.

    Returns:
        A scalar; d loss / d x = g / (number of latent values to be made).

    Source: Eq. 3; the form [read: DMD2, Self-Forcing, FastGen].
    """
    target = (sample_BCFHW - direction_BCFHW).detach()
    return 0.5 * free_mean((sample_BCFHW - target).square(), free_B1F11)


def relativistic_loss(better_B: Tensor, worse_B: Tensor) -> Tensor:
    """-log sigmoid(better - worse): how far one logit still is from beating the other.

    Eq. 6 for the discriminator with (real, student), for the student with (student, real); Eq. 10,
    self-compare, with (student, 4-step reference).

    Args:
        better_B: logits that should be higher.
        worse_B: logits that should be lower, under the same conditions.

    Returns:
        Mean over the batch; ln 2 where they are equal.

    Source: R3GAN (2501.05441) [read]; Eq. 6 [read: names, inferred: typography]; Eq. 10 [read: a
    third-party note].
    """
    return F.softplus(worse_B - better_B).mean()


def discriminator_loss(real_B: Tensor, student_B: Tensor, kind: AdversarialLoss) -> Tensor:
    """What tells real samples and the student's apart, the adversarial term of Eq. 8.

    Args:
        real_B: logits of real samples.
        student_B: logits of the student's.
        kind: of loss.

    Returns:
        Mean over the batch.

    Source: Eq. 6 for ``r3gan``; the others are TurboTalk's table 3 [inferred: the usual forms].
    """
    if kind == "r3gan":
        return relativistic_loss(real_B, student_B)
    if kind == "gan":
        return (F.softplus(-real_B) + F.softplus(student_B)).mean()
    return (F.relu(1 - real_B) + F.relu(1 + student_B)).mean()


def student_loss(real_B: Tensor, student_B: Tensor, kind: AdversarialLoss) -> Tensor:
    """What makes the student's samples look real, the adversarial term of Eq. 11.

    Args:
        real_B: logits of real samples; only ``r3gan`` looks at them.
        student_B: logits of the student's.
        kind: of loss.

    Returns:
        Mean over the batch.

    Source: as ``discriminator_loss``.
    """
    if kind == "r3gan":
        return relativistic_loss(student_B, real_B)
    if kind == "gan":
        return F.softplus(-student_B).mean()
    return -student_B.mean()


def difference_penalty(logit_B: Tensor, perturbed_B: Tensor) -> Tensor:
    """Eq. 7: |D(x) - D(x + s eps)|^2, a gradient penalty without a second derivative.

    Its expectation is s^2 |grad D|^2 to first order, so that weight w and size s do what R3GAN's
    gamma = 2 w s^2 does. Both logits carry a graph, and x is the very tensor that was scored.

    Args:
        logit_B: of samples.
        perturbed_B: of the same with Gaussian noise of size s added.

    Returns:
        Mean over the batch, without a weight.

    Source: APT (2501.08316), APT2 (2506.09350) [read]; that Eq. 7 does not divide by s is
    [inferred].
    """
    return (logit_B - perturbed_B).square().mean()


def linearize(loss: Callable[[Tensor], Tensor], logits_KB: Tensor) -> tuple[Tensor, Tensor]:
    """Make one sample's share of a loss of many logits computable on its own.

    With weights w = d loss / d logits, the sum of w_k D(x_k), each backpropagated before the next
    is built, gives the weights of D the gradient of the loss, with the activations of one network
    call in memory instead of those of all.

    Args:
        loss: of logits, [K, B].
        logits_KB: at which to take it; no graph is needed.

    Returns:
        The loss there, and w, [K, B]; both without a graph.
    """
    with torch.enable_grad():
        logits_KB = logits_KB.detach().requires_grad_()
        value = loss(logits_KB)
        (weight_KB,) = torch.autograd.grad(value, logits_KB)
    return value.detach(), weight_KB
