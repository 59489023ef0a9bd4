"""Communication between the ranks of a run; a single process is rank 0 of 1.

This is plain ``torch.distributed``, and separate from the engines because the training loop and
the checkpoints need it with every engine.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """Leave the process group, at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_over_ranks(values_N: Tensor) -> list[float]:
    """Average numbers over all ranks; every rank gets the same means.

    A number that is not finite on one rank is afterwards not finite on any, so all ranks reach the
    same decision.

    Args:
        values_N: the same number of values on every rank, in the same order.

    Returns:
        The means.
    """
    values_N = values_N.double() if values_N.device.type == "cpu" else values_N.float()
    if world_size() > 1:
        values_N = values_N.clone()
        dist.all_reduce(values_N)
        values_N = values_N / world_size()
    return values_N.cpu().tolist()  # one copy; on a GPU the only wait


def mean_scalars(named: dict[str, Tensor]) -> dict[str, float]:
    """Average named scalars over all ranks, with one message and one synchronisation of the device.

    Args:
        named: scalars by name, the same names on every rank.

    Returns:
        The means by name.
    """
    if not named:
        return {}
    stacked = torch.stack([value.detach().float().reshape(()) for value in named.values()])
    return dict(zip(named, mean_over_ranks(stacked), strict=True))
