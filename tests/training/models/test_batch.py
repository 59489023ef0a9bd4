"""Batches: pinned frames, and checks of shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.training.tiny_networks import make_batch
from turbotalk_core.errors import MismatchError


def test_given_latents_are_put_in_and_pass_no_gradient() -> None:
    batch = make_batch()
    made = torch.zeros_like(batch.latents_BCFHW).requires_grad_()
    pinned = batch.pin(made)
    pinned.sum().backward()
    assert torch.equal(pinned[0, :, :1], batch.latents_BCFHW[0, :, :1])
    assert torch.equal(pinned[1, :, :3], batch.latents_BCFHW[1, :, :3])
    assert not pinned[0, :, 1:].any()
    assert made.grad is not None
    assert torch.equal(made.grad, batch.free_B1F11.expand_as(made))


def test_noise_goes_where_latents_are_to_be_made() -> None:
    batch = make_batch()
    noise = torch.randn(batch.latents_BCFHW.shape, generator=torch.Generator().manual_seed(1))
    noisy = batch.add_noise(batch.latents_BCFHW, noise, torch.tensor([1.0, 0.25]))
    assert torch.equal(noisy[0, :, 0], batch.latents_BCFHW[0, :, 0])
    assert torch.equal(noisy[0, :, 1:], noise[0, :, 1:])
    expected = 0.75 * batch.latents_BCFHW[1, :, 3:] + 0.25 * noise[1, :, 3:]
    torch.testing.assert_close(noisy[1, :, 3:], expected)


def test_on_a_device_latents_stay_in_float32() -> None:
    batch = make_batch().to("cpu", torch.bfloat16)
    assert batch.latents_BCFHW.dtype == torch.float32
    assert batch.pinned_BF.dtype == torch.bool
    assert batch.first_BPKLD.dtype == torch.bfloat16
    assert batch.weight_BHW is None


@pytest.mark.parametrize(
    "change",
    [
        {"reference_BCFHW": torch.zeros(2, 20, 3, 4, 6)},
        {"pinned_BF": torch.zeros(2, 5, dtype=torch.bool)},
        {"later_BPFKLD": torch.zeros(2, 1, 2, 8, 2, 3)},
        {"first_BPKLD": torch.zeros(1, 1, 5, 2, 3)},
    ],
)
def test_conditions_of_other_chunks_are_refused(change: dict[str, torch.Tensor]) -> None:
    with pytest.raises(MismatchError, match=next(iter(change))):
        replace(make_batch(), **change)
