"""A CUDA device without a GPU: tensors on it have shape, dtype and device, and no values.

Inside ``FakeCuda`` everything on the CPU is real, and everything on ``cuda`` is a fake tensor of
torch, which refuses to mix devices, dtypes and shapes as a GPU does. A copy to the CPU is zeros.
Memory and synchronisations are recorded. Workspace that a kernel allocates inside one operation is
not known to fake tensors: attention counts as its output and its row sums, as in fused kernels.
"""

from __future__ import annotations

import json
import struct
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from turbotalk_core.checkpoints import tensors
from turbotalk_core.models.rotary import rotary_table
from turbotalk_core.safe_io.tensor_header import read_tensor_header

_DTYPES = {name: dtype for dtype, name in tensors._DTYPES.items()}
CUDA = torch.device("cuda")
ROOT = Path(__file__).parents[1]
_ROOMS = ("turbotalk_core", "nodes", "training")

aten: Any = torch.ops.aten
# Those with an output whose shape or value a real device must report before the program goes on.
# torch raises an error for all of them but the first two, as it cannot know the result.
_DATA_DEPENDENT = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten._linalg_check_errors.default,
}


# Those that take tensors of several devices, and those whose tensors have one dtype.
_COPIES = {
    aten._to_copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
}
_ONE_DTYPE = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """One wait of the program for the device.

    Attributes:
        kind: "to cpu", "to cuda", or the name of the operation.
        shape: shape of the tensor.
        place: innermost function of this project that caused it, as "models/wan.py forward".
        line: line of that function's file.
    """

    kind: str
    shape: tuple[int, ...]
    place: str
    line: int


