"""Retry of a network call with less memory after the device ran out of it.

Separate because the transformer and the video VAE share it; each implements ``is_frugal`` in its
own way.
"""

from __future__ import annotations

from collections.abc import Callable
from logging import getLogger
from typing import Protocol

import torch
from torch import Tensor

_log = getLogger(__name__)


class FrugalNetwork(Protocol):
    """Network that can process its input in small pieces, with the same result up to rounding.

    Attributes:
        is_frugal: whether it does so.
    """

    is_frugal: bool


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


def call_frugally(network: FrugalNetwork, call: Callable[[], Tensor], name: str) -> Tensor:
    """Call a network; if memory runs out, set ``is_frugal``, which stays set, and call it again.

    Args:
        network: the network that ``call`` uses.
        call: function to run; it may run twice.
        name: name of the network in the log message.

    Returns:
        The result of the call.

    Raises:
        RuntimeError: if the call fails for another reason, or the network was frugal before.
    """
    try:
        return call()
    except RuntimeError as error:
        if network.is_frugal or not is_shortage(error):
            raise
    # Outside the except block: inside it, the traceback still refers to the tensors of the failed
    # call, and their memory cannot be freed.
    network.is_frugal = True
    torch.cuda.empty_cache()
    _log.warning(
        "memory ran out in %s, which from now on works in small pieces: that takes less memory and "
        "more time",
        name,
    )
    return call()
