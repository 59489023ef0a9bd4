"""What the ranks of a run tell each other; one process alone is rank 0 of 1.

Separate because the loop, the checkpoints and the engines all need it, and none of it is the
business of one engine: it is plain ``torch.distributed``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Tell which rank this process is."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Count the ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """Part from the other ranks, at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_over_ranks(values_N: Tensor) -> list[float]:
    """Average numbers over all ranks, so that all ranks hold the same ones.

    A number that is not finite on one rank is not finite on any of them afterwards, which lets
    all ranks come to the same decision.

    Args:
        values_N: as many on every rank, in the same order.

    Returns:
        The means.
    """
    values_N = values_N.double() if values_N.device.type == "cpu" else values_N.float()
    if world_size() > 1:
        values_N = values_N.clone()
        dist.all_reduce(values_N)
        values_N = values_N / world_size()
    return values_N.tolist()


def mean_scalars(named: dict[str, Tensor]) -> dict[str, float]:
    """Average named scalars over all ranks, in one message and one wait for the device.

    Args:
        named: the same names on every rank.

    Returns:
        The means by name.
    """
    if not named:
        return {}
    stacked = torch.stack([value.detach().float().reshape(()) for value in named.values()])
    return dict(zip(named, mean_over_ranks(stacked), strict=True))
