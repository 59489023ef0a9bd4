"""Divergence check: conditions and messages."""

import pytest

from training.engine.divergence import Guard, GuardSettings
from turbotalk_core.errors import TrainingError


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_term_that_is_no_number_stops_it_at_once(value: float) -> None:
    guard = Guard(GuardSettings(most_skips=0))
    guard.check(6, {"student/loss": 1.0})
    with pytest.raises(TrainingError, match=r"step 7: critic/penalty = (nan|inf|-inf);"):
        guard.check(7, {"student/loss": 1.0, "critic/penalty": value})


def test_a_term_that_stays_too_large_stops_it() -> None:
    guard = Guard(GuardSettings(largest=10.0, patience=3))
    for step, value in enumerate((11.0, -12.0, 9.0, 11.0, 12.0)):
        guard.watch(step, {"loss": value, "other": 10.0})
    assert guard.streaks == {"loss": 2}
    with pytest.raises(TrainingError, match=r"loss = 13 has been above 10 for 3 steps"):
        guard.watch(5, {"loss": 13.0, "other": 10.0})


def test_a_term_may_have_a_limit_of_its_own() -> None:
    guard = Guard(GuardSettings(limits={"loss": 1.0}, patience=1))
    guard.watch(0, {"loss": 1.0, "other": 1e5})
    with pytest.raises(TrainingError, match="loss = 2 has been above 1 for 1 steps"):
        guard.watch(1, {"loss": 2.0})


def test_its_memory_can_be_carried_on() -> None:
    guard = Guard(GuardSettings(largest=1.0, patience=2))
    guard.watch(0, {"loss": 2.0})
    other = Guard(guard.settings)
    other.streaks = dict(guard.streaks)
    with pytest.raises(TrainingError):
        other.watch(1, {"loss": 2.0})


def test_steps_that_are_left_out_are_counted_in_a_row() -> None:
    guard = Guard(GuardSettings(most_skips=2))
    bad, left_out = {"critic/loss": float("nan")}, {"critic/skipped": 1.0}
    for _ in range(2):  # a good step between them begins the count anew
        for step in (1, 2):
            assert not guard.check(step, bad)
            guard.watch(step, left_out)
        guard.watch(3, {"critic/loss": 1.0})
        assert guard.check(3, {"critic/loss": 1.0})
    for step in (4, 5):
        assert not guard.check(step, bad)
        guard.watch(step, left_out)
    with pytest.raises(TrainingError, match=r"step 6: critic/loss = nan, after 2 steps in a row"):
        guard.check(6, bad)
