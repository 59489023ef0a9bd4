"""Peak memory of a call, counted tensor by tensor.

On the meta device it counts the memory that a call would need without allocating it, as shapes
alone determine it. Workspace that a kernel allocates inside one operation is not counted. Separate
because it works for any network.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def count_memory(module: nn.Module, call: Callable[[], object]) -> int:
    """Return the peak memory of the tensors that a call allocates.

    Args:
        module: network; its weights exist before the call and are not counted.
        call: function that makes the inputs and calls the module, on any device; the inputs count.

    Returns:
        Bytes.
    """
    count = _MemoryCount(module)
    with torch.no_grad(), _FusedAttention(), count:
        call()
    return count.peak


class _MemoryCount(TorchDispatchMode):
    """Dispatch mode that counts the storage of each tensor an operation makes until it is freed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        weights = (*module.parameters(), *module.buffers())
        self._known = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:  # a view, or written in place
            return
        self._known.add(key)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._live -= num_bytes


class _FusedAttention(TorchFunctionMode):
    """Function mode in which attention on the meta device makes its output alone, as fused kernels.

    Without it the meta device would allocate all attention scores, which no real device has to.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            query, _, value = args
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
