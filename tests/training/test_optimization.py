"""Learning rates, averages and clipped gradients against their closed forms."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from training.optimization import Ema, Optimizers, clip_gradients, cosine_factor


def _layer(value: float) -> nn.Linear:
    layer = nn.Linear(2, 1)
    for weight in layer.parameters():
        nn.init.constant_(weight, value)
    return layer


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    factors = [cosine_factor(step, 110, num_warmup_steps=10, floor=0.2) for step in range(111)]
    assert factors[:10] == [(step + 1) / 10 for step in range(10)]
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.6)
    assert factors[110] == pytest.approx(0.2)
    quarter = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    assert factors[35] == pytest.approx(quarter)


@given(step=st.integers(0, 500), num_steps=st.integers(1, 300), warmup=st.integers(0, 300))
def test_the_rate_is_never_off_nor_above_its_peak(step: int, num_steps: int, warmup: int) -> None:
    assert 0 < cosine_factor(step, num_steps, num_warmup_steps=warmup) <= 1


def test_the_average_forgets_quickly_at_first_and_slowly_later() -> None:
    ema = Ema(_layer(0.0), decay=0.5)
    ema.update(_layer(1.0))  # decay 1 / 11
    assert ema.weights["weight"].tolist() == [[pytest.approx(10 / 11)] * 2]
    ema.update(_layer(2.0))  # decay 2 / 12
    expected = 10 / 11 * 2 / 12 + 2 * 10 / 12
    assert ema.weights["bias"].tolist() == [pytest.approx(expected)]
    ema.num_updates = 1000
    ema.update(_layer(0.0))
    assert ema.weights["bias"].tolist() == [pytest.approx(0.5 * expected)]


def test_the_average_is_a_copy() -> None:
    layer = _layer(1.0)
    ema = Ema(layer)
    nn.init.zeros_(layer.bias)
    assert ema.weights["bias"].item() == 1
    ema.copy_to(layer)
    assert layer.bias.item() == 1
    nn.init.zeros_(layer.bias)
    assert ema.weights["bias"].item() == 1


def test_long_gradients_are_shortened_and_short_ones_kept() -> None:
    layer = _layer(0.0)
    layer.weight.grad = torch.tensor([[3.0, 0.0]])
    layer.bias.grad = torch.tensor([4.0])
    assert clip_gradients(layer.parameters(), 10.0) == pytest.approx(5)
    assert layer.bias.grad.item() == 4
    assert clip_gradients(layer.parameters(), 1.0) == pytest.approx(5)
    assert layer.weight.grad.tolist() == [[pytest.approx(0.6), 0]]
    assert layer.bias.grad.item() == pytest.approx(0.8)


class Convolution(nn.Module):
    """A kernel, to be stepped as a matrix, and its bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(4, 3, 2, 2, generator=generator))
        self.bias = nn.Parameter(torch.zeros(4))


class TestOptimizers:
    """Muon and AdamW on their own give the same steps."""

    RATES = (0.02, 0.01)  # of the kernel and the rest

    def _optimizers(self, layer: Convolution) -> Optimizers:
        return Optimizers(
            [layer.kernel],
            [layer.bias],
            matrix_rate=self.RATES[0],
            other_rate=self.RATES[1],
            weight_decay=0.1,
        )

    def _set_gradients(self, layer: nn.Module, seed: int, scale: float = 0.01) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in layer.parameters():
            weight.grad = scale * torch.randn(weight.shape, generator=generator)

    def test_a_kernel_is_stepped_as_a_matrix_and_the_rest_by_adam(self) -> None:
        layer, twin = Convolution(), Convolution()
        matrix = nn.Parameter(twin.kernel.detach().flatten(1).clone())
        muon = torch.optim.Muon(
            [matrix], 0.5 * self.RATES[0], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )
        adam = torch.optim.AdamW(
            [twin.bias], 0.5 * self.RATES[1], betas=(0.9, 0.99), weight_decay=0.1
        )
        optimizers = self._optimizers(layer)
        for seed in range(3):
            for module in (layer, twin):
                self._set_gradients(module, seed)
            assert twin.kernel.grad is not None
            matrix.grad = twin.kernel.grad.flatten(1)
            optimizers.step(0.5)
            muon.step()
            adam.step()
        # torch's own works in bfloat16
        torch.testing.assert_close(layer.kernel.flatten(1), matrix.data, rtol=0, atol=1e-3)
        assert torch.equal(layer.bias, twin.bias)

    def test_gradients_are_forgotten(self) -> None:
        layer = Convolution()
        self._set_gradients(layer, 0)
        self._optimizers(layer).step(1.0)
        assert all(weight.grad is None for weight in layer.parameters())

    def test_the_factor_scales_the_step(self) -> None:
        layers = [Convolution() for _ in range(3)]
        for layer, factor in zip(layers, (0.0, 0.25, 0.5), strict=True):
            self._set_gradients(layer, 0)
            self._optimizers(layer).step(factor)
        still, quarter, half = (layer.kernel for layer in layers)
        assert torch.equal(still, Convolution().kernel)
        torch.testing.assert_close(2 * (quarter - still), half - still)

    def test_a_state_is_all_that_the_next_step_needs(self) -> None:
        layer, twin = Convolution(), Convolution()
        first = self._optimizers(layer)
        self._set_gradients(layer, 0)
        first.step(1.0)
        twin.load_state_dict(layer.state_dict())
        second = self._optimizers(twin)
        second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from a file
        for module, optimizers in ((layer, first), (twin, second)):
            self._set_gradients(module, 1)
            optimizers.step(0.7)
        assert torch.equal(layer.kernel, twin.kernel)
        assert torch.equal(layer.bias, twin.bias)

    def test_a_gradient_that_is_no_number_changes_nothing(self) -> None:
        layer = Convolution()
        self._set_gradients(layer, 0, scale=math.nan)
        with pytest.raises(FloatingPointError, match="lower the learning rate"):
            self._optimizers(layer).step(1.0)
        assert torch.equal(layer.kernel, Convolution().kernel)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_stops_at_a_gradient_that_is_no_number(value: float) -> None:
    layer = _layer(0.0)
    layer.weight.grad = torch.tensor([[value, 0.0]])
    layer.bias.grad = torch.zeros(1)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        clip_gradients(layer.parameters(), 1.0)
