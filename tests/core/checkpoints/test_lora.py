"""LoRA: every spelling of a change, each with its own rank and alpha."""

import logging

import pytest
import torch
from torch import Tensor

from turbotalk_core.checkpoints.lora import merge_lora
from turbotalk_core.errors import CheckpointError, MismatchError
from turbotalk_core.reference_behaviour import select_lora_tensors


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _merge(lora: dict[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    weights = {"a.weight": torch.zeros(6, 4), "a.bias": torch.zeros(6)}
    merge_lora(weights, lora, strength)
    return weights


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize(("down", "up"), [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_both_spellings_of_a_pair(prefix: str, down: str, up: str) -> None:
    low, high = _draw(2, 4), _draw(6, 2)
    lora = {f"{prefix}a.{down}.weight": low, f"{prefix}a.{up}.weight": high}
    weights = _merge(lora, 0.5)
    torch.testing.assert_close(weights["a.weight"], 0.5 * high @ low)
    assert not weights["a.bias"].any()


@pytest.mark.parametrize("rank", [1, 3])
def test_alpha_counts_by_the_pairs_own_rank(rank: int) -> None:
    low, high = _draw(rank, 4), _draw(6, rank)
    lora = {
        "a.lora_down.weight": low,
        "a.lora_up.weight": high,
        "a.alpha": torch.tensor(2.0),
    }
    torch.testing.assert_close(_merge(lora)["a.weight"], 2 / rank * high @ low)
    reference = _merge(select_lora_tensors(lora))
    torch.testing.assert_close(reference["a.weight"], high @ low)


def test_whole_changes() -> None:
    weight, bias = _draw(6, 4), _draw(6)
    weights = _merge({"a.diff": weight, "a.diff_b": bias}, 2.0)
    assert torch.equal(weights["a.weight"], 2 * weight)
    assert torch.equal(weights["a.bias"], 2 * bias)


def test_a_convolution_is_a_matrix_of_patches() -> None:
    weights = {"p.weight": torch.zeros(6, 3, 1, 2, 2)}
    low, high = _draw(2, 3, 1, 2, 2), _draw(6, 2, 1, 1, 1)
    merge_lora(weights, {"p.lora_down.weight": low, "p.lora_up.weight": high}, 1.0)
    expected = torch.einsum("or,rithw->oithw", high.flatten(1), low)
    torch.testing.assert_close(weights["p.weight"], expected)


def test_a_weight_keeps_its_dtype() -> None:
    weights = {"a.weight": torch.ones(6, 4, dtype=torch.bfloat16)}
    merge_lora(weights, {"a.diff": torch.full((6, 4), 0.5, dtype=torch.float16)}, 1.0)
    assert weights["a.weight"].dtype == torch.bfloat16
    assert (weights["a.weight"] == 1.5).all()


def test_what_the_model_lacks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _merge({"a.diff_b": torch.ones(6), "k_img.diff_b": torch.ones(6)})
    assert "1 of the 2 weights" in caplog.text
    assert "k_img.bias" in caplog.text


@pytest.mark.parametrize(
    ("lora", "kind", "message"),
    [
        ({"a.lora_down.weight": (2, 4)}, CheckpointError, "lacks a.lora_up.weight"),
        ({"a.lora_B.weight": (6, 2)}, CheckpointError, "a.lora_B.weight without its other half"),
        ({"a.weight": (6, 4)}, CheckpointError, "no changes of weights"),
        ({}, CheckpointError, "no changes of weights"),
        ({"a.diff": (6, 5)}, MismatchError, r"a.weight by \(6, 5\).*as \(6, 4\)"),
        ({"a.lora_A.weight": (1, 10**6), "a.lora_B.weight": (10**6, 1)}, MismatchError,
         r"a.weight by \(1000000, 1000000\)"),
        ({"a.lora_A.weight": (2, 4), "a.lora_B.weight": (6, 3)}, CheckpointError, "not multiply"),
        ({"a.lora_A.weight": (2,), "a.lora_B.weight": (6, 2)}, CheckpointError, "not multiply"),
        ({"a.lora_A.weight": (), "a.lora_B.weight": (6, 2)}, CheckpointError, "not multiply"),
        ({"a.lora_A.weight": (2, 4), "a.lora_B.weight": (6, 2), "a.alpha": (2,)}, CheckpointError,
         "must be one number"),
        ({"a.diff": ()}, MismatchError, r"a.weight by \(\)"),
        ({"b.diff": (6, 4)}, MismatchError, "none of the 1 weights.*b.weight"),
    ],
)  # fmt: skip
def test_what_is_no_lora_for_this_model_is_refused(
    lora: dict[str, tuple[int, ...]], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        _merge({name: torch.ones(shape) for name, shape in lora.items()})
