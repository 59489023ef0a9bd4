"""TeaCache: leave the blocks out in steps where the network would say nearly the same again.

The change of the timestep's modulation from step to step tells how much the output would change.
While the sum of these changes stays under a threshold, what the blocks added last is added again.

Source: Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model (2024);
the fits are InfiniteTalk's, wan/multitalk.py.
"""

from __future__ import annotations

from torch import Tensor

NUM_FIRST_STEPS = 5  # always run, the picture takes shape in them
# From the relative change of the modulation to that of the output, highest power first.
FIT_480 = (2.57151496e5, -3.54229917e4, 1.40286849e3, -13.5890334, 0.132517977)
FIT_720 = (8.1070546e3, 2.13393892e3, -3.72934672e2, 16.6203073, -0.0417769401)
MAX_CELLS_480 = 640 * 960 // 64  # latent cells per frame; halfway between the two sizes' areas


class TeaCache:
    """What one kind of call, of a step's one to three, remembers through a chunk.

    Args:
        threshold: sum of changes from which on the blocks run again; InfiniteTalk has 0.2.
        num_cells: latent cells per frame, which tell the model's size.

    Attributes:
        added: what the blocks added to the tokens when they ran last; None in the first steps.
    """

    def __init__(self, threshold: float, num_cells: int) -> None:
        self.added: Tensor | None = None
        self._threshold = threshold
        self._fit = FIT_480 if num_cells <= MAX_CELLS_480 else FIT_720
        self._last: Tensor | None = None
        self._sum = 0.0
        self._num_steps = 0

    def keep(self, added: Tensor) -> None:
        """Remember what the blocks added, as soon as it can be needed."""
        if self._num_steps >= NUM_FIRST_STEPS:
            self.added = added

    def is_due(self, modulation: Tensor) -> bool:
        """Say whether the blocks must run in this step; asked once per step.

        Args:
            modulation: of the step's timestep, any shape.

        Returns:
            Whether to run them, and ``keep`` what they add.
        """
        last, self._last = self._last, modulation
        self._num_steps += 1
        if last is None or self._num_steps <= NUM_FIRST_STEPS:
            return True
        change = ((modulation - last).abs().mean() / last.abs().mean()).item()
        fitted = 0.0
        for coefficient in self._fit:
            fitted = fitted * change + coefficient
        self._sum += fitted
        if self._sum < self._threshold:
            return False
        self._sum = 0.0
        return True
