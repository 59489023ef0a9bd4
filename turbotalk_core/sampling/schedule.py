"""The noise levels of a run: sigma in [0, 1], descending, ending in 0.

Goes in: a number of steps and a shift. Comes out: one sigma more than there are steps, float32.
Training and inference call the same functions, so that no student is sampled on other levels than
it was trained on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ScheduleError
from ..request import MAX_DISTILLED_STEPS, TalkRequest


def reference_sigmas(num_inference_steps: int, shift: float) -> Tensor:
    """Space the noise levels as the many-step reference sampler does.

    Timesteps linspace(1000, 1, N), shifted, then 0. The last step is nearly empty: at shift 7 it
    goes from 0.007 to 0, so N steps do the work of N - 1.

    Args:
        num_inference_steps: N, at least 1.
        shift: flow shift, > 0.

    Returns:
        Sigmas, [N + 1].

    Raises:
        ScheduleError: no step, or a shift that is not positive.

    Source: InfiniteTalk, wan/multitalk.py (timesteps) and timestep_transform.
    """
    if num_inference_steps < 1:
        raise ScheduleError(f"got {num_inference_steps} steps; at least 1 is needed")
    unshifted = torch.linspace(1000, 1, num_inference_steps, dtype=torch.float64) / 1000
    return _finish(unshifted, shift)


def distilled_sigmas(num_inference_steps: int, shift: float) -> Tensor:
    """Space the noise levels as a few-step student was trained on them.

    Timesteps before the shift are even parts of 1000: (1000), (1000, 500), thirds, (1000, 750,
    500, 250); then 0. Every step does equal work, unlike the reference schedule's last.

    Args:
        num_inference_steps: 1 to 4.
        shift: flow shift, > 0; must be that of the distillation.

    Returns:
        Sigmas, [N + 1].

    Raises:
        ScheduleError: another number of steps, or a shift that is not positive.

    Source: TurboTalk, Eq. 4-5; the values are inferred, those for 4 and 2 steps are
    Self-Forcing's and SoulX-FlashTalk's.
    """
    if not 1 <= num_inference_steps <= MAX_DISTILLED_STEPS:
        raise ScheduleError(
            f"got {num_inference_steps} steps; the distilled schedule has 1 to "
            f"{MAX_DISTILLED_STEPS}, and the reference schedule takes any number"
        )
    indices = torch.arange(num_inference_steps, dtype=torch.float64)
    return _finish(1 - indices / num_inference_steps, shift)


def request_sigmas(request: TalkRequest) -> Tensor:
    """Give the noise levels of a request: its own list, or those of its schedule.

    Args:
        request: valid by construction.

    Returns:
        Sigmas, [num_inference_steps + 1].
    """
    if request.sigmas is not None:
        return torch.tensor(request.sigmas, dtype=torch.float32)
    space = distilled_sigmas if request.schedule == "distilled" else reference_sigmas
    return space(request.num_inference_steps, request.shift)


def shift_sigmas(unshifted: Tensor, shift: float) -> Tensor:
    """Move noise levels towards 1: sigma = s u / (1 + (s - 1) u).

    Args:
        unshifted: u, in [0, 1].
        shift: s, > 0; 1 leaves them.

    Returns:
        The shape of ``unshifted``.

    Raises:
        ScheduleError: a shift that is not positive.

    Source: Wan 2.1.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ScheduleError(f"got shift {shift}; it must be above 0, and 1 means none")
    return shift * unshifted / (1 + (shift - 1) * unshifted)


def _finish(unshifted: Tensor, shift: float) -> Tensor:
    shifted = shift_sigmas(unshifted, shift)
    return torch.cat((shifted, shifted.new_zeros(1))).float()
