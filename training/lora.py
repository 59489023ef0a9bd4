"""LoRA: training a network by narrow additions to its matrices.

A chosen linear layer gets two narrow matrices beside its weight, and keeps the names of its own
parameters, so that nothing else has to know. Reading LoRA files is the core's business
(``turbotalk_core.checkpoints.lora``); what is written here, it reads.

Source: Hu et al., LoRA (2106.09685), section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbotalk_core.errors import MismatchError

TARGETS = ("*blocks.*", "*projection.proj*")
"""Every linear layer inside the transformer's blocks, and those of the audio adapter."""

_DIT = "dit."  # what a TalkingModel calls its transformer
_PROJECTION, _PUBLIC_PROJECTION = "projection.", "audio_proj."


class LoraLinear(nn.Linear):
    """A linear layer with a trainable addition of low rank to a frozen weight.

    Args:
        linear: gives weight and bias, which stay the same parameters.
        rank: of the addition.
        alpha: the addition counts alpha / rank.

    Attributes:
        is_on: whether the addition counts.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha, self.is_on = rank, alpha, True
        self.lora_down = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        output = F.linear(input, self.weight, self.bias)
        if self.is_on:
            # Scaled where it is narrow: a fraction of the values, and nothing wide is kept for it.
            narrow = (self.alpha / self.rank) * F.linear(input, self.lora_down)
            output = output + F.linear(narrow, self.lora_up)
        return output

    def change(self) -> Tensor:
        """Give what the addition amounts to, the shape of the weight, float32."""
        return (self.alpha / self.rank) * (self.lora_up.float() @ self.lora_down.float())


def add_adapters(
    module: nn.Module, rank: int, alpha: float, targets: Sequence[str] = TARGETS
) -> None:
    """Freeze a network and put LoRA layers into it; at first they change nothing.

    Args:
        module: changed in place; the narrow matrices are drawn from torch's global generator.
        rank: of each addition, at least 1.
        alpha: additions count alpha / rank.
        targets: patterns of the layers' names, ``*`` for anything.

    Raises:
        MismatchError: no linear layer has such a name.
    """
    module.requires_grad_(False)
    chosen = [
        (name, layer)
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and any(fnmatch(name, target) for target in targets)
    ]
    if not chosen:
        raise MismatchError(
            f"no linear layer has a name like {', '.join(targets)}; "
            f"those of this network begin with {next(iter(dict(module.named_parameters())), None)}"
        )
    for name, layer in chosen:
        _replace(module, name, LoraLinear(layer, rank, alpha))


def list_adapters(module: nn.Module) -> list[tuple[str, LoraLinear]]:
    """List the LoRA layers of a network with their names."""
    return [(n, layer) for n, layer in module.named_modules() if isinstance(layer, LoraLinear)]


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Make a network what it was before it got LoRA layers, for a while.

    Not around the forward of a graph whose backward comes later: a block that is recomputed in
    the backward would be another one.

    Args:
        module: with LoRA layers or without.

    Yields:
        Nothing.
    """
    layers = [layer for _, layer in list_adapters(module)]
    before = [layer.is_on for layer in layers]
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer, is_on in zip(layers, before, strict=True):
            layer.is_on = is_on


@torch.no_grad()
def merge_adapters(module: nn.Module) -> None:
    """Add the LoRA layers of a network to its weights, and make them ordinary layers again.

    Args:
        module: changed in place; weights that were frozen stay frozen.
    """
    for name, layer in list_adapters(module):
        weight = layer.weight
        weight.copy_((weight.float() + layer.change()).to(weight.dtype))
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        linear.weight, linear.bias = weight, layer.bias
        _replace(module, name, linear)


def export_adapters(module: nn.Module) -> dict[str, Tensor]:
    """Give the LoRA layers of a ``TalkingModel`` as the tensors of a LoRA file.

    Args:
        module: with LoRA layers.

    Returns:
        ``lora_down``, ``lora_up`` and ``alpha`` of each layer, by its public name.
    """
    tensors = {}
    for name, layer in list_adapters(module):
        public = name.removeprefix(_DIT)
        if name.startswith(_PROJECTION):
            public = _PUBLIC_PROJECTION + name.removeprefix(_PROJECTION)
        tensors[f"{public}.lora_down.weight"] = layer.lora_down.detach()
        tensors[f"{public}.lora_up.weight"] = layer.lora_up.detach()
        tensors[f"{public}.alpha"] = torch.tensor(float(layer.alpha))
    return tensors


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)
