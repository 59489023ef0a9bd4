"""Learning rates, averages and clipped gradients against their closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from training.optimization import Ema, clip_gradients, cosine_factor


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_stops_at_a_gradient_that_is_no_number(value: float) -> None:
    layer = _layer(0.0)
    layer.weight.grad = torch.tensor([[value, 0.0]])
    layer.bias.grad = torch.zeros(1)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        clip_gradients(layer.parameters(), 1.0)
