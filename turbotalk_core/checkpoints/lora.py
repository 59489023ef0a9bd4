"""Merging of LoRA files into the weights of a model.

A LoRA adds to a matrix the product of two low-rank ones, ``up @ down``, times its strength and
alpha / rank, where the rank is that of the pair. Files may also contain full-size changes: ``diff``
of a weight, ``diff_b`` of a bias.

Source: Hu et al., LoRA (2021), section 4.1; the names are those of public Wan 2.1 files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from logging import getLogger

from torch import Tensor

from ..errors import CheckpointError, MismatchError
from .tensors import PREFIXES

LORA_PREFIXES = (*PREFIXES, "transformer.")
UP_OF_DOWN = {  # both conventions for the names of a pair of matrices
    ".lora_down.weight": ".lora_up.weight",
    ".lora_A.weight": ".lora_B.weight",
}
WHOLE = {".diff": ".weight", ".diff_b": ".bias"}

_log = getLogger(__name__)


def merge_lora(
    weights: dict[str, Tensor],
    lora: Mapping[str, Tensor],
    strength: float,
) -> None:
    """Add the changes of a LoRA to weights, one after the other, in place.

    Changes of weights that the model does not have are skipped with a warning: LoRAs made for a
    model with more layers or modules are common.

    Args:
        weights: weights of a model by public name; each changed entry is replaced, in its dtype.
        lora: tensors of a LoRA file.
        strength: factor on every change; 1 is as trained.

    Raises:
        CheckpointError: if a pair is incomplete, or the tensors are no known kind of LoRA.
        MismatchError: if a change differs in shape from its weight, or none is for this model.
    """
    num_merged = 0
    unknown = []
    for key, shape, make_change in _list_changes(lora):
        if key not in weights:
            unknown.append(key)
            continue
        weight = weights[key]
        # Checked before the product: two low-rank matrices can have one larger than the memory.
        if math.prod(shape) != weight.numel() or shape[:1] != weight.shape[:1]:
            raise MismatchError(
                f"the LoRA changes {key} by {shape}, the model has it as "
                f"{tuple(weight.shape)}; use a LoRA made for this model"
            )
        changed = weight.float() + strength * make_change().to(weight.device).view_as(weight)
        weights[key] = changed.to(weight.dtype)
        num_merged += 1
    if unknown and not num_merged:
        raise MismatchError(
            f"none of the {len(unknown)} weights that the LoRA changes is in the model (first: "
            f"{unknown[0]}); use a LoRA made for this model"
        )
    if unknown:
        _log.warning(
            "%d of the %d weights that the LoRA changes are not in the model (first: %s)",
            len(unknown),
            len(unknown) + num_merged,
            unknown[0],
        )


def _list_changes(
    lora: Mapping[str, Tensor],
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """Yield each changed weight's name, the change's shape, and a function that computes it."""
    is_lora = False
    for key, tensor in lora.items():
        for suffix, target in WHOLE.items():
            if key.endswith(suffix):
                is_lora = True
                yield _name(key, suffix) + target, tuple(tensor.shape), tensor.float
        for down, up in UP_OF_DOWN.items():
            if key.endswith(down):
                is_lora = True
                module = key.removesuffix(down)
                pair = _pair_up(lora, module, up, tensor)
                scale = _scale(lora, module, tensor.shape[0])
                yield (
                    _name(key, down) + ".weight",
                    (pair[0].shape[0], pair[1].shape[1]),
                    partial(_multiply, *pair, scale),
                )
            if key.endswith(up) and key.removesuffix(up) + down not in lora:
                raise CheckpointError(f"the LoRA has {key} without its other half; get it complete")
    if not is_lora:
        raise CheckpointError(
            "the file holds no changes of weights (lora_down and lora_up, lora_A and lora_B, diff, "
            "diff_b); give a LoRA"
        )


def _pair_up(
    lora: Mapping[str, Tensor], module: str, up: str, down_tensor: Tensor
) -> tuple[Tensor, Tensor]:
    """Return up [out, rank] and down [rank, in] of a module."""
    if module + up not in lora:
        raise CheckpointError(f"the LoRA lacks {module + up}; get it complete")
    up_tensor = lora[module + up]
    shapes = tuple(up_tensor.shape), tuple(down_tensor.shape)
    if min(map(len, shapes)) < 2 or math.prod(shapes[0][1:]) != shapes[1][0]:
        raise CheckpointError(
            f"the LoRA's pair for {module} has the shapes {shapes[0]} and {shapes[1]}, which do "
            "not multiply; get it complete"
        )
    return up_tensor.flatten(1), down_tensor.flatten(1)


def _scale(lora: Mapping[str, Tensor], module: str, rank: int) -> float:
    alpha = lora.get(f"{module}.alpha")
    if alpha is None:
        return 1.0
    if alpha.numel() != 1:
        raise CheckpointError(
            f"the LoRA has {module}.alpha of shape {tuple(alpha.shape)}; it must be one number"
        )
    return alpha.item() / rank


def _multiply(up_ON: Tensor, down_NI: Tensor, scale: float) -> Tensor:
    return scale * (up_ON.float() @ down_NI.float())


def _name(key: str, suffix: str) -> str:
    name = key.removesuffix(suffix)
    for prefix in LORA_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
