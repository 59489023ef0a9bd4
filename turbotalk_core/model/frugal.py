"""Once more with less memory, where a network ran out of it.

Separate because the transformer and the codec do the same, each with a frugal way of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from logging import getLogger
from typing import Protocol

import torch
from torch import Tensor

_log = getLogger(__name__)


class FrugalNetwork(Protocol):
    """A network that can do the same in small pieces.

    Attributes:
        is_frugal: whether it does.
    """

    is_frugal: bool


def is_shortage(error: Exception) -> bool:
    """Tell an error that says that the device's memory ran out from others.

    Args:
        error: anything that was raised.

    Returns:
        Whether it is one, of whatever kind: it has no class of its own on every device, nor where
        CUDA tells of it late.
    """
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def call_frugally(network: FrugalNetwork, call: Callable[[], Tensor], name: str) -> Tensor:
    """Call a network, and if memory runs out once more in its frugal way, in which it stays.

    Args:
        network: that is called.
        call: what calls it; it may be called twice.
        name: of the network, for people.

    Returns:
        What the call gave.
    """
    try:
        return call()
    except RuntimeError as error:
        if network.is_frugal or not is_shortage(error):
            raise
    # Not in the block above, where the error still holds what lay in memory when it was raised.
    network.is_frugal = True
    torch.cuda.empty_cache()
    _log.warning(
        "memory ran out in %s, which from now on works in small pieces: that takes less memory and "
        "more time",
        name,
    )
    return call()
