"""Timestep schedules of a student, and noise levels for its training.

Schedules are written as timesteps before the shift, in 0..1000, highest first, as papers do. The
networks and all arithmetic use sigmas in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from training.engine.rng import Draws
from turbotalk_core.errors import ScheduleError
from turbotalk_core.sampling.schedule import shift_sigmas


def even_timesteps(num_steps: int) -> tuple[float, ...]:
    """Compute T_N, the timesteps of an N-step student: even parts of 1000.

    The sampler's ``distilled_sigmas`` are the same list after the shift. Another list, such as the
    prefixes (1000, 750, 500) and (1000, 750), is sampled through a request's ``sigmas``.

    Args:
        num_steps: N, at least 1.

    Returns:
        N timesteps: (1000, 750, 500, 250), (1000, 667, 333), (1000, 500), (1000).

    Raises:
        ScheduleError: if ``num_steps`` is below 1.

    Source: TurboTalk's T_4 to T_1 [inferred]: T_4 [read: Self-Forcing], T_2 [read: FlashTalk].
    """
    if num_steps < 1:
        raise ScheduleError(f"got {num_steps} steps; a student needs at least 1")
    return tuple(1000 * (1 - i / num_steps) for i in range(num_steps))


def choose_timesteps(num_steps: int, timesteps: Sequence[float] | None) -> tuple[float, ...]:
    """Return the schedule of a student: the given timesteps, or even parts of 1000.

    Args:
        num_steps: number of the student's steps.
        timesteps: timesteps before the shift; None for even parts.

    Returns:
        ``num_steps`` timesteps.

    Raises:
        ScheduleError: if ``timesteps`` has another length, or ``num_steps`` is below 1.
    """
    if timesteps is None:
        return even_timesteps(num_steps)
    if len(timesteps) != num_steps:
        raise ScheduleError(
            f"got {num_steps} steps and {len(timesteps)} timesteps, {tuple(timesteps)}; give as "
            "many timesteps as steps"
        )
    return tuple(timesteps)


def to_sigmas(timesteps: Sequence[float], shift: float) -> list[float]:
    """Convert timesteps to noise levels.

    Args:
        timesteps: timesteps before the shift, descending, in (0, 1000].
        shift: flow shift, > 0.

    Returns:
        One sigma per timestep, equal to the sampler's: computed in float64, rounded to float32.

    Raises:
        ScheduleError: if the timesteps do not descend, are out of range, or there are none.
    """
    descends = all(one > next_one for one, next_one in pairwise(timesteps))
    if not timesteps or not descends or timesteps[0] > 1000 or timesteps[-1] <= 0:
        raise ScheduleError(
            f"got timesteps {tuple(timesteps)}; they must descend, from at most 1000 to above 0"
        )
    unshifted = torch.tensor(timesteps, dtype=torch.float64) / 1000
    return shift_sigmas(unshifted, shift).float().tolist()


def draw_last_timestep(
    old: float, new: float, generator: torch.Generator, progress: float = 1.0
) -> float:
    """Draw the last timestep of a phase during warm-up: dynamic timestep sampling, Eq. 9.

    A student with fewer steps has to make its last step from a higher noise level than before. The
    warm-up mixes levels between the old and the new one, so the task becomes harder gradually.

    Args:
        old: last timestep of the phase before.
        new: last timestep of this phase, at least ``old``.
        generator: random stream that is the same on all ranks.
        progress: how far the upper bound has moved from old to new, in (0, 1]; 1 for a fixed bound.

    Returns:
        A timestep, uniform in (old, old + progress (new - old)].

    Source: Eq. 9 [read: a third-party note: between the old and the new timestep; inferred: the
    law and its bounds, and the moving bound, from the paper's word "curriculum"].
    """
    share = 1 - torch.rand((), generator=generator).item()
    return old + share * progress * (new - old)


def place_last_timestep(timesteps: Sequence[float], last: float) -> tuple[float, ...]:
    """Replace the last timestep of a schedule.

    In a 1-step student the only step is the first one too, and it must start from pure noise at
    1000: labelling pure noise with a lower timestep would be wrong. So the drawn timestep is
    appended as a second step. As it approaches 1000, the two steps approach the 1-step sampler.

    Args:
        timesteps: schedule of the phase.
        last: the new last timestep, in (0, 1000].

    Returns:
        As many timesteps as given. For a schedule of one timestep, two, if ``last`` is below
        it.

    Source: Eq. 9; for one step [inferred], the bridging reading.
    """
    if len(timesteps) > 1:
        return (*timesteps[:-1], last)
    return tuple(timesteps) if last >= timesteps[0] else (*timesteps, last)


def draw_sigmas(
    size: int, shift: float, draws: Draws, purpose: str, *, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Draw noise levels at which samples are noised for a network that is trained or scores them.

    The unit interval is cut into as many equal parts as an update has chunks, over all its
    micro-batches, and each chunk draws from its own part (stratified sampling). This lowers the
    variance of the mean over the update.

    Args:
        size: number of chunks of this micro-batch, the same for all.
        shift: flow shift, > 0; the larger, the more levels are near 1.
        draws: random streams of the micro-batch.
        purpose: name of the draw.
        low: smallest sigma, after the shift.
        high: largest sigma, above ``low``.

    Returns:
        Sigmas, [size], in [low, high]; each is distributed as a shifted uniform draw that fell
        between the bounds. None is moved onto a bound.

    Source: DMD2, Self-Forcing [read: shift 5, between 0.02 and 0.98, by clamping]; drawing inside
    the bounds and stratification [inferred].
    """
    generator = draws.own(purpose)
    if draws.count == 1:
        places = torch.randperm(size, generator=generator)
    else:
        order = torch.randperm(size * draws.count, generator=draws.shared(purpose))
        places = order[draws.slot * size : (draws.slot + 1) * size]
    spread = (places + torch.rand(size, generator=generator)) / (size * draws.count)
    first, last = (sigma / (shift - (shift - 1) * sigma) for sigma in (low, high))
    return shift_sigmas(first + (last - first) * spread, shift).clamp(low, high)
