"""Continuation: the target is real data at the border and the initial student elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.training.tiny_networks import make_batch, make_engines, make_model, take_step
from training.methods.continuation import Continuation, anchor, drift, weigh_border
from training.methods.method import Learning
from training.models.batch import Batch
from training.models.networks import TalkingModel
from turbotalk_core.errors import ScheduleError
from turbotalk_core.geometry import MASK_CHANNELS

METHOD = Continuation()


def _lengthen(batch: Batch, frames: int) -> Batch:
    """Make chunks of more latent frames than ``make_batch`` draws, with the same pinned frames."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(frames))

    size, channels, given, *place = batch.latents_BCFHW.shape
    unpinned = torch.zeros(size, frames - given, dtype=torch.bool)
    return replace(
        batch,
        latents_BCFHW=draw(size, channels, frames, *place),
        reference_BCFHW=draw(size, batch.reference_BCFHW.shape[1], frames, *place),
        later_BPFKLD=draw(size, 1, frames - 1, *batch.later_BPFKLD.shape[3:]),
        pinned_BF=torch.cat((batch.pinned_BF, unpinned), 1),
    )


def test_one_step_updates_the_student_and_not_what_it_was() -> None:
    engines = make_engines(METHOD, learning_rate=1e-3)
    start = make_model().state_dict()
    terms = take_step(METHOD, engines, make_batch())
    moved = {
        role: sum(not t.equal(start[name]) for name, t in engine.module.state_dict().items())
        for role, engine in engines.items()
    }
    assert moved["before"] == 0
    assert moved["student"] > 30
    assert set(terms) == {
        "student/loss",
        "student/continuation_loss",
        "student/border_loss",
        "student/border_before",
        *(f"student/student_{y}" for y in ("motion", "mean", "std")),
    }


def test_the_student_may_learn_by_lora() -> None:
    method = replace(METHOD, student=Learning(trains="lora", learning_rate=1e-3, rank=2, alpha=2))
    engines = make_engines(method)
    take_step(method, engines, make_batch())
    state = engines["student"].module.state_dict()
    assert all(torch.equal(state[name], t) for name, t in make_model().state_dict().items())
    assert any(t.any() for name, t in state.items() if name.endswith("lora_up"))


def test_a_student_of_several_steps_is_called_at_each() -> None:
    calls: list[tuple[str, float]] = []
    method = replace(METHOD, num_steps=3, shift=1.0)
    engines = make_engines(method)

    def listen(role: str) -> Callable[..., None]:
        return lambda _, inputs: calls.append((role, round(float(inputs[1][0]), 3)))

    for role, engine in engines.items():
        engine.module.register_forward_pre_hook(listen(role))
    take_step(method, engines, make_batch())
    levels = (1.0, 0.667, 0.333)
    assert calls == [(role, level) for role in ("before", "student") for level in levels]


def test_a_schedule_that_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ScheduleError, match="as many timesteps as steps"):
        Continuation(num_steps=2, timesteps=(1000.0,))


def test_the_border_falls_from_the_first_frame_behind_the_given_ones() -> None:
    batch = _lengthen(make_batch(2), 9)
    share = weigh_border(batch, 4)
    assert share.shape == (2, 1, 9, 1, 1)
    assert share[0].flatten().tolist() == [0.0] * 9  # it begins a video
    assert share[1].flatten().tolist() == [0, 0, 0, 1, 0.75, 0.5, 0.25, 0, 0]


def test_given_frames_are_moved_by_what_is_off_at_the_end() -> None:
    batch = _lengthen(make_batch(2), 6)
    error = torch.randn(batch.latents_BCFHW.shape, generator=torch.Generator().manual_seed(1))
    moved = drift(batch, error)
    by = moved.latents_BCFHW - batch.latents_BCFHW
    assert not by[0].any()
    assert not by[1, :, 0].any()
    torch.testing.assert_close(by[1, :, 1:3], error[1, :, 4:6], atol=1e-6, rtol=0)
    assert not by[1, :, 3:].any()


def test_chunks_that_go_on_may_begin_with_the_reference_image() -> None:
    batch = make_batch(4)
    anchored = anchor(batch, torch.tensor([True, True, False, False]))
    latents, image = batch.latents_BCFHW, batch.reference_BCFHW[:, MASK_CHANNELS:]
    assert torch.equal(anchored.latents_BCFHW[[0, 2, 3]], latents[[0, 2, 3]])
    assert torch.equal(anchored.latents_BCFHW[1, :, 0], image[1, :, 0])
    assert torch.equal(anchored.latents_BCFHW[1, :, 1:], latents[1, :, 1:])


