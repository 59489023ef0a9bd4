"""Checkpoints of a run: each is complete or absent.

A run's folder contains ``checkpoints/00000100`` and so on, each with ``state.json`` and one folder
per role, written by its engine. ``COMPLETE`` is written last and lists every file with its size. A
folder without it, or with a file that differs from the list, does not count as a checkpoint and is
removed at the next start.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.engine import distributed as ranks
from training.engine.engine import Engine
from turbotalk_core.errors import CheckpointError, OutputError
from turbotalk_core.safe_io.atomic import make_folder, reports_disk_errors, whole_file, write_text

COMPLETE, STATE = "COMPLETE", "state.json"
# In messages of torch's writer of files, which are of no type of their own.
_TORCH_WRITER = ("inline_container", "iostream", "PytorchStreamWriter")
NAMES = 8 * "[0-9]"  # other files in the folder are left alone


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Position of a run, without the state of its engines.

    Attributes:
        step: number of steps made, over all phases.
        phase: number of the phase, from 0.
        phase_step: number of steps made in this phase.
        recipe: fingerprint of the recipe.
        streaks: state of the divergence check.
        watch: state of the phase's logit gap, see ``trainer.gap``.
        settings: settings that may change when the run resumes, as they were.
        files: digests of the prepared set and of the initial weights.
    """

    step: int
    phase: int
    phase_step: int
    recipe: str
    streaks: dict[str, int] = field(default_factory=dict)
    watch: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


class Checkpoints:
    """Checkpoints of one run.

    Args:
        folder: folder of the checkpoints; created if it does not exist.
        keep: number of newest checkpoints to keep, at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: RunState, engines: Mapping[str, Engine]) -> Path:
        """Write a checkpoint, then remove the oldest ones beyond ``keep``; all ranks must call it.

        Args:
            state: position of the run.
            engines: engines by role.

        Returns:
            Folder of the checkpoint.

        Raises:
            OutputError: if it cannot be written; what was written of it is removed, and the earlier
                checkpoints stay.
        """
        path = self.folder / f"{state.step:08d}"
        try:
            with _reports_disk_errors(path):
                self._write(path, state, engines)
        except OutputError:
            # It would be passed over, and fill the disk until the next start.
            with suppress(OSError):
                remove(path)
            raise
        if ranks.rank() == 0:
            for old in self.list_complete()[: -self.keep]:
                with _reports_disk_errors(old):
                    remove(old)
        ranks.barrier()
        return path

    @staticmethod
    def _write(path: Path, state: RunState, engines: Mapping[str, Engine]) -> None:
        if ranks.rank() == 0:
            remove(path)
            path.mkdir(parents=True)
        ranks.barrier()
        for role, engine in engines.items():
            engine.save(path / role)
        ranks.barrier()
        if ranks.rank() == 0:
            (path / STATE).write_text(json.dumps(asdict(state)))
            mark_complete(path)

    def find_newest(self) -> tuple[RunState, Path] | None:
        """Find the newest checkpoint, and remove incomplete ones; all ranks must call it.

        Returns:
            State and folder of the newest complete checkpoint, or None if there is none.

        Raises:
            CheckpointError: if its state is damaged.
            OutputError: if a file cannot be read, or an incomplete checkpoint not removed.
        """
        if ranks.rank() == 0 and self.folder.is_dir():
            whole = set(self.list_complete())
            for path in self.folder.glob(NAMES):
                if path not in whole:
                    with _reports_disk_errors(path):
                        remove(path)
        ranks.barrier()
        whole = self.list_complete()
        if not whole:
            return None
        return _read_state(whole[-1]), whole[-1]

    def list_complete(self) -> list[Path]:
        """List the folders of complete checkpoints, oldest first."""
        return [path for path in sorted(self.folder.glob(NAMES)) if is_complete(path)]


def _read_state(folder: Path) -> RunState:
    try:
        state = RunState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        if not all(isinstance(n, int) for n in (state.step, state.phase, state.phase_step)):
            raise TypeError("a number is none")
        return replace(state, streaks=dict(state.streaks))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {folder / STATE} ({type(error).__name__}); delete {folder}, and the run "
            "goes on from the checkpoint before it"
        ) from error


@contextmanager
def _reports_disk_errors(path: Path) -> Iterator[None]:
    """Raise what torch, safetensors and the system raise for a full disk as an ``OutputError``."""
    try:
        with reports_disk_errors(path, SafetensorError):
            yield
    except RuntimeError as error:
        if not any(name in str(error) for name in _TORCH_WRITER):
            raise
        raise OutputError(
            f"cannot write {path}: the disk is full or damaged; free some space, and the same "
            "command goes on from the checkpoint before it"
        ) from error


def is_complete(folder: Path) -> bool:
    """Return whether each file listed in ``COMPLETE`` exists with its listed size."""
    marker = folder / COMPLETE
    if not marker.is_file():
        return False
    try:
        sizes = dict(json.loads(marker.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in sizes.items()
    )


def mark_complete(folder: Path) -> None:
    """Write ``COMPLETE``, which makes a folder a checkpoint, atomically."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:  # some file systems report a full disk only now
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_text(folder / COMPLETE, json.dumps(sizes))


def remove(folder: Path) -> None:
    """Remove a folder; ``COMPLETE`` goes first, so an interruption leaves no false checkpoint."""
    (folder / COMPLETE).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def write_weights(path: Path, weights: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write the weights of a role at the end of a phase, atomically.

    Args:
        path: safetensors file to write.
        weights: tensors by name, on the CPU.
        note: values for the metadata.

    Raises:
        OutputError: if the file cannot be written.
    """
    make_folder(path.parent)
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    with whole_file(path) as part, reports_disk_errors(path, SafetensorError):
        save_file(contiguous, part, {"turbotalk": json.dumps(dict(note))})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights that ``write_weights`` wrote.

    Args:
        path: safetensors file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path} ({error}); a phase begins where an earlier one ended, so let that "
            "one end first"
        ) from error
