"""Initial networks of all roles in all phases.

A role continues from its weights at the end of the phase before. A role that the phase before did
not have starts from another role of that phase, or from weights named in the recipe.
``phases/NAME/ROLE.safetensors`` in the run's folder contains the final weights of trained roles, so
any process can build any later phase.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.engine.checkpoint import read_weights, write_weights
from training.engine.engine import check_same_network
from training.recipe import Recipe, WeightSource
from turbotalk_core.errors import RecipeError

if TYPE_CHECKING:
    from training.methods.method import Method, RoleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkKind:
    """Constructors of a recipe's networks; tests substitute smaller networks.

    Attributes:
        load: loads or randomly initialises the weights that a recipe names.
        sketch: builds the same network on the meta device, from its sizes alone.
        prepare: turns the initial network into the network of a role; see ``methods.method``.
    """

    load: Callable[[WeightSource], nn.Module]
    sketch: Callable[[WeightSource], nn.Module]
    prepare: Callable[[RoleSpec, Any], nn.Module]


class RoleBuilder:
    """Builder of the networks of all phases.

    Args:
        recipe: recipe with weights and phases.
        methods: method of each phase.
        folder: folder of the run.
        kind: constructors of the networks.
    """

    def __init__(
        self, recipe: Recipe, methods: Sequence[Method], folder: Path, kind: NetworkKind
    ) -> None:
        self.recipe = recipe
        self.specs = [method.roles() for method in methods]
        self.folder = folder
        self.kind = kind

    def build(self, phase: int, role: str) -> nn.Module:
        """Build the network that a role starts a phase with.

        Args:
            phase: number of the phase, from 0.
            role: role of the phase's method.

        Returns:
            The network; the parameters to train require gradients.

        Raises:
            RecipeError: if the role's start is neither a role of the phase before nor named in the
                recipe.
            CheckpointError: if an earlier phase has not ended, or weights are damaged.
        """
        earlier, source = self._find_beginning(phase, role)
        begin = self.kind.load(source) if source else self._take_up(phase - 1, earlier)
        name = f"{self.recipe.seed}/{phase}/{role}"
        digest = hashlib.sha256(name.encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            return self.kind.prepare(self.specs[phase][role], begin)

    def sketch(self, phase: int, role: str) -> nn.Module:
        """Build the same network as ``build``, without weights, on the meta device.

        Args:
            phase: number of the phase, from 0.
            role: role of the phase's method.

        Returns:
            The network.

        Raises:
            RecipeError: if the role's start is neither a role of the phase before nor named in the
                recipe.
        """
        earlier, source = self._find_beginning(phase, role)
        begin = self.kind.sketch(source) if source else self.sketch(phase - 1, earlier)
        with torch.device("meta"):
            return self.kind.prepare(self.specs[phase][role], begin)

    def end(self, phase: int, role: str, weights: dict[str, Tensor]) -> None:
        """Save the weights of a trained role at the end of a phase.

        Args:
            phase: number of the phase, from 0.
            role: role of the phase's method.
            weights: tensors by name; the running average for a role that has one.
        """
        write_weights(self._path(phase, role), weights, {"phase": phase, "role": role})

    def load_end(self, phase: int, role: str) -> nn.Module:
        """Build the network that a role ended a phase with.

        Args:
            phase: number of the phase, from 0.
            role: role of the phase's method.

        Returns:
            The network, in float32.

        Raises:
            CheckpointError: if the phase has not ended, or the file is damaged.
        """
        return self._take_up(phase, role)

    def _take_up(self, phase: int, role: str) -> nn.Module:
        if self.specs[phase][role].learning.trains == "frozen":
            return self.build(phase, role)
        path = self._path(phase, role)
        weights, network = read_weights(path), self.sketch(phase, role)
        check_same_network(network.state_dict(), weights, path)
        network.load_state_dict(weights, assign=True)
        return network

    def _find_beginning(self, phase: int, role: str) -> tuple[str, WeightSource | None]:
        begins_with = self.specs[phase][role].begins_with
        before = self.specs[phase - 1] if phase else {}
        if role in before:
            return role, None
        if begins_with in before:
            return begins_with, None
        if begins_with in self.recipe.weights:
            return begins_with, self.recipe.weights[begins_with]
        known = [*before, *self.recipe.weights]
        raise RecipeError(
            f"{role} of phase {list(self.recipe.phases)[phase]} begins with {begins_with!r}, which "
            "is neither a role of the phase before nor named under weights in the recipe; there "
            f"{'is' if len(known) < 2 else 'are'} {', '.join(known) or 'nothing'}"
        )

    def _path(self, phase: int, role: str) -> Path:
        return self.folder / "phases" / list(self.recipe.phases)[phase] / f"{role}.safetensors"
