"""Digests of what a run is made of and no checkpoint contains: prepared sets and initial weights.

A file of 30 GB is not read as a whole at each start: size, beginning, end and evenly spaced blocks
are enough to distinguish two trainings of one network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.recipe import Recipe

BLOCK, NUM_BLOCKS = 2**16, 256


def digest_run(recipe: Recipe, batches: Sequence[Any]) -> dict[str, str]:
    """Compute the digests of a run's data and initial weights.

    Args:
        recipe: recipe with the weights and phases.
        batches: samples of each phase; those with a ``digest`` count.

    Returns:
        Digests by the name to use in messages.
    """
    digests = {}
    for phase, source in zip(recipe.phases, batches, strict=True):
        if (digest := getattr(source, "digest", None)) is not None:
            digests[f"the data of phase {phase}"] = str(digest)
    for name, source in recipe.weights.items():
        for part in ("dit", "adapter"):
            path: Path | None = getattr(source, part)
            if path is not None and path.exists():
                digests[f"weights.{name}.{part}"] = digest_file(path)
    return digests


def digest_file(path: Path) -> str:
    """Compute a digest of a file, or of all files of a folder, from blocks of each.

    Args:
        path: file or folder.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.sha256()
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    for file_path in files:
        size = file_path.stat().st_size
        digest.update(f"{size} ".encode())
        last = max(0, size - BLOCK)
        starts = {last * number // (NUM_BLOCKS - 1) for number in range(NUM_BLOCKS)}
        with file_path.open("rb") as file:
            for start in sorted(starts):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]