Make = Callable[[Batch], Tensor]


def _lose(
    monkeypatch: pytest.MonkeyPatch,
    batch: Batch,
    make_student: Make,
    make_before: Make,
    **settings: float,
) -> dict[str, float]:
    """Compute the loss terms for known clean latents of both networks."""
    method = replace(METHOD, **settings)
    engines = make_engines(method)
    student = engines["student"].module

    def predict(
        model: TalkingModel, noisy: Tensor, sigma: Tensor, shown: Batch, **_: object
    ) -> Tensor:
        made = make_student(shown) if model is student else make_before(shown)
        return (noisy - made) / sigma.view(-1, 1, 1, 1, 1) + 0 * sum(
            p.sum() for p in model.parameters()
        )

    monkeypatch.setattr(TalkingModel, "forward", predict)
    return take_step(method, engines, batch, steps_optimizers=False)


def test_both_begin_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(2)
    heads: list[Tensor] = []

    def remember(shown: Batch) -> Tensor:
        heads.append(shown.latents_BCFHW[:, :, 0])
        return batch.latents_BCFHW

    _lose(monkeypatch, batch, remember, remember, anchored=1.0)
    before, student = heads
    assert torch.equal(before, student)
    assert torch.equal(before[1], batch.reference_BCFHW[1, MASK_CHANNELS:, 0])


def test_who_does_what_it_did_and_was_right_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(4)

    def predict(_: Batch) -> Tensor:
        return batch.latents_BCFHW

    terms = _lose(monkeypatch, batch, predict, predict, anchored=0.0)
    assert terms["student/loss"] == pytest.approx(0, abs=1e-10)
    assert terms["student/border_before"] == pytest.approx(0, abs=1e-10)


def test_at_the_border_the_student_is_to_be_right_and_elsewhere_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where what it was is off by 2, it is asked for half of that two frames behind the border."""
    batch = _lengthen(make_batch(1, num_pinned=(3,)), 8)

    def was(_: Batch) -> Tensor:
        return batch.latents_BCFHW + 2

    def goal(_: Batch) -> Tensor:
        off = torch.tensor([0.0, 0, 0, 0, 0.5, 1, 1.5, 2])
        return batch.latents_BCFHW + off.view(-1, 1, 1)

    terms = _lose(monkeypatch, batch, goal, was, drift=0.0, anchored=0.0)
    assert terms["student/loss"] == pytest.approx(0, abs=1e-8)
    assert terms["student/border_before"] == pytest.approx(4, rel=1e-4)
    # As it was: 2 off at the border, where it counts 4, then 1.5, 1, 0.5 and 0.
    lost = _lose(monkeypatch, batch, was, was, drift=0.0, anchored=0.0)["student/loss"]
    counts = [4, 3.25, 2.5, 1.75, 1]
    errors = [4, 2.25, 1, 0.25, 0]
    expected = sum(c * e for c, e in zip(counts, errors, strict=True)) / sum(counts)
    assert lost == pytest.approx(expected, rel=1e-4)


def test_frames_that_are_off_are_to_be_continued_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The student begins where the given frames are, and comes back to what it did gradually."""
    batch = _lengthen(make_batch(1, num_pinned=(3,)), 8)
    seen: list[Tensor] = []

    def was(_: Batch) -> Tensor:
        return batch.latents_BCFHW + 2

    def goal(shown: Batch) -> Tensor:
        seen.append((shown.latents_BCFHW - batch.latents_BCFHW)[0, 0, :, 0, 0])
        return batch.latents_BCFHW + 2

    # With all of the drift the goal is as far off as what it was, everywhere.
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.ones(*size))
    terms = _lose(monkeypatch, batch, goal, was, drift=1.0, anchored=0.0)
    assert terms["student/loss"] == pytest.approx(0, abs=1e-8)
    torch.testing.assert_close(seen[0], torch.tensor([0.0, 2, 2, 0, 0, 0, 0, 0]))


def test_it_learns_to_continue() -> None:
    method = replace(METHOD, drift=0.0, anchored=0.0, border=1)
    batch = make_batch(2, num_pinned=(3,))
    engines = make_engines(method, learning_rate=0.01)
    terms = [take_step(method, engines, batch, step) for step in range(40)]
    first, last = terms[0]["student/border_loss"], terms[-1]["student/border_loss"]
    assert last < 0.5 * first
