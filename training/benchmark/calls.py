"""Network calls of a training step: recorded while it runs, and repeated alone.

Comparing a step with the same bare calls of the same networks (no engine, loss, random draws,
optimiser, average or log) shows the cost of everything else. The module is separate from the
training loop because recording needs hooks on the networks.
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

from training.engine.engine import Precision, autocast
from training.models.batch import Batch
from training.models.lora import adapters_off, list_adapters
from training.models.networks import Discriminator, TalkingModel

Kind = Literal["forward", "weights", "inputs"]
SIGMA = 0.5  # noise level of bare calls; it does not change their cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of one network.

    Attributes:
        role: role of the network.
        part: name of the called submodule: empty for the whole network, ``backbone`` for the
            backbone of a discriminator.
        kind: ``forward`` for a forward pass alone, ``weights`` for one with a backward pass to the
            trained weights, ``inputs`` for one with a backward pass to the latents alone.
        named: keyword arguments, besides latents, noise level and batch.
        has_adapters: whether the LoRA layers are on; True for a network without any.
    """

    role: str
    part: str
    kind: Kind
    named: Mapping[str, Any]
    has_adapters: bool

    @property
    def name(self) -> str:
        """Role and part, for display."""
        return f"{self.role}.{self.part}" if self.part else self.role


def count_calls(calls: Iterable[Call]) -> dict[str, dict[str, int]]:
    """Count calls by network and kind.

    Args:
        calls: calls of one step or several.

    Returns:
        Numbers by kind, by ``role`` or ``role.part``.
    """
    counted: dict[str, Counter[str]] = {}
    for call in calls:
        counted.setdefault(call.name, Counter())[call.kind] += 1
    return {name: dict(counts) for name, counts in sorted(counted.items())}


@contextmanager
def record_calls(networks: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    """Record every call of some networks while the context is open.

    A call inside another one, such as a discriminator's call of its backbone, counts as part of the
    outer call. The kind of a call becomes ``weights`` or ``inputs`` only when a gradient reaches
    its output, so the list is complete when the context is left.

    Args:
        networks: networks by role.

    Yields:
        The calls in order; filled when the context is left.
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
    """Hooks and their records; the kind of a call is final once a gradient reached its output."""

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
    """Networks on which the calls of a step are repeated alone.

    Args:
        networks: networks by role, on their device; the weights to train require gradients. Nothing
            else may use them.
        batch: latents and conditions for the calls.
        precision: precision of the calls, as in the training loop.
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
        """Repeat the calls of one step, then drop the gradients.

        Args:
            calls: calls from ``record_calls``.
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
