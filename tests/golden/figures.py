"""Figures of the reference: files of tensors, what they are about, and how near is near enough."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

TOLERANCE = 1e-4  # of the largest expected value
OWN_DATA = Path(__file__).parent / "data"
MODULES = Path(__file__).parent.glob("test_*.py")
KINDS = sorted({path.stem.removeprefix("test_") for path in MODULES} - {"folder"})


def find_kind(path: Path) -> str | None:
    """Tell which test module checks a file, if any does."""
    kinds = [kind for kind in KINDS if path.stem == kind or path.stem.startswith(f"{kind}_")]
    return max(kinds, key=len, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """One file of figures.

    Attributes:
        path: of the file.
        tensors: all of them, by name.
        settings: the metadata, decoded where it is JSON.
        checked: names of the tensors that were expected.
    """

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    checked: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Give the tensors whose names begin with a prefix, without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def expect(self, name: str, result: Tensor) -> None:
        """Compare a result with one of the figures."""
        self.checked.add(name)
        expected = self.tensors[name].float()
        assert tuple(result.shape) == tuple(expected.shape), name
        error = (result.float() - expected).abs().max().item()
        assert error <= TOLERANCE * expected.abs().max().item(), f"{name} is off by {error:.2e}"

    def expect_known(self, results: dict[str, Tensor]) -> None:
        """Compare those of several results for which the file has a figure."""
        for name, result in results.items():
            if name in self:
                self.expect(name, result)


def read_golden(path: Path) -> Golden:
    """Read one file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Golden(
        path=path, tensors=tensors, settings={key: _decode(text) for key, text in metadata.items()}
    )


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # a note for people


def recipe(name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw a weight as the makers of the figures drew theirs, where a file stores none."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    drawn = torch.randn(shape, generator=generator)
    if name.endswith("modulation"):
        return 0.1 * drawn
    if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
        return 1 + 0.1 * drawn
    return 0.1 * drawn if len(shape) == 1 else drawn / math.sqrt(math.prod(shape[1:]))
