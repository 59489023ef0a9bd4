"""Everything random in a run, as a pure function of where the run is.

A draw names its purpose; seed, step, slot and purpose together are hashed into the state of one
generator. So no generator's state is part of a checkpoint: whoever makes step k draws what any
other would have drawn. A slot is one of the micro-batches of a step, counted over all ranks and
accumulations, so the draws of a step do not depend on the number of ranks either.
"""

from __future__ import annotations

import hashlib

import torch


class Draws:
    """The random streams of one micro-batch of one step.

    Args:
        seed: of the run.
        step: of the run, from 0.
        slot: of the step, from 0.
    """

    def __init__(self, seed: int, step: int, slot: int) -> None:
        self.seed = seed
        self.step = step
        self.slot = slot

    def shared(self, purpose: str) -> torch.Generator:
        """Open a stream that is the same in all slots of a step, for decisions of all ranks.

        Args:
            purpose: what is drawn, for example ``exit step``. The same purpose gives the same
                stream again: use another for another draw.

        Returns:
            A generator on the CPU.
        """
        return _open(f"shared/{self.seed}/{self.step}/{purpose}")

    def own(self, purpose: str) -> torch.Generator:
        """Open a stream that differs from slot to slot, for noise.

        Args:
            purpose: as for ``shared``.

        Returns:
            A generator on the CPU.
        """
        return _open(f"own/{self.seed}/{self.step}/{self.slot}/{purpose}")


def _open(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
