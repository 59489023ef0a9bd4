"""How much memory a call takes, counted tensor by tensor.

On the meta device it counts what a call would take without taking it, as shapes alone decide that.
What it cannot see is what a kernel takes for itself inside one operation. Separate because it knows
nothing of the networks that it watches.
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
    """Count the most bytes of tensors that are alive at one time during a call.

    Args:
        module: whose weights are there before, and so not counted.
        call: makes its inputs and calls the module, on any device; what it makes counts.

    Returns:
        Bytes.
    """
    count = _MemoryCount(module)
    with torch.no_grad(), _FusedAttention(), count:
        call()
    return count.peak


class _MemoryCount(TorchDispatchMode):
    """Sees every tensor that an operation makes, and when its memory is given back."""

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
    """Lets attention on the meta device make its output alone, as fused kernels do.

    Without it the meta device would make all scores, which no device has to.
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
