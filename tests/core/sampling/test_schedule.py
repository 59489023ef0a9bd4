"""Noise levels against closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.family import make_request
from turbotalk_core.errors import ScheduleError
from turbotalk_core.request import check_sigmas
from turbotalk_core.sampling.schedule import distilled_sigmas, reference_sigmas, request_sigmas


@pytest.mark.parametrize(
    ("steps", "unshifted"),
    [
        (1, [1]),
        (2, [1, 1 / 2]),
        (3, [1, 2 / 3, 1 / 3]),
        (4, [1, 3 / 4, 1 / 2, 1 / 4]),
    ],
)
@given(shift=st.floats(0.1, 20))
def test_distilled_sigmas_are_even_parts_shifted(
    steps: int, unshifted: list[float], shift: float
) -> None:
    expected = [shift * u / (1 + (shift - 1) * u) for u in unshifted]
    assert distilled_sigmas(steps, shift).tolist() == pytest.approx([*expected, 0], rel=1e-6)


@given(steps=st.integers(1, 200), shift=st.floats(0.05, 50))
def test_levels_fall_from_one_to_zero(steps: int, shift: float) -> None:
    sigmas = reference_sigmas(steps, shift)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1
    check_sigmas(sigmas.tolist())


@pytest.mark.parametrize("steps", [0, 5, 40])
def test_a_student_has_no_such_schedule(steps: int) -> None:
    with pytest.raises(ScheduleError, match=f"got {steps} steps.*1 to 4"):
        distilled_sigmas(steps, 5)


@pytest.mark.parametrize("shift", [0, -1, float("nan"), float("inf")])
def test_a_shift_that_is_none_is_refused(shift: float) -> None:
    with pytest.raises(ScheduleError, match="got shift"):
        reference_sigmas(4, shift)
    with pytest.raises(ScheduleError, match="got shift"):
        distilled_sigmas(4, shift)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ScheduleError, match="got 0 steps"):
        reference_sigmas(0, 5)


def test_a_request_gets_its_schedule_or_its_own_list() -> None:
    def ask(**settings: object) -> list[float]:
        return request_sigmas(make_request(num_inference_steps=2, shift=3.0, **settings)).tolist()

    assert ask(schedule="reference") == reference_sigmas(2, 3).tolist()
    assert ask(schedule="distilled") == [1, 0.75, 0]
    assert ask(schedule="distilled", sigmas=(1.0, 0.25, 0.0)) == [1, 0.25, 0]
