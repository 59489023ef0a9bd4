"""Progress of a run: a bar on a terminal, a line each minute elsewhere, and TensorBoard files."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from training.engine import distributed as ranks
from training.trainer.hooks import Hook

if TYPE_CHECKING:
    from training.trainer.trainer import Trainer

logger = logging.getLogger(__name__)

EVERY_SECONDS = 60.0  # between two lines where there is no terminal
GIB = 2**30


class ProgressHook(Hook):
    """Display of losses, remaining time and memory on rank 0."""

    def __init__(self) -> None:
        """Prepare; the display begins with the first phase."""
        self._bar: Any = None
        self._logged_at = -EVERY_SECONDS

    def on_phase_start(self, trainer: Trainer) -> None:
        """Begin the display, and name the phase."""
        if ranks.rank() != 0:
            return
        if self._bar is None:
            total, done = trainer.recipe.num_steps, trainer.state.step
            is_quiet = not sys.stderr.isatty()
            self._bar = tqdm(total=total, initial=done, unit="step", disable=is_quiet)
        self._bar.set_description(_name_phase(trainer))

    def on_step_end(self, trainer: Trainer, terms: Mapping[str, float]) -> None:
        """Show a step."""
        if self._bar is None:
            return
        shown = describe_terms(terms, trainer.device)
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._bar.disable and now - self._logged_at >= EVERY_SECONDS:
            self._logged_at = now
            step, total = trainer.state.step, trainer.recipe.num_steps
            logger.info("%s: step %d of %d, %s", _name_phase(trainer), step, total, shown)

    def on_phase_end(self, trainer: Trainer) -> None:
        """End the display after the last phase."""
        if self._bar is not None and trainer.state.phase == len(trainer.recipe.phases) - 1:
            self._bar.close()


def _name_phase(trainer: Trainer) -> str:
    return list(trainer.recipe.phases)[trainer.state.phase]


def describe_terms(terms: Mapping[str, float], device: torch.device) -> str:
    """Describe a step in a few words: the losses, what was left out, and the peak memory.

    Args:
        terms: terms by ``role/term``.
        device: device whose memory is shown; a CPU's is not.

    Returns:
        Text of one line.
    """
    parts = [
        f"{name.removesuffix('/loss')} {value:.4g}"
        for name, value in terms.items()
        if name.endswith("/loss")
    ]
    parts += [
        f"{name.removesuffix('/skipped')} left out" for name in terms if name.endswith("/skipped")
    ]
    if device.type == "cuda":
        parts.append(f"{torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB")
    return ", ".join(parts)


class TensorBoardHook(Hook):
    """TensorBoard event files of all terms in ``tensorboard`` in the run's folder, on rank 0.

    Without the package ``tensorboard`` it does nothing; the log has the same terms.
    """

    def __init__(self) -> None:
        """Prepare; the file begins with the first phase."""
        self._writer: Any = None

    def on_phase_start(self, trainer: Trainer) -> None:
        """Open the event file."""
        if self._writer is None and ranks.rank() == 0 and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(trainer.folder / "tensorboard")
            # Steps that a resumed run makes again are hidden.
            self._writer = SummaryWriter(folder, purge_step=trainer.state.step + 1)

    def on_step_end(self, trainer: Trainer, terms: Mapping[str, float]) -> None:
        """Write the terms of a step."""
        if self._writer is not None:
            for name, value in terms.items():
                self._writer.add_scalar(name, value, trainer.state.step)

    def on_phase_end(self, trainer: Trainer) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.flush()
