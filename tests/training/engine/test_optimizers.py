"""Learning rates, averages and clipped gradients against their closed forms."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import training.engine.optimizers
from training.engine.optimizers import Average, Muon, Optimizers, check_norm, rate_factor


def _layer(value: float) -> nn.Linear:
    layer = nn.Linear(2, 1)
    for weight in layer.parameters():
        nn.init.constant_(weight, value)
    return layer


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    factors = [rate_factor(step, 110, num_warmup_steps=10, floor=0.2) for step in range(111)]
    assert factors[:10] == [(step + 1) / 10 for step in range(10)]
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.6)
    assert factors[110] == pytest.approx(0.2)
    quarter = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    assert factors[35] == pytest.approx(quarter)


@given(step=st.integers(0, 500), num_steps=st.integers(1, 300), warmup=st.integers(0, 300))
def test_the_rate_is_never_off_nor_above_its_peak(step: int, num_steps: int, warmup: int) -> None:
    assert 0 < rate_factor(step, num_steps, num_warmup_steps=warmup) <= 1


@pytest.mark.parametrize(("step", "factor"), [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)])
def test_the_constant_rate_grows_and_stays(step: int, factor: float) -> None:
    assert rate_factor(step, 10, num_warmup_steps=4, kind="constant") == factor
    assert rate_factor(step, 10, num_warmup_steps=0, kind="constant") == 1.0


def test_the_cosine_rate_falls() -> None:
    factors = [rate_factor(step, 12, num_warmup_steps=2) for step in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)


def _round(factor: float, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    rate = 1.5e-3 * factor
    return torch.tensor(rate / (1 - 0.9**step)), torch.tensor(1 - rate * 0.01)


@pytest.mark.parametrize("num_steps", [12, 800, 1200])
def test_a_rate_may_reach_zero_with_the_last_step(num_steps: int) -> None:
    """The curve that the shipped audio encoder was trained with, to the last bit of a float32."""
    warmup, given = num_steps // 10, 1.0
    for step in range(1, num_steps + 1):
        given = rate_factor(
            step - 1, num_steps, num_warmup_steps=warmup, floor=0.0, reaches_floor=True
        )
        expected = step / warmup
        if step > warmup:
            angle = math.pi * (step - warmup) / (num_steps - warmup)
            expected = 0.5 + 0.5 * math.cos(angle)
        assert given == pytest.approx(expected, rel=1e-9)
        # AdamW rounds these two to float32 before they reach the weights.
        for mine, theirs in zip(_round(given, step), _round(expected, step), strict=True):
            assert torch.equal(mine, theirs)
    assert given == 0


def test_the_average_forgets_quickly_at_first_and_slowly_later() -> None:
    def weights(value: float) -> dict[str, torch.Tensor]:
        return dict(_layer(value).named_parameters())

    average = Average(weights(0.0), decay=0.5, grows=True)
    average.update(weights(1.0))  # decay 1 / 11
    assert average.shards["weight"].tolist() == [[pytest.approx(10 / 11)] * 2]
    average.update(weights(2.0))  # decay 2 / 12
    expected = 10 / 11 * 2 / 12 + 2 * 10 / 12
    assert average.shards["bias"].tolist() == [pytest.approx(expected)]
    average.num_updates = 1000
    average.update(weights(0.0))
    assert average.shards["bias"].tolist() == [pytest.approx(0.5 * expected)]


def test_the_average_is_a_copy() -> None:
    layer = _layer(1.0)
    weights = dict(layer.named_parameters())
    average = Average(weights, decay=0.998)
    nn.init.zeros_(layer.bias)
    assert average.shards["bias"].item() == 1
    average.copy_to(weights)
    assert layer.bias.item() == 1
    nn.init.zeros_(layer.bias)
    assert average.shards["bias"].item() == 1


def test_an_average_of_shards_is_its_formula() -> None:
    shard = torch.tensor([1.0, 2.0])
    average = Average({"w": shard}, decay=0.75, start=0)
    average.update({"w": torch.tensor([5.0, 2.0])})
    assert average.shards["w"].tolist() == [2.0, 2.0]
    assert shard.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("limit", "share"), [(10.0, 1.0), (1.0, 0.2)])
def test_long_gradients_are_shortened_and_short_ones_kept(limit: float, share: float) -> None:
    layer, twin = _layer(0.0), _layer(0.0)
    for module, factor in ((layer, 1.0), (twin, share)):
        module.weight.grad = torch.tensor([[3.0 * factor, 0.0]])
        module.bias.grad = torch.tensor([4.0 * factor])
    settings = {"rate": 0.1, "betas": (0.0, 0.0), "weight_decay": 0.0}
    optimizers = Optimizers(dict(layer.named_parameters()), **settings)
    assert optimizers.step(1.0, limit) == pytest.approx(5)
    # Adam's step hardly depends on the length, its second moment does.
    (adam,) = optimizers.optimizers
    seconds = [adam.state[weight]["exp_avg_sq"] for weight in layer.parameters()]
    for second, weight in zip(seconds, twin.parameters(), strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(second, weight.grad.square())


class Convolution(nn.Module):
    """A kernel, to be stepped as a matrix, and its bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(4, 3, 2, 2, generator=generator))
        self.bias = nn.Parameter(torch.zeros(4))


