"""The network calls of a step: counted while it runs, and made again with nothing around them.

What a step costs beyond its networks is seen by comparing it with the same calls of the same
networks, bare: no engine, no loss, no draws, no optimiser, no average, no log. Separate because
counting needs hooks on real networks, which are no business of the loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from training.batch import Batch
from training.engine import Precision, autocast
from training.lora import adapters_off, list_adapters
from training.networks import Discriminator, TalkingModel

Kind = Literal["forward", "weights", "inputs"]
SIGMA = 0.5  # what bare calls are told; no call costs more or less at another noise level


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of one network.

    Attributes:
        role: whose network.
        part: of it that is called, by its module's name: empty for all of it, ``backbone`` for a
            discriminator's alone.
        kind: a forward pass alone, one with a backward pass to its trained weights, or one with a
            backward pass to its latents alone.
        named: what else than latents, noise level and batch it is given.
        has_adapters: its LoRA layers count; True where there are none.
    """

    role: str
    part: str
    kind: Kind
    named: Mapping[str, Any]
    has_adapters: bool

    @property
    def name(self) -> str:
        """Role and part, for people."""
        return f"{self.role}.{self.part}" if self.part else self.role


def count_calls(calls: Iterable[Call]) -> dict[str, dict[str, int]]:
    """Count calls by network and kind.

    Args:
        calls: of one step or several.

    Returns:
        Numbers by kind, by ``role`` or ``role.part``.
    """
    counted: dict[str, Counter[str]] = {}
    for call in calls:
        counted.setdefault(call.name, Counter())[call.kind] += 1
    return {name: dict(counts) for name, counts in sorted(counted.items())}


@contextmanager
def record_calls(networks: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    """Note every call of some networks, for as long as the context is open.

    A call inside another one, as of a backbone by its discriminator, is part of that one. A call is
    of the kind ``weights`` or ``inputs`` only once a gradient has come back to its output, so the
    list is complete when the context is left.

    Args:
        networks: by role.

    Yields:
        The calls in their order; filled when the context is left.
    """
    recorder, calls, handles = _Recorder(), [], []
    for role, network in networks.items():
        for part, module in _list_parts(network):
            leave = partial(recorder.leave, role, part)
            handles.append(module.register_forward_pre_hook(recorder.enter))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        calls += (Call(**note) for note in recorder.notes)


class _Recorder:
    """What hooks write down; a kind is known only when a gradient comes back."""

    def __init__(self) -> None:
        self.notes: list[dict[str, Any]] = []
        self._depth = 0

    def enter(self, *_: object) -> None:
        self._depth += 1

    def leave(
        self,
        role: str,
        part: str,
        module: nn.Module,
        inputs: tuple[Any, ...],
        named: Mapping[str, Any],
        output: Tensor,
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        note = {
            "role": role,
            "part": part,
            "kind": "forward",
            "named": named,
            "has_adapters": all(layer.is_on for _, layer in list_adapters(module)),
        }
        self.notes.append(note)
        if output.requires_grad:
            trains = any(weight.requires_grad for weight in module.parameters())
            assert not (trains and inputs[0].requires_grad), "a kind of call that is not known"
            kind = "weights" if trains else "inputs"
            output.register_hook(lambda _: note.update(kind=kind))


class BareCalls:
    """Networks on which the calls of a step are made with nothing around them.

    Args:
        networks: by role, on their device; gradients are required of what is trained. They belong
            to this alone.
        batch: gives latents to call them with, and the conditions.
        precision: of the calls, as in the loop.
    """

    def __init__(
        self, networks: Mapping[str, nn.Module], batch: Batch, *, precision: Precision = "float32"
    ) -> None:
        self._parts = {role: dict(_list_parts(network)) for role, network in networks.items()}
        self._trained = {
            role: [weight for weight in network.parameters() if weight.requires_grad]
            for role, network in networks.items()
        }
        self._batch = batch
        self._precision: Precision = precision
        self._sigma_B = torch.full((batch.size,), SIGMA, device=batch.latents_BCFHW.device)
        for role in networks:
            self._learns(role, yes=False)

    def make(self, calls: Sequence[Call]) -> None:
        """Make the calls of one step, then forget the gradients.

        Args:
            calls: of ``record_calls``.
        """
        for call in calls:
            self._make(call)
        for weights in self._trained.values():
            for weight in weights:
                weight.grad = None

    def _make(self, call: Call) -> None:
        module = self._parts[call.role][call.part]
        latents = self._batch.latents_BCFHW
        if call.kind == "inputs":
            latents = latents.detach().requires_grad_()
        self._learns(call.role, yes=call.kind == "weights")
        with (
            nullcontext() if call.has_adapters else adapters_off(module),
            torch.set_grad_enabled(call.kind != "forward"),
            autocast(latents.device, self._precision),
        ):
            output = module(latents, self._sigma_B, self._batch, **call.named)
        if call.kind != "forward":
            output.backward(torch.ones_like(output))
        self._learns(call.role, yes=False)

    def _learns(self, role: str, *, yes: bool) -> None:
        for weight in self._trained[role]:
            weight.requires_grad_(yes)


def _list_parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in network.named_modules():
        if isinstance(module, TalkingModel | Discriminator):
            yield name, module
