"""The plain engine against AdamW by hand, and its own checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny_networks import make_model
from tests.training.toy import Net
from training.engine.engine import EngineSettings, PlainEngine, set_checkpointing
from training.engine.optimizers import list_block_matrices
from turbotalk_core.errors import CheckpointError

SETTINGS = EngineSettings(
    learning_rate=0.03, betas=(0.5, 0.9), weight_decay=0.1, clip_norm=0.2, ema_decay=0.9
)


def _make_net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(2)


def _make_loss(step: int) -> Callable[[Callable[[Tensor], Tensor]], Tensor]:
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
    return lambda net: (net(inputs) - 1).square().mean()


def _advance(engine: PlainEngine, step: int, factor: float = 1.0) -> float:
    loss = _make_loss(step)(engine)
    engine.backward(loss)
    engine.step(factor)
    return loss.item()


def test_a_step_is_one_of_adamw_with_clipping() -> None:
    engine, net = PlainEngine(_make_net(), SETTINGS), _make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 0.03 * 0.5, betas=(0.5, 0.9), weight_decay=0.1)
    for step in range(3):
        _make_loss(step)(engine).backward()
        report = engine.step(0.5)
        _make_loss(step)(net).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()
        assert report.gradient_norm == pytest.approx(float(norm))
        assert report.gradient_norm > 0.2  # clipped
    for mine, theirs in zip(engine.module.parameters(), net.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.grad is None


def test_parts_of_a_batch_add_up_to_it() -> None:
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    whole, parts = PlainEngine(_make_net(), SETTINGS), PlainEngine(_make_net(), SETTINGS)
    whole.backward(whole(inputs).square().mean())
    for part in inputs.chunk(3):
        parts.backward(parts(part).square().mean() / 3)
    assert parts.step(1.0).gradient_norm == pytest.approx(whole.step(1.0).gradient_norm)
    for mine, theirs in zip(parts.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_recomputation_changes_nothing() -> None:
    weights = []
    for recomputes in (False, True):
        engine = PlainEngine(_make_net(), replace(SETTINGS, uses_checkpointing=recomputes))
        assert engine.module.uses_checkpointing is recomputes
        for step in range(3):
            _advance(engine, step)
        weights.append([weight.detach() for weight in engine.module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_recomputation_is_turned_on_inside() -> None:
    model = make_model()
    set_checkpointing(model, uses=True)
    assert model.dit.uses_checkpointing
    set_checkpointing(model, uses=False)
    assert not model.dit.uses_checkpointing


def test_the_average_begins_late_and_is_exported() -> None:
    engine = PlainEngine(_make_net(), replace(SETTINGS, ema_start=2))
    seen = []
    for step in range(4):
        _advance(engine, step)
        seen.append({n: w.detach().clone() for n, w in engine.module.named_parameters()})
        if step < 2:
            assert all(torch.equal(w, seen[-1][n]) for n, w in engine.export().items())
    for name, weight in engine.export().items():
        expected = 0.9 * (0.9 * seen[1][name] + 0.1 * seen[2][name]) + 0.1 * seen[3][name]
        torch.testing.assert_close(weight, expected)


def test_without_an_average_the_weights_are_exported() -> None:
    engine = PlainEngine(_make_net(), replace(SETTINGS, ema_decay=None))
    _advance(engine, 0)
    state = engine.module.state_dict()
    exported = engine.export()
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], weight) for name, weight in state.items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_goes_on_bit_by_bit(tmp_path: Path, precision: str, optimizer: str) -> None:
    settings = replace(SETTINGS, precision=precision, optimizer=optimizer)
    whole = PlainEngine(_make_net(), settings)
    expected = [_advance(whole, step) for step in range(5)]
    first = PlainEngine(_make_net(), settings)
    losses = [_advance(first, step) for step in range(2)]
    first.save(tmp_path / "engine")
    second = PlainEngine(_make_net(seed=1), settings)
    second.load(tmp_path / "engine")
    losses += [_advance(second, step) for step in range(2, 5)]
    assert losses == expected
    mine, theirs = second.export(), whole.export()
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())


def test_bfloat16_takes_steps_that_it_cannot_hold() -> None:
    engine = PlainEngine(
        nn.Linear(1, 1, bias=False), EngineSettings(learning_rate=1e-4, precision="bfloat16")
    )
    start = engine.export()["weight"].item()
    for _ in range(10):
        engine.backward(engine(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
        engine.step(1.0)
    assert engine.module.weight.dtype == torch.bfloat16
    assert engine.export()["weight"].item() == pytest.approx(start - 10 * 1e-4, rel=1e-4)


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    engine = PlainEngine(_make_net(), SETTINGS)
    before = engine.export()
    engine.backward(_make_loss(0)(engine) * float("nan"))
    assert not torch.tensor(engine.step(1.0).gradient_norm).isfinite()
    assert all(torch.equal(weight, before[name]) for name, weight in engine.export().items())


def test_frozen_weights_stay_and_are_not_saved(tmp_path: Path) -> None:
    net = _make_net()
    net.enter.requires_grad_(False)
    engine = PlainEngine(net, SETTINGS)
    before = net.enter.weight.detach().clone()
    engine.set_trainable(yes=False)
    assert not any(weight.requires_grad for weight in net.parameters())
    engine.set_trainable(yes=True)
    assert not net.enter.weight.requires_grad
    assert net.leave.weight.requires_grad
    _advance(engine, 0)
    assert torch.equal(net.enter.weight, before)
    engine.save(tmp_path)
    state = torch.load(tmp_path / PlainEngine.FILE, weights_only=True)
    assert not any(name.startswith("enter") for name in state["weights"])
    assert "enter.weight" in engine.export()


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    PlainEngine(_make_net(), SETTINGS).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 of 7 tensors .*first: leave.weight"):
        PlainEngine(Net(3), SETTINGS).load(tmp_path)
    with pytest.raises(CheckpointError, match="the kind of engine that wrote"):
        PlainEngine(_make_net(), SETTINGS).load(tmp_path / "nowhere")


def test_muon_is_for_the_matrices_of_blocks() -> None:
    names = list_block_matrices(_make_net())
    assert names == {"blocks.0.0.weight", "blocks.1.0.weight"}
    adam, muon = (
        PlainEngine(_make_net(), replace(SETTINGS, optimizer=kind)) for kind in ("adamw", "muon")
    )
    for engine in (adam, muon):
        _advance(engine, 0)
    other = muon.export()
    differing = {n for n, weight in adam.export().items() if not torch.equal(weight, other[n])}
    assert differing == names


def test_with_muon_every_weight_of_a_talking_model_is_stepped() -> None:
    model = make_model()
    matrices = list_block_matrices(model)
    blocks = {f"dit.blocks.{n}" for n, w in model.dit.blocks.named_parameters() if w.ndim == 2}
    assert matrices == blocks
    engine = PlainEngine(model, replace(SETTINGS, optimizer="muon", ema_decay=None))
    before = engine.export()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    engine.step(1.0)
    assert not {n for n, weight in engine.export().items() if torch.equal(weight, before[n])}
