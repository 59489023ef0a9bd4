"""LoRA files merged into the weights of a model.

A LoRA changes a matrix by the product of two narrow ones, ``up @ down``, times its strength and
alpha / rank, where the rank is the pair's own. Files also hold whole changes: ``diff`` of a weight,
``diff_b`` of a bias.

Source: Hu et al., LoRA (2021), section 4.1; the spellings are those of public Wan 2.1 files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from logging import getLogger

from torch import Tensor

from ..errors import CheckpointError, MismatchError
from .weights import PREFIXES

LORA_PREFIXES = (*PREFIXES, "transformer.")
UP_OF_DOWN = {  # both spellings of a pair of matrices
    ".lora_down.weight": ".lora_up.weight",
    ".lora_A.weight": ".lora_B.weight",
}
WHOLE = {".diff": ".weight", ".diff_b": ".bias"}

_log = getLogger(__name__)


def merge_lora(
    weights: dict[str, Tensor],
    lora: Mapping[str, Tensor],
    strength: float,
    *,
    follows_reference: bool = False,
) -> None:
    """Add the changes of a LoRA to weights, one after the other, in place.

    What changes nothing in these weights is left out with a warning: a LoRA for a larger relative
    of the model is common.

    Args:
        weights: of a model, by public name; each changed entry is replaced, in its dtype.
        lora: tensors of a LoRA file.
        strength: factor on every change; 1 is as trained.
        follows_reference: do as InfiniteTalk does, which takes alpha / rank for 1 and passes over
            pairs that are spelt ``lora_A`` and ``lora_B``.

    Raises:
        CheckpointError: half a pair, or nothing that TurboTalk knows as a LoRA.
        MismatchError: a change of another shape than its weight, or none that fits the model.
    """
    num_merged = 0
    unknown = []
    for key, change in _list_changes(lora, follows_reference):
        if key not in weights:
            unknown.append(key)
            continue
        weight = weights[key]
        if change.numel() != weight.numel() or change.shape[0] != weight.shape[0]:
            raise MismatchError(
                f"the LoRA changes {key} by {tuple(change.shape)}, the model has it as "
                f"{tuple(weight.shape)}; use a LoRA made for this model"
            )
        changed = weight.float() + strength * change.to(weight.device).view_as(weight)
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
    lora: Mapping[str, Tensor], follows_reference: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each changed weight with its change, [out, in] or as stored, in float32."""
    is_lora = False
    for key, tensor in lora.items():
        for suffix, target in WHOLE.items():
            if key.endswith(suffix):
                is_lora = True
                yield _name(key, suffix) + target, tensor.float()
        for down, up in UP_OF_DOWN.items():
            if key.endswith(down):
                is_lora = True
                if follows_reference and down == ".lora_A.weight":
                    continue
                module = key.removesuffix(down)
                yield (
                    _name(key, down) + ".weight",
                    _multiply(lora, module, up, tensor, follows_reference),
                )
            if key.endswith(up) and key.removesuffix(up) + down not in lora:
                raise CheckpointError(f"the LoRA has {key} without its other half; get it complete")
    if not is_lora:
        raise CheckpointError(
            "the file holds no changes of weights (lora_down and lora_up, lora_A and lora_B, diff, "
            "diff_b); give a LoRA"
        )


def _multiply(
    lora: Mapping[str, Tensor], module: str, up: str, down_tensor: Tensor, follows_reference: bool
) -> Tensor:
    if module + up not in lora:
        raise CheckpointError(f"the LoRA lacks {module + up}; get it complete")
    rank = down_tensor.shape[0]
    alpha = lora.get(f"{module}.alpha")
    scale = 1.0 if alpha is None or follows_reference else alpha.item() / rank
    return scale * (lora[module + up].float().flatten(1) @ down_tensor.float().flatten(1))


def _name(key: str, suffix: str) -> str:
    name = key.removesuffix(suffix)
    for prefix in LORA_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