class TestOptimizers:
    """Muon and AdamW on their own give the same steps."""

    RATE = 0.02

    def _optimizers(self, layer: Convolution) -> Optimizers:
        weights = dict(layer.named_parameters())
        return Optimizers(weights, {"kernel"}, rate=self.RATE, betas=(0.9, 0.99), weight_decay=0.1)

    def _set_gradients(self, layer: nn.Module, seed: int, scale: float = 0.01) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in layer.parameters():
            weight.grad = scale * torch.randn(weight.shape, generator=generator)

    def test_a_kernel_is_stepped_as_a_matrix_and_the_rest_by_adam(self) -> None:
        layer, twin = Convolution(), Convolution()
        matrix = nn.Parameter(twin.kernel.detach().flatten(1).clone())
        muon = torch.optim.Muon(
            [matrix], 0.5 * self.RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )
        adam = torch.optim.AdamW([twin.bias], 0.5 * self.RATE, betas=(0.9, 0.99), weight_decay=0.1)
        optimizers = self._optimizers(layer)
        for seed in range(3):
            for module in (layer, twin):
                self._set_gradients(module, seed)
            assert twin.kernel.grad is not None
            matrix.grad = twin.kernel.grad.flatten(1)
            optimizers.step(0.5, 1.0)
            muon.step()
            adam.step()
        # torch's own works in bfloat16
        torch.testing.assert_close(layer.kernel.flatten(1), matrix.data, rtol=0, atol=1e-3)
        assert torch.equal(layer.bias, twin.bias)

    def test_gradients_are_forgotten(self) -> None:
        layer = Convolution()
        self._set_gradients(layer, 0)
        self._optimizers(layer).step(1.0, 1.0)
        assert all(weight.grad is None for weight in layer.parameters())

    def test_the_factor_scales_the_step(self) -> None:
        layers = [Convolution() for _ in range(3)]
        for layer, factor in zip(layers, (0.0, 0.25, 0.5), strict=True):
            self._set_gradients(layer, 0)
            self._optimizers(layer).step(factor, 1.0)
        still, quarter, half = (layer.kernel for layer in layers)
        assert torch.equal(still, Convolution().kernel)
        torch.testing.assert_close(2 * (quarter - still), half - still)

    def test_a_state_is_all_that_the_next_step_needs(self) -> None:
        layer, twin = Convolution(), Convolution()
        first = self._optimizers(layer)
        self._set_gradients(layer, 0)
        first.step(1.0, 1.0)
        twin.load_state_dict(layer.state_dict())
        second = self._optimizers(twin)
        second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from a file
        for module, optimizers in ((layer, first), (twin, second)):
            self._set_gradients(module, 1)
            optimizers.step(0.7, 1.0)
        assert torch.equal(layer.kernel, twin.kernel)
        assert torch.equal(layer.bias, twin.bias)

    def test_a_gradient_that_is_no_number_changes_nothing(self) -> None:
        layer = Convolution()
        self._set_gradients(layer, 0, scale=math.nan)
        norm = self._optimizers(layer).step(1.0, 1.0)
        assert not math.isfinite(norm)
        assert all(weight.grad is None for weight in layer.parameters())
        assert torch.equal(layer.kernel, Convolution().kernel)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_stops_at_a_gradient_that_is_no_number(value: float) -> None:
    layer = _layer(0.0)
    layer.weight.grad = torch.tensor([[value, 0.0]])
    layer.bias.grad = torch.zeros(1)
    weights = dict(layer.named_parameters())
    optimizers = Optimizers(weights, rate=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        check_norm(optimizers.step(1.0, 1.0))
    check_norm(1.0)


@pytest.mark.parametrize("largest", [1, 24, 10**9])
def test_muon_steps_equal_matrices_together_or_apart(
    largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(5)]
    for matrix in matrices:
        matrix.grad = torch.randn(3, 4, generator=generator)
    calls: list[int] = []
    alone = []
    for matrix in matrices:
        (copied,) = copy.deepcopy([matrix])
        copied.grad = matrix.grad
        Muon([copied], 0.1, 0.01).step()
        alone.append(copied)
    compute = Muon.orthogonalize
    monkeypatch.setattr(training.engine.optimizers, "STACK_SIZE", largest)

    def note(matrices: torch.Tensor) -> torch.Tensor:
        calls.append(len(matrices))
        return compute(matrices)

    monkeypatch.setattr(Muon, "orthogonalize", staticmethod(note))
    Muon(matrices, 0.1, 0.01).step()
    assert calls == {1: [1] * 5, 24: [2, 2, 1], 10**9: [5]}[largest]
    torch.testing.assert_close(matrices, alone)


def test_a_state_from_another_device_keeps_the_kernels_of_this_one() -> None:
    settings = {"rate": 0.1, "betas": (0.0, 0.9), "weight_decay": 0.0}
    ours, theirs = (Optimizers(dict(_layer(1.0).named_parameters()), **settings) for _ in range(2))
    state = copy.deepcopy(theirs.state_dict())
    state[0]["param_groups"][0]["fused"] = True  # as a GPU wrote it
    ours.load_state_dict(state)
    assert not ours.optimizers[0].param_groups[0]["fused"]