class FakeCuda(TorchDispatchMode):
    """Context in which ``cuda`` is a device of fake tensors.

    Networks may be built on it, moved to it and called; modules that were loaded from a file need
    fake weights (``FakeCuda.weights``) where real ones would not fit into memory.

    Attributes:
        live: bytes of the tensors that exist on the device.
        peak: largest value of ``live`` so far; ``reset_peak`` sets it back.
        syncs: synchronisations, in order. A copy from pageable memory is one, as torch waits for
            it.
        limit: memory of the device in bytes; beyond it torch's error is raised. None for no limit.
        answer: function of a tensor on the device that returns what ``item`` gives, as it has no
            value; 0 by default.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = self.peak = 0
        self.limit: int | None = None
        self.syncs: list[Sync] = []
        self.answer: Callable[[Tensor], float] = lambda tensor: 0
        self._known: set[int] = set()
        self._outer = ExitStack()

    def __enter__(self) -> FakeCuda:
        rotary_table.cache_clear()  # its cache holds tensors by device
        lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") copies
        self._outer.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        self._outer.enter_context(patch.object(nn.Module, "_apply", _apply))
        if not torch.cuda.is_available():
            torch._C._ensureCUDADeviceGuardSet()
            self._outer.enter_context(patch.object(torch.cuda, "_lazy_init", lambda: None))
        # In the thread of the caller, where this mode holds.
        self._outer.enter_context(torch.autograd.set_multithreading_enabled(False))
        super().__enter__()
        self._outer.enter_context(_FusedAttention(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._outer.close()
        super().__exit__(*error)
        rotary_table.cache_clear()

    @contextmanager
    def weights(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[None]:
        """Make everything that is created without a device fake, and of this device and dtype."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.mode, torch.device(device):  # below this mode, which still counts
                yield
        finally:
            torch.set_default_dtype(default)

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Make the loaders return fake weights in the place of the contents of model files."""

        @contextmanager
        def open_tensors(file: Path) -> Iterator[Callable[[str], Tensor]]:
            entries, _ = read_tensor_header(file)

            def read(name: str) -> Tensor:
                shape, dtype = entries[name]
                with self.mode:
                    return torch.empty(shape, dtype=_DTYPES[dtype])

            yield read

        with patch.object(tensors, "_open_tensors", open_tensors):
            yield

    def reset_peak(self) -> None:
        """Begin to measure the peak from what exists now."""
        self.peak = self.live

    def places(self) -> Counter[str]:
        """Count the synchronisations by place."""
        return Counter(sync.place for sync in self.syncs)

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default:  # for each access to a device; the most frequent
            return args[0].fake_device
        kwargs = kwargs or {}
        devices = {_place(value) for value in _iterate((*args, *kwargs.values()))}
        wanted = kwargs.get("device") or next(
            (value for value in args if isinstance(value, torch.device)), None
        )
        to_device = wanted is not None and torch.device(wanted).type == "cuda"
        on_device = "cuda" in devices
        if not on_device and not to_device and "fake" not in devices:
            return func(*args, **kwargs)
        if _is_composite(func):  # arrives whole for tensors that were made in inference mode
            super().__enter__()
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        if func is aten._local_scalar_dense.default:
            return self._answer(args[0])
        if func is aten.equal.default:
            self._note("equal", args[0])
            return False
        self._check_generator(kwargs, to_device or on_device)
        if on_device:
            _check_mix(func, args)
        self._note_wait(func, args, kwargs)
        if func is aten._to_copy.default and on_device and wanted is not None and not to_device:
            if torch.device(wanted).type == "meta":
                return func(*args, **kwargs)
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.zeros(args[0].shape, dtype=dtype)
        if func is aten.copy_.default and args[0].device.type == "cpu" and on_device:
            return args[0] if isinstance(args[0], FakeTensor) else args[0].zero_()
        with self.mode:
            result = func(*args, **kwargs)
        for made in _iterate((result,)):
            if isinstance(made, FakeTensor) and made.fake_device.type == "cuda":
                self._count(made.untyped_storage())
        return result

    def _answer(self, tensor: Tensor) -> bool | int | float:
        if tensor.device.type == "cuda":
            self._note("item", tensor)
        value = self.answer(tensor)
        if tensor.dtype == torch.bool:
            return bool(value)
        return float(value) if tensor.is_floating_point() else int(value)

    def _note_wait(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is aten._to_copy.default and first is not None:
            wanted = torch.device(kwargs.get("device") or first.device)
            self._note_copy(first, first.device, wanted)
        elif func is aten.copy_.default and first is not None:
            self._note_copy(first, args[1].device, first.device)
        elif func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            assert first is not None
            for index in args[1]:
                if index is None or first.device.type != "cuda":
                    continue
                if index.dtype in (torch.bool, torch.uint8):
                    self._note("index by mask", first)
                elif index.device.type == "cpu":
                    self._note("to cuda", index)
        elif func in _DATA_DEPENDENT and first is not None and first.device.type == "cuda":
            self._note(str(func.overloadpacket.__name__), first)

    def _note_copy(self, tensor: Tensor, source: torch.device, target: torch.device) -> None:
        kinds = {source.type, target.type}
        if kinds == {"cpu", "cuda"}:
            self._note(f"to {target.type}", tensor)

    def _note(self, kind: str, tensor: Tensor) -> None:
        frame = sys._getframe(1)
        while frame is not None and _find_file(frame.f_code.co_filename) is None:
            frame = frame.f_back
        place, line = "elsewhere", 0
        if frame is not None:
            file = _find_file(frame.f_code.co_filename)
            place, line = f"{file} {frame.f_code.co_name}", frame.f_lineno
        self.syncs.append(Sync(kind=kind, shape=tuple(tensor.shape), place=place, line=line))

    @staticmethod
    def _check_generator(kwargs: Mapping[str, Any], on_device: bool) -> None:
        generator = kwargs.get("generator")
        if generator is not None and on_device and generator.device.type != "cuda":
            raise RuntimeError(
                f"Expected a 'cuda' device type for generator but found '{generator.device.type}'"
            )

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:  # a view, or written in place
            return
        self._known.add(key)
        self.live += storage.nbytes()
        weakref.finalize(storage, self._release, key, storage.nbytes())
        if self.limit is not None and self.live > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a fake tensor.")
        self.peak = max(self.peak, self.live)

    def _release(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _find_file(name: str) -> str | None:
    """Return a file of this project by its path, shortened; None for any other file."""
    path = Path(name).resolve()  # a host reads the pack through a link
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in _ROOMS:
        return None
    return path.relative_to(ROOT).as_posix().removeprefix("turbotalk_core/")


def _iterate(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _iterate(value)
        else:
            yield value


def _place(value: Any) -> str | None:
    if isinstance(value, FakeTensor):
        return "cuda" if value.fake_device.type == "cuda" else "fake"
    return None


def _check_mix(func: Any, args: tuple[Any, ...]) -> None:
    """Refuse what kernels refuse; fake tensors alone miss devices in some, and dtypes in most."""
    tensors = [value for value in _iterate(args) if isinstance(value, Tensor)]
    devices = {tensor.device.type for tensor in tensors if tensor.ndim}
    if len(devices) > 1 and func not in _COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device, got {devices}: {func}")
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 and func in _ONE_DTYPE:
        raise RuntimeError(f"expected tensors of the same dtype, got {dtypes}: {func}")


def write_unread(
    path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file with a header and a hole: the size of its weights takes no disk.

    Args:
        path: file to write; folders are made.
        weights: tensors by name, on any device, whose shapes and dtypes the file has.
        metadata: metadata of the file.

    Returns:
        The path, for loaders inside ``FakeCuda.unread``.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    stop = 0
    for name, weight in weights.items():
        start, stop = stop, stop + weight.numel() * weight.itemsize
        dtype = next(key for key, value in _DTYPES.items() if value == weight.dtype)
        header[name] = {
            "dtype": dtype, "shape": list(weight.shape), "data_offsets": [start, stop],
        }  # fmt: skip
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + stop)
    return path


class _FusedAttention(TorchFunctionMode):
    """Function mode that gives attention on the device the fused kernel of a real one.

    torch selects kernels by the properties of a GPU, and without one computes all scores.
    """

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args and args[0].device.type == "cuda":
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    kinds = {(x.dtype, x.device) for x in (query, key, value)}
    if len(kinds) != 1:
        raise RuntimeError(
            f"Expected query, key, and value to have the same dtype and device, got {kinds}"
        )
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise RuntimeError(f"attention of {query.shape} to {key.shape} and {value.shape}")
    if query.ndim != 4 or value.shape[-1] != query.shape[-1]:
        raise NotImplementedError("no fused kernel takes this attention")
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if is_half and attn_mask is None and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if attn_mask is not None:
        if attn_mask.device != query.device or attn_mask.dtype not in (torch.bool, query.dtype):
            raise RuntimeError(
                f"attention in {query.dtype} on {query.device} with a mask in {attn_mask.dtype} on "
                f"{attn_mask.device}"
            )
        bias = (
            torch.zeros_like(attn_mask, dtype=query.dtype)
            if attn_mask.dtype == torch.bool
            else attn_mask
        )
        attn_mask = bias.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def _apply(
    module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """Replace the weights of a module; torch's own way would swap them, and fakes forbid that."""
    if recurse:
        for child in module.children():
            child._apply(function)
    with torch.no_grad():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            made = function(weight)
            replaced = weight if made is weight else nn.Parameter(made, weight.requires_grad)
            if weight.grad is not None:
                replaced.grad = function(weight.grad)
            module._parameters[name] = replaced
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return module
