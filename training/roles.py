"""Which network each role of each phase begins with.

A role goes on where it ended in the phase before; one that was not there begins with another role
of that phase, or with weights that the recipe names. ``phases/NAME/ROLE.safetensors`` in the run's
folder holds what trained roles ended with, so any phase can be built by whoever goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.checkpoint import read_weights, write_weights
from training.engine import check_same_network
from training.recipe import Recipe, WeightSource
from turbotalk_core.errors import RecipeError

if TYPE_CHECKING:
    from training.methods.method import Method, RoleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkKind:
    """What the networks of a recipe are; the tests have smaller ones.

    Attributes:
        load: reads or draws the weights that a recipe names.
        sketch: builds the same network on the meta device, from its sizes alone.
        prepare: makes a role's network of what it begins with; see ``methods.method``.
    """

    load: Callable[[WeightSource], nn.Module]
    sketch: Callable[[WeightSource], nn.Module]
    prepare: Callable[[RoleSpec, Any], nn.Module]


class RoleBuilder:
    """Builds the networks of all phases.

    Args:
        recipe: names weights and phases.
        methods: of each phase.
        folder: of the run.
        kind: what the networks are.
    """

    def __init__(
        self, recipe: Recipe, methods: Sequence[Method], folder: Path, kind: NetworkKind
    ) -> None:
        self.recipe = recipe
        self.specs = [method.roles() for method in methods]
        self.folder = folder
        self.kind = kind

    def build(self, phase: int, role: str) -> nn.Module:
        """Build what a role begins a phase with.

        Args:
            phase: number of the phase, from 0.
            role: of its method.

        Returns:
            The network; what is to be trained requires gradients.

        Raises:
            RecipeError: it begins with something that is neither a role nor named in the recipe.
            CheckpointError: an earlier phase has not ended, or weights are damaged.
        """
        earlier, source = self._find_beginning(phase, role)
        begin = self.kind.load(source) if source else self._take_up(phase - 1, earlier)
        name = f"{self.recipe.seed}/{phase}/{role}"
        digest = hashlib.sha256(name.encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            return self.kind.prepare(self.specs[phase][role], begin)

    def sketch(self, phase: int, role: str) -> nn.Module:
        """Build the same network without weights, on the meta device.

        Args:
            phase: number of the phase, from 0.
            role: of its method.

        Returns:
            The network.

        Raises:
            RecipeError: it begins with something that is neither a role nor named in the recipe.
        """
        earlier, source = self._find_beginning(phase, role)
        begin = self.kind.sketch(source) if source else self.sketch(phase - 1, earlier)
        with torch.device("meta"):
            return self.kind.prepare(self.specs[phase][role], begin)

    def end(self, phase: int, role: str, weights: dict[str, Tensor]) -> None:
        """Keep what a trained role ended a phase with.

        Args:
            phase: number of the phase, from 0.
            role: of its method.
            weights: averaged, where the role keeps an average.
        """
        write_weights(self._path(phase, role), weights, {"phase": phase, "role": role})

    def load_end(self, phase: int, role: str) -> nn.Module:
        """Build what a role ended a phase with.

        Args:
            phase: number of the phase, from 0.
            role: of its method.

        Returns:
            The network, in float32.

        Raises:
            CheckpointError: the phase has not ended, or the file is damaged.
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
