"""LoRA layers: their effect, and their removal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny_networks import make_batch, make_model
from training.models.lora import (
    LoraLinear,
    adapters_off,
    add_adapters,
    export_adapters,
    list_adapters,
    merge_adapters,
)
from training.models.networks import TalkingModel
from turbotalk_core.checkpoints.lora import merge_lora
from turbotalk_core.errors import MismatchError

RANK, ALPHA = 3, 6.0


@torch.no_grad()
def _call(model: TalkingModel) -> Tensor:
    batch = make_batch()
    return model(batch.latents_BCFHW, torch.tensor([0.9, 0.3]), batch)


def _adapted(*, trained: bool) -> TalkingModel:
    model = make_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        add_adapters(model, RANK, ALPHA)
        for _, layer in list_adapters(model):
            if trained:
                nn.init.normal_(layer.lora_up, std=0.1)
    return model


def test_at_first_nothing_is_changed_and_the_additions_alone_learn() -> None:
    model = _adapted(trained=False)
    assert torch.equal(_call(model), _call(make_model()))
    learning = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"lora_down", "lora_up"}


def test_every_matrix_of_blocks_and_adapter_has_an_addition() -> None:
    names = [name for name, _ in list_adapters(_adapted(trained=False))]
    for place in ("self_attn.q", "cross_attn.o", "audio_cross_attn.kv_linear", "ffn.2"):
        assert f"dit.blocks.1.{place}" in names
    assert "projection.proj1_vf" in names
    # Layers whose weights the transformer reads itself, past their forward.
    assert not any("embedding" in name or "head" in name for name in names)


def test_names_of_the_weights_stay() -> None:
    assert make_model().state_dict().keys() <= _adapted(trained=False).state_dict().keys()


def test_switched_off_it_is_the_network_before() -> None:
    model = _adapted(trained=True)
    changed = _call(model)
    with adapters_off(model):
        assert torch.equal(_call(model), _call(make_model()))
    assert torch.equal(_call(model), changed)
    assert not torch.allclose(changed, _call(make_model()))


def test_an_error_does_not_leave_them_off() -> None:
    model = _adapted(trained=True)
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        raise ZeroDivisionError
    assert all(layer.is_on for _, layer in list_adapters(model))


def test_merged_it_says_the_same_without_additions() -> None:
    model = _adapted(trained=True)
    before = _call(model)
    merge_adapters(model)
    assert not list_adapters(model)
    assert model.state_dict().keys() == make_model().state_dict().keys()
    torch.testing.assert_close(_call(model), before, rtol=1e-4, atol=1e-5)


def test_the_core_reads_what_is_exported() -> None:
    model = _adapted(trained=True)
    merged = copy.deepcopy(model)
    merge_adapters(merged)
    weights = dict(make_model().dit.state_dict())
    weights |= {f"audio_proj.{k}": t for k, t in make_model().projection.state_dict().items()}
    merge_lora(weights, export_adapters(model), 1.0)
    expected = dict(merged.dit.state_dict())
    expected |= {f"audio_proj.{k}": t for k, t in merged.projection.state_dict().items()}
    torch.testing.assert_close(weights, expected)


def test_a_target_that_no_layer_has_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"no linear layer has a name like layers\.\*"):
        add_adapters(make_model(), RANK, ALPHA, ["layers.*"])


def test_the_addition_is_alpha_over_rank_times_the_product() -> None:
    linear = nn.Linear(2, 2)
    layer = LoraLinear(linear, 1, 3.0)
    with torch.no_grad():
        layer.lora_down.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_up.copy_(torch.tensor([[1.0], [0.0]]))
        difference = layer(torch.tensor([1.0, 1.0])) - linear(torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(difference, torch.tensor([9.0, 0.0]))


@pytest.mark.parametrize("alpha", [1.5, 3.0, 6.0, 5.0])
def test_an_addition_is_its_formula(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = LoraLinear(nn.Linear(7, 5), RANK, alpha)
    nn.init.normal_(layer.lora_up, generator=generator)
    inputs = torch.randn(2, 4, 7, generator=generator, requires_grad=True)
    with torch.no_grad():
        wide = (inputs @ layer.lora_down.T) @ layer.lora_up.T
        expected = inputs @ layer.weight.T + layer.bias + alpha / RANK * wide
    output = layer(inputs)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    narrow_R = (inputs.detach() @ layer.lora_down.detach().T).sum((0, 1))
    torch.testing.assert_close(layer.lora_up.grad, (alpha / RANK * narrow_R).expand(5, RANK))
    summed = inputs.detach().sum((0, 1))
    torch.testing.assert_close(
        layer.lora_down.grad, alpha / RANK * torch.outer(layer.lora_up.detach().sum(0), summed)
    )
