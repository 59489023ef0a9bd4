"""Noise schedules: descending sigmas in [0, 1] that end in 0.

N steps have N + 1 sigmas, float32. Training and inference call the same functions, so that a
student is sampled at the noise levels that it was trained on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ScheduleError
from ..request import MAX_DISTILLED_STEPS, TalkRequest


def reference_sigmas(num_inference_steps: int, shift: float) -> Tensor:
    """Compute the sigmas of the many-step reference schedule.

    The timesteps are linspace(1000, 1, N), shifted, then 0. The last step does almost nothing: at
    shift 7 it goes from sigma 0.007 to 0, so N steps do the work of N - 1.

    Args:
        num_inference_steps: N, at least 1.
        shift: flow shift, > 0.

    Returns:
        Sigmas, [N + 1].

    Raises:
        ScheduleError: if there is no step or the shift is not positive and finite.

    Source: InfiniteTalk, wan/multitalk.py (timesteps) and timestep_transform.
    """
    if num_inference_steps < 1:
        raise ScheduleError(f"got {num_inference_steps} steps; at least 1 is needed")
    unshifted = torch.linspace(1000, 1, num_inference_steps, dtype=torch.float64) / 1000
    return _finish(unshifted, shift)


def distilled_sigmas(num_inference_steps: int, shift: float) -> Tensor:
    """Compute the sigmas of the distilled schedule, at which a few-step student was trained.

    Before the shift, the timesteps divide 1000 evenly: (1000), (1000, 500), thirds, (1000, 750,
    500, 250); then 0. All steps have equal length before the shift, unlike the last step of the
    reference schedule.

    Args:
        num_inference_steps: N, 1 to 4.
        shift: flow shift, > 0; must be the shift used in distillation.

    Returns:
        Sigmas, [N + 1].

    Raises:
        ScheduleError: if N is not 1 to 4 or the shift is not positive and finite.

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
    """Return the sigmas of a request: its own list, or those of its schedule.

    Args:
        request: the request; its values were checked when it was made.

    Returns:
        Sigmas, [num_inference_steps + 1].
    """
    if request.sigmas is not None:
        return torch.tensor(request.sigmas, dtype=torch.float32)
    space = distilled_sigmas if request.schedule == "distilled" else reference_sigmas
    return space(request.num_inference_steps, request.shift)


def shift_sigmas(unshifted: Tensor, shift: float) -> Tensor:
    """Shift noise levels towards 1: sigma = s u / (1 + (s - 1) u).

    The shift multiplies the ratio of noise to data, u / (1 - u), by s; 0 and 1 stay fixed. Large
    latents need it: their neighbouring values are redundant, so at the same sigma more of the
    picture survives the noise, and more of the steps must lie at high noise.

    Args:
        unshifted: u, noise levels in [0, 1].
        shift: s, > 0; 1 changes nothing.

    Returns:
        Shifted noise levels, in the shape of ``unshifted``.

    Raises:
        ScheduleError: if the shift is not positive and finite.

    Source: Wan 2.1; for the reason, Esser et al., Scaling Rectified Flow Transformers (2024).
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ScheduleError(f"got shift {shift}; it must be above 0, and 1 means none")
    return shift * unshifted / (1 + (shift - 1) * unshifted)


def _finish(unshifted: Tensor, shift: float) -> Tensor:
    shifted = shift_sigmas(unshifted, shift)
    return torch.cat((shifted, shifted.new_zeros(1))).float()
