"""Schedules of students, and distributions of noise levels."""

from __future__ import annotations

import pytest
import torch

from training.engine.rng import Draws
from training.methods.timesteps import (
    choose_timesteps,
    draw_last_timestep,
    draw_sigmas,
    even_timesteps,
    place_last_timestep,
    to_sigmas,
)
from turbotalk_core.errors import ScheduleError
from turbotalk_core.sampling.schedule import distilled_sigmas, shift_sigmas


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 11.0])
def test_a_student_is_trained_on_the_levels_it_is_sampled_at(num_steps: int, shift: float) -> None:
    sampled = distilled_sigmas(num_steps, shift)[:-1].tolist()
    assert to_sigmas(even_timesteps(num_steps), shift) == sampled


def test_the_schedule_of_four_steps_under_shift_5() -> None:
    assert even_timesteps(4) == (1000, 750, 500, 250)
    assert to_sigmas(even_timesteps(4), 5.0) == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8])


@pytest.mark.parametrize("timesteps", [(), (500, 750), (750, 750), (1001, 500), (1000, 0)])
def test_timesteps_out_of_order_or_range_are_refused(timesteps: tuple[float, ...]) -> None:
    with pytest.raises(ScheduleError, match="must descend"):
        to_sigmas(timesteps, 5.0)


def test_a_list_of_one_s_own_has_as_many_timesteps_as_steps() -> None:
    assert choose_timesteps(2, (1000, 750)) == (1000, 750)
    assert choose_timesteps(2, None) == (1000, 500)
    with pytest.raises(ScheduleError, match=r"got 3 steps and 2 timesteps, \(1000, 750\)"):
        choose_timesteps(3, (1000, 750))
    with pytest.raises(ScheduleError, match="got 0 steps"):
        choose_timesteps(0, None)


def test_a_last_timestep_is_uniform_between_the_two_phases() -> None:
    generator = _generator()
    drawn = torch.tensor([draw_last_timestep(250, 1000 / 3, generator) for _ in range(4000)])
    assert drawn.min() > 250
    assert drawn.max() <= 1000 / 3 + 1e-3
    shares = (drawn - 250) / (1000 / 3 - 250)
    for share in (0.1, 0.5, 0.9):
        assert (shares <= share).float().mean().item() == pytest.approx(share, abs=0.03)


def test_a_moving_bound_lets_the_last_timestep_come_closer() -> None:
    drawn = [draw_last_timestep(500, 1000, _generator(seed), 0.1) for seed in range(200)]
    assert 500 < min(drawn) < max(drawn) <= 550


def test_all_ranks_draw_the_same_last_timestep() -> None:
    assert draw_last_timestep(250, 500, _generator(3)) == draw_last_timestep(
        250, 500, _generator(3)
    )


def test_only_the_last_step_of_a_schedule_moves() -> None:
    assert place_last_timestep((1000, 500), 400) == (1000, 400)


def test_the_only_step_gets_another_behind_it() -> None:
    assert place_last_timestep((1000,), 700) == (1000, 700)
    assert place_last_timestep((1000,), 1000) == (1000,)


@pytest.mark.parametrize("shift", [1.0, 5.0, 11.0])
def test_score_levels_are_shifted_and_inside_their_bounds(shift: float) -> None:
    sigma_B = draw_sigmas(4000, shift, Draws(0, 0, 0), "level", low=0.02, high=0.98)
    assert sigma_B.min() == pytest.approx(0.02, abs=2e-3)
    assert sigma_B.max() == pytest.approx(0.98, abs=1e-3)
    # No level is drawn more often because a bound is there.
    assert len(sigma_B.unique()) > 3990
    first, last = (sigma / (shift - (shift - 1) * sigma) for sigma in (0.02, 0.98))
    for place in (0.1, 0.5, 0.9):
        level = shift_sigmas(torch.tensor(first + place * (last - first)), shift)
        assert (sigma_B <= level).float().mean().item() == pytest.approx(place, abs=1e-3)


def test_levels_are_spread_over_all_micro_batches_of_an_update() -> None:
    count, size = 8, 2
    for step in range(3):
        drawn = [
            draw_sigmas(size, 1.0, Draws(0, step, slot, count=count), "level")
            for slot in range(count)
        ]
        cells = (torch.cat(drawn) * count * size).floor().long()
        assert sorted(cells.tolist()) == list(range(count * size))
    # The slots of one step do not keep their places in the next.
    firsts = [draw_sigmas(1, 1.0, Draws(0, step, 0, count=8), "level").item() for step in range(50)]
    assert max(firsts) - min(firsts) > 0.8


def test_each_sample_alone_is_uniform_in_spite_of_the_spread() -> None:
    first = torch.stack(
        [draw_sigmas(4, 1.0, Draws(seed, 0, 0), "level")[0] for seed in range(2000)]
    )
    for place in (0.2, 0.5, 0.8):
        assert (first <= place).float().mean().item() == pytest.approx(place, abs=0.04)
