"""At which noise levels a student is called, and at which it is judged.

Schedules are written as timesteps before the shift, in 0..1000, highest first, as papers do; the
networks and all arithmetic have sigmas.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from turbotalk_core.errors import ScheduleError
from turbotalk_core.sampling.schedule import shift_sigmas


def even_timesteps(num_steps: int) -> tuple[float, ...]:
    """T_N, the timesteps of an N-step student: even parts of 1000.

    The same as ``distilled_sigmas`` of the sampler, before the shift. A list of one's own, such as
    the prefixes (1000, 750, 500) and (1000, 750), is sampled through a request's ``sigmas``.

    Args:
        num_steps: N, at least 1.

    Returns:
        N timesteps: (1000, 750, 500, 250), (1000, 667, 333), (1000, 500), (1000).

    Raises:
        ScheduleError: no step.

    Source: TurboTalk's T_4 to T_1 [inferred]: T_4 [read: Self-Forcing], T_2 [read: FlashTalk].
    """
    if num_steps < 1:
        raise ScheduleError(f"got {num_steps} steps; a student needs at least 1")
    return tuple(1000 * (1 - i / num_steps) for i in range(num_steps))


def choose_timesteps(num_steps: int, timesteps: Sequence[float] | None) -> tuple[float, ...]:
    """Give the schedule of a student: a list of one's own, or even parts of 1000.

    Args:
        num_steps: of the student.
        timesteps: before the shift, or None.

    Returns:
        The timesteps, as many as there are steps.

    Raises:
        ScheduleError: a list of another length, or no step.
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
    """Turn timesteps into noise levels.

    Args:
        timesteps: before the shift, descending, in (0, 1000].
        shift: flow shift, > 0.

    Returns:
        Sigmas, as many, as the sampler has them: computed in float64, rounded to float32.

    Raises:
        ScheduleError: timesteps that are out of order or out of range.
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
    """Eq. 9, dynamic timestep sampling: where a phase's last step stands while it warms up.

    Args:
        old: last timestep of the phase before.
        new: that of this phase, at least ``old``.
        generator: the same on all ranks.
        progress: how far the upper bound has moved from old to new, in (0, 1]; 1 for a fixed one.

    Returns:
        Uniform in (old, old + progress (new - old)].

    Source: Eq. 9 [read: a third-party note: between the old and the new timestep; inferred: the
    law and its bounds, and the moving bound, from the paper's word "curriculum"].
    """
    share = 1 - torch.rand((), generator=generator).item()
    return old + share * progress * (new - old)


def place_last_timestep(timesteps: Sequence[float], last: float) -> tuple[float, ...]:
    """Let the last step of a schedule stand elsewhere.

    The only step of a 1-step student is its first, too. There the drawn timestep becomes a second
    step behind it: pure noise is a level of its own, and must not be called by another one's name.
    As the drawn timestep goes to 1000, this goes to the 1-step sampler.

    Args:
        timesteps: of the phase.
        last: in (0, 1000].

    Returns:
        As many timesteps; for a single one, two, unless the drawn one is the same.

    Source: Eq. 9; one step: [inferred], the bridging reading.
    """
    if len(timesteps) > 1:
        return (*timesteps[:-1], last)
    return tuple(timesteps) if last >= timesteps[0] else (*timesteps, last)


def draw_sigmas(
    size: int, shift: float, generator: torch.Generator, *, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Draw noise levels at which samples are noised or judged.

    One uniform draw is spread over the chunks of a batch, which lowers the variance of what is
    averaged over them.

    Args:
        size: chunks.
        shift: flow shift, > 0; more of them near 1 as it grows.
        generator: differs from rank to rank.
        low: smallest sigma, after the shift.
        high: largest.

    Returns:
        Sigmas, [size], in [low, high]; each is distributed as a shifted and clamped uniform draw.

    Source: DMD2, Self-Forcing [read: shift 5, clamp to 0.02 and 0.98]; the spread [inferred].
    """
    places = torch.randperm(size, generator=generator)
    spread = (places + torch.rand(size, generator=generator)) / size
    return shift_sigmas(spread, shift).clamp(low, high)
