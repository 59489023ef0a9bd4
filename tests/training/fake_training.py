"""Training at full widths on a CUDA device of fake tensors: one step, its memory and its waits."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tests import fake_cuda
from tests.fake_cuda import CUDA, FakeCuda
from training.benchmark.report import Case
from training.benchmark.step import draw_batch, find_width, make_recipe
from training.engine.engine import DTYPES, PlainEngine, Precision, StepReport
from training.methods.method import RoleSpec
from training.models.batch import Batch
from training.recipe import Activations, AverageChoice, Phase, Recipe, WeightSource
from training.train import make_methods, network_kind
from training.trainer.roles import NetworkKind, RoleBuilder
from training.trainer.trainer import Trainer

HEADER = Path(torch.__file__).parent / "include/ATen/detail/AcceleratorHooksInterface.h"
# Without a GPU, a table of torch's CUDA library is changed, which is known for Linux alone.
CAN_RUN = torch.cuda.is_available() or (
    sys.platform == "linux" and torch.version.cuda is not None and HEADER.is_file()
)

needs_cuda_build = pytest.mark.skipif(
    not CAN_RUN,
    reason="without a GPU, only torch with CUDA on Linux can differentiate on a fake CUDA device",
)


class TrainingCuda(FakeCuda):
    """Fake CUDA device on which backward passes run, and pinned memory exists.

    A copy from pinned memory that the program does not wait for is no synchronisation.

    Attributes:
        widest_float64: values of the largest float64 tensor that was made on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.widest_float64 = 0
        self._pinned: dict[int, Tensor] = {}
        self._patches = ExitStack()

    def __enter__(self) -> TrainingCuda:
        super().__enter__()
        self._patches.enter_context(patch.object(Tensor, "pin_memory", lambda t: self._pin(t)))
        # Not by the function mode of ``FakeCuda`` alone: it is off during a backward pass, which
        # recomputes blocks.
        self._patches.enter_context(patch.object(F, "scaled_dot_product_attention", _attend))
        if not torch.cuda.is_available():
            self._patches.enter_context(_contexts())
            common = torch.cuda.amp.common  # autocast turns itself off without a GPU
            absent = patch.object(common, "amp_definitely_not_available", lambda: False)
            self._patches.enter_context(absent)
            self._patches.enter_context(patch.object(torch.cuda, "is_bf16_supported", lambda: True))
        return self

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(made, FakeTensor) and made.dtype == torch.float64:
            self.widest_float64 = max(self.widest_float64, made.numel())
        return made

    def _pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self._pinned[pinned.untyped_storage()._cdata] = pinned  # keeps it, and so its address
        return pinned

    def _note_wait(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        source = args[0] if func is torch.ops.aten._to_copy.default else None
        if (
            source is not None
            and kwargs.get("non_blocking")
            and source.untyped_storage()._cdata in self._pinned
        ):
            return
        super()._note_wait(func, args, kwargs)


_ATTEND = F.scaled_dot_product_attention


def _attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if query.device.type != "cuda":
        return _ATTEND(query, *args, **kwargs)
    tensors: tuple[Any, ...] = (query, *args)
    if torch.is_autocast_enabled("cuda"):
        tensors = tuple(tensor.to(torch.get_autocast_dtype("cuda")) for tensor in tensors)
    return fake_cuda._attend(*tensors, **kwargs)


@contextmanager
def _contexts() -> Iterator[None]:
    """State to torch's backward pass that the device has a context, although there is no GPU.

    Autograd requests the stream of every device on which it differentiates, if the device has a
    context; without a GPU, the check itself fails. It is a virtual function of torch's hooks for
    CUDA. Its place in their table follows from the header that torch ships.
    """
    before, _, _ = HEADER.read_text().partition("hasPrimaryContext(")
    index = len(re.findall(r"^\s*virtual\b", before, re.MULTILINE))  # the destructor has two places
    get_hooks = ctypes.CDLL("libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    table_at = ctypes.c_void_p.from_address(get_hooks())
    original = table_at.value
    assert original is not None
    # Two entries stand before the first function, where the table's address points to.
    entries = ctypes.c_void_p * 64
    table = entries(*entries.from_address(original - 2 * ctypes.sizeof(ctypes.c_void_p)))
    has_context = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda *_: True)
    table[2 + index] = ctypes.cast(has_context, ctypes.c_void_p).value
    table_at.value = ctypes.addressof(table) + 2 * ctypes.sizeof(ctypes.c_void_p)
    try:
        yield
    finally:
        table_at.value = original


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One measured step.

    Attributes:
        waits: number of synchronisations by place.
        held: bytes that exist before the step, and after it.
        peaks: most bytes that exist, by role: up to its optimiser step, and (``ROLE step``) in it.
        terms: its log.
    """

    waits: Counter[str]
    held: int
    peaks: dict[str, int]
    terms: dict[str, float]


def make_case(
    method: str,
    settings: Mapping[str, Any] | None = None,
    *,
    num_layers: int = 2,
    precision: Precision = "bfloat16",
    activations: Activations = "recompute",
    optimizer: Literal["adamw", "muon"] = "adamw",
    clip: Mapping[str, int] | None = None,
) -> Recipe:
    """Make a recipe of one phase at 14B widths, 81 frames of 832x480, on one device.

    Args:
        method: name of the method.
        settings: its settings.
        num_layers: transformer blocks.
        precision: precision of the engine.
        activations: activations kept for the backward pass.
        optimizer: optimiser of the engine.
        clip: fields of the clip that differ.
    """
    width = find_width("14b")
    source = replace(width.source, video={**width.source.video, "num_layers": num_layers})
    width = replace(width, source=source, clip=replace(width.clip, **(clip or {})))
    case = Case(method="dmd", engine="plain", precision=precision, num_ranks=1)
    recipe = make_recipe(case, width, 1, activations)
    engine = replace(recipe.engine, optimizer=optimizer)
    phase = Phase(method=method, steps=10, settings=settings or {})
    average = AverageChoice(roles=("student", "teacher"), start=0)
    return replace(recipe, engine=engine, average=average, phases={"only": phase})


class Run:
    """Trainer of a recipe on the fake device.

    Args:
        cuda: the device, entered.
        recipe: recipe of one phase.
        change: fields of the batch that differ.
    """

    def __init__(self, cuda: TrainingCuda, recipe: Recipe, **change: Any) -> None:
        methods = make_methods(recipe)
        kind = _make_kind(cuda, recipe)
        batch = replace(draw_batch(recipe, recipe.batch.size), **change)
        self.cuda = cuda
        self.trainer = Trainer(
            recipe,
            Path("nowhere"),
            methods=methods,
            builder=RoleBuilder(recipe, methods, Path("nowhere"), kind),
            batches=[_Repeated(batch)],
            make_engine=partial(PlainEngine, device=CUDA),
            device=CUDA,
        )
        self.trainer._begin(0)
        self.trainer._streams = self.trainer._open_streams()

    def step(self, number: int) -> Step:
        """Make one step and measure it."""
        gc.collect()
        held = self.cuda.live
        self.cuda.syncs.clear()
        self.cuda.reset_peak()
        peaks: dict[str, int] = {}
        with ExitStack() as patches:
            for role, engine in self.trainer.engines.items():
                step = partial(self._step, peaks, role, engine.step)
                patches.enter_context(patch.object(engine, "step", step))
            terms = self.trainer.advance(number)
        return Step(waits=self.cuda.places(), held=held, peaks=peaks, terms=terms)

    def _step(
        self, peaks: dict[str, int], role: str, step: Callable[[float], StepReport], factor: float
    ) -> StepReport:
        peaks[role] = self.cuda.peak
        self.cuda.reset_peak()
        report = step(factor)
        peaks[f"{role} step"] = self.cuda.peak
        self.cuda.reset_peak()
        return report

    def fill_states(self) -> None:
        """Make the states that optimisers create in their first step."""
        for engine in self.trainer.engines.values():
            for weight in engine.module.parameters():
                if weight.requires_grad:
                    weight.grad = torch.zeros_like(weight)
            if any(weight.grad is not None for weight in engine.module.parameters()):
                engine.step(1.0)


class _Repeated:
    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def stream(
        self, seed: int, first_step: int, *, rank: int, world_size: int, size: int
    ) -> Iterator[Batch]:
        while True:
            yield self._batch


def _make_kind(cuda: FakeCuda, recipe: Recipe) -> NetworkKind:
    """Make networks with fake weights in the CPU's memory, as if they had been read from files."""
    kind = network_kind(recipe)

    def load(source: WeightSource) -> nn.Module:
        network = kind.sketch(source)
        for part in network.modules():
            for name, weight in list(part.named_parameters(recurse=False)):
                with cuda.weights(dtype=DTYPES[recipe.engine.precision]):
                    setattr(part, name, nn.Parameter(torch.empty(weight.shape)))
        return network

    def prepare(spec: RoleSpec, network: nn.Module) -> nn.Module:
        with cuda.weights():
            return kind.prepare(spec, network)

    return replace(kind, load=load, prepare=prepare)
