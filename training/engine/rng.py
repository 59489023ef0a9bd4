"""Random streams of a run, as a pure function of the position in the run.

A draw has a named purpose. Seed, step, slot and purpose are hashed together into the state of one
generator. So checkpoints contain no generator states: a resumed run draws at step k what an
uninterrupted run would have drawn. A slot is one of the micro-batches of a step, counted over all
ranks and accumulations, so the draws of a step do not depend on the number of ranks either.
"""

from __future__ import annotations

import hashlib

import torch


class Draws:
    """Random streams of one micro-batch of one step.

    Args:
        seed: seed of the run.
        step: number of the step in the run, from 0.
        slot: number of the micro-batch in the step, from 0.
        count: number of micro-batches in the step.
        salt: any other number than 0 makes all draws other ones.
    """

    def __init__(self, seed: int, step: int, slot: int, *, count: int = 1, salt: int = 0) -> None:
        self.seed = seed
        self.step = step
        self.slot = slot
        self.count = count
        self._prefix = f"{salt}/" if salt else ""

    def shared(self, purpose: str) -> torch.Generator:
        """Open a stream that is the same in all slots of a step, for decisions common to all ranks.

        Args:
            purpose: name of what is drawn, for example ``exit step``. The same purpose returns the
                same stream again, so each draw needs its own.

        Returns:
            A generator on the CPU.
        """
        return _open(f"{self._prefix}shared/{self.seed}/{self.step}/{purpose}")

    def own(self, purpose: str) -> torch.Generator:
        """Open a stream that differs from slot to slot, for noise.

        Args:
            purpose: name of what is drawn, as for ``shared``.

        Returns:
            A generator on the CPU.
        """
        return _open(f"{self._prefix}own/{self.seed}/{self.step}/{self.slot}/{purpose}")


def _open(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
