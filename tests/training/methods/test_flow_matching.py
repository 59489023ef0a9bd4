"""Flow matching: the inputs of the network, and its training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.tiny_networks import make_batch, make_engines, make_model, take_step
from training.methods.flow_matching import FlowMatching
from training.methods.method import Learning
from training.models.batch import Batch
from training.models.networks import TalkingModel

METHOD = FlowMatching()


def _record_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the arguments of the network's calls."""
    calls: list[dict[str, Any]] = []
    forward = TalkingModel.forward

    def spy(
        model: TalkingModel, noisy: Tensor, sigma: Tensor, batch: Batch, **settings: Any
    ) -> Tensor:
        calls.append({"noisy": noisy, "sigma": sigma, "batch": batch, **settings})
        return forward(model, noisy, sigma, batch, **settings)

    monkeypatch.setattr(TalkingModel, "forward", spy)
    return calls


def test_one_step_updates_the_teacher() -> None:
    engines = make_engines(METHOD)
    before = {k: t.clone() for k, t in engines["teacher"].module.state_dict().items()}
    terms = take_step(METHOD, engines, make_batch())
    assert set(terms) == {
        "teacher/loss",
        "teacher/flow_loss",
        "teacher/real_motion",
        "teacher/real_mean",
        "teacher/real_std",
    }
    after = engines["teacher"].module.state_dict()
    assert not {name for name, weight in after.items() if weight.equal(before[name])}


def test_with_lora_the_weights_stay() -> None:
    method = replace(METHOD, teacher=Learning(trains="lora", learning_rate=1e-3, rank=2, alpha=2))
    engines = make_engines(method)
    take_step(method, engines, make_batch())
    state = engines["teacher"].module.state_dict()
    for name, weight in make_model().state_dict().items():
        assert torch.equal(state[name], weight)
    assert any(t.any() for name, t in state.items() if name.endswith("lora_up"))


@pytest.mark.parametrize("what", ["audio", "text"])
def test_some_chunks_are_not_told(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _record_calls(monkeypatch)
    method = replace(METHOD, **{f"{what}_dropout": 0.25})
    take_step(method, make_engines(method), make_batch(200), steps_optimizers=False)
    settings = calls[0]["uses_audio" if what == "audio" else "uses_text"]
    assert settings.float().mean().item() == pytest.approx(0.75, abs=0.1)


def test_voice_and_text_are_dropped_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _record_calls(monkeypatch)
    method = replace(METHOD, audio_dropout=0.5, text_dropout=0.5)
    take_step(method, make_engines(method), make_batch(200), steps_optimizers=False)
    both = (calls[0]["uses_audio"] & calls[0]["uses_text"]).float().mean().item()
    assert both == pytest.approx(0.25, abs=0.1)


def _lose(monkeypatch: pytest.MonkeyPatch, batch: Batch, error: Tensor | float) -> float:
    """Compute the loss of a network that predicts the chunks with a given error."""

    def predict(
        model: TalkingModel, noisy: Tensor, sigma: Tensor, batch: Batch, **_: Any
    ) -> Tensor:
        # noise - data, where noisy = (1 - sigma) data + sigma noise
        velocity = (noisy - batch.latents_BCFHW) / sigma.view(-1, 1, 1, 1, 1)
        return velocity + error + 0 * sum(p.sum() for p in model.parameters())

    monkeypatch.setattr(TalkingModel, "forward", predict)
    return take_step(METHOD, make_engines(METHOD), batch, steps_optimizers=False)["teacher/loss"]


def test_the_loss_is_that_of_a_perfect_network_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _lose(monkeypatch, make_batch(), 0.0) == pytest.approx(0, abs=1e-8)


def test_given_latents_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch()
    error = 7.0 * batch.pinned_BF[:, None, :, None, None]
    assert _lose(monkeypatch, batch, error) == pytest.approx(0, abs=1e-8)


def test_an_error_counts_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch()
    weight_BHW = 1 + torch.arange(2.0 * 4 * 6).view(2, 4, 6) / 10
    weight_BHW /= weight_BHW.mean((1, 2), keepdim=True)
    error = torch.zeros(4, 6)
    error[1, 2] = 0.5
    free_B = (~batch.pinned_BF).sum(1)
    expected = 0.25 * float((weight_BHW[:, 1, 2] * free_B).sum() / free_B.sum()) / (4 * 6)
    loss = _lose(monkeypatch, replace(batch, weight_BHW=weight_BHW), error)
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_it_learns_a_chunk_by_heart() -> None:
    method = replace(METHOD, shift=1.0, audio_dropout=0.0, text_dropout=0.0)
    batch = make_batch(1, num_pinned=(1,))
    batch = replace(batch, latents_BCFHW=torch.ones_like(batch.latents_BCFHW))
    engines = make_engines(method, learning_rate=0.01)
    losses = [take_step(method, engines, batch, step)["teacher/loss"] for step in range(60)]
    # Predicting the chunk without the noise has a loss of 1, predicting neither of 2.
    assert math.fsum(losses[:5]) / 5 > 1.2
    assert math.fsum(losses[-10:]) / 10 < 1
