"""Retry of a network call with less memory after the device ran out of it.

Separate because the transformer and the video VAE share it; each implements ``saves_memory`` in its
own way.
"""

from __future__ import annotations

from collections.abc import Callable
from logging import getLogger
from typing import Protocol

import torch
from torch import Tensor

_log = getLogger(__name__)


class LowMemoryNetwork(Protocol):
    """Network that can process its input in small pieces, with the same result up to rounding.

    Attributes:
        saves_memory: whether it does so.
    """

    saves_memory: bool


def is_shortage(error: Exception) -> bool:
    """Return whether an error means that the device ran out of memory.

    Args:
        error: any exception.

    Returns:
        True for torch's own class, and for any RuntimeError with "out of memory" in its message:
        some devices, and CUDA when it reports the error late, raise no class of its own.
    """
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def call_with_low_memory(
    network: LowMemoryNetwork, call: Callable[[], Tensor], name: str
) -> Tensor:
    """Call a network; if memory runs out, set ``saves_memory``, which stays set, and call it again.

    Args:
        network: the network that ``call`` uses.
        call: function to run; it may run twice.
        name: name of the network in the log message.

    Returns:
        The result of the call.

    Raises:
        RuntimeError: if the call fails for another reason, or ``saves_memory`` was set before.
    """
    try:
        return call()
    except RuntimeError as error:
        if network.saves_memory or not is_shortage(error):
            raise
    # Outside the except block: inside it, the traceback still refers to the tensors of the failed
    # call, and their memory cannot be freed.
    network.saves_memory = True
    torch.cuda.empty_cache()
    _log.warning(
        "memory ran out in %s, which from now on works in small pieces: that takes less memory and "
        "more time",
        name,
    )
    return call()
