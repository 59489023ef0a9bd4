"""LoRA: training a network by low-rank additions to its weight matrices.

A chosen linear layer gets two narrow matrices beside its weight and keeps the names of its own
parameters, so no other code has to change. ``turbotalk_core.checkpoints.lora`` reads LoRA files; it
also reads those written here.

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

_DIT = "dit."  # name of the transformer in a TalkingModel
_PROJECTION, _PUBLIC_PROJECTION = "projection.", "audio_proj."


class LoraLinear(nn.Linear):
    """Linear layer with a frozen weight W and a trainable addition: W + (alpha / rank) B A.

    The factor alpha / rank keeps the size of the addition about the same when the rank changes, so
    a learning rate can be kept too. B starts at zero, and the layer therefore starts unchanged.

    Args:
        linear: layer whose weight and bias are used; they stay the same parameters.
        rank: rank of the addition.
        alpha: scale of the addition, before the division by the rank.

    Attributes:
        is_on: whether the addition is used.
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
            # Scaled at its narrow point: fewer products, and no wide tensor is kept for backward.
            narrow = (self.alpha / self.rank) * F.linear(input, self.lora_down)
            output = output + F.linear(narrow, self.lora_up)
        return output

    def change(self) -> Tensor:
        """Compute the addition to the weight, (alpha / rank) B A, in float32."""
        return (self.alpha / self.rank) * (self.lora_up.float() @ self.lora_down.float())


def add_adapters(
    module: nn.Module, rank: int, alpha: float, targets: Sequence[str] = TARGETS
) -> None:
    """Freeze a network and put LoRA layers into it; its output does not change at first.

    Args:
        module: network, changed in place. Matrix A of each layer is drawn from torch's global
            generator, matrix B is zero.
        rank: rank of each addition, at least 1.
        alpha: scale of the additions; they are multiplied by alpha / rank.
        targets: patterns of layer names, ``*`` for anything.

    Raises:
        MismatchError: if no linear layer has a matching name.
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
    """List the LoRA layers of a network, each with its name."""
    return [(n, layer) for n, layer in module.named_modules() if isinstance(layer, LoraLinear)]


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Switch the LoRA layers of a network off while the context is open.

    Do not use it around a forward pass whose backward pass comes later: with activation
    checkpointing, the backward pass would recompute the blocks with the LoRA layers on.

    Args:
        module: network with LoRA layers or without.

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
    """Add the LoRA layers of a network to its weights, and replace them with plain linear layers.

    Args:
        module: network, changed in place; frozen weights stay frozen.
    """
    for name, layer in list_adapters(module):
        weight = layer.weight
        weight.copy_((weight.float() + layer.change()).to(weight.dtype))
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        linear.weight, linear.bias = weight, layer.bias
        _replace(module, name, linear)


def export_adapters(module: nn.Module) -> dict[str, Tensor]:
    """Return the LoRA layers of a ``TalkingModel`` as the tensors of a LoRA file.

    Args:
        module: network with LoRA layers.

    Returns:
        ``lora_down`` (A, [rank, in]), ``lora_up`` (B, [out, rank]) and ``alpha`` (a scalar) of each
        layer, by the layer's public name.
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
