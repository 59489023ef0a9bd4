"""TeaCache: reuse of the blocks' output in steps where it would change little.

The relative change of the timestep modulation from step to step, which is cheap to compute,
predicts the relative change of the output through a fitted polynomial. While the sum of these
predictions stays under a threshold, the residual of the last full step (hidden states after the
blocks minus those before them) is added again and the blocks are skipped.

Source: Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model (2024);
the fits are InfiniteTalk's, wan/multitalk.py.
"""

from __future__ import annotations

from torch import Tensor

NUM_FIRST_STEPS = 5  # never skipped: they decide the composition of the picture
# Polynomials from the relative change of the modulation to that of the output, highest power first.
# One per model size, as the relation differs between the 480p and the 720p model.
FIT_480 = (2.57151496e5, -3.54229917e4, 1.40286849e3, -13.5890334, 0.132517977)
FIT_720 = (8.1070546e3, 2.13393892e3, -3.72934672e2, 16.6203073, -0.0417769401)
MAX_CELLS_480 = 640 * 960 // 64  # latent cells per frame; halfway between the two sizes' areas


class TeaCache:
    """Cache of one kind of network call through the steps of one chunk.

    Guidance makes one to three kinds of call per step; each needs a cache of its own.

    Args:
        threshold: sum of predicted changes from which on the blocks run again; InfiniteTalk uses
            0.2.
        num_cells: latent cells per frame; they select the polynomial for 480p or 720p.

    Attributes:
        added: residual of the blocks when they ran last; None in the first steps.
    """

    def __init__(self, threshold: float, num_cells: int) -> None:
        self.added: Tensor | None = None
        self._threshold = threshold
        self._fit = FIT_480 if num_cells <= MAX_CELLS_480 else FIT_720
        self._last: Tensor | None = None
        self._sum = 0.0
        self._num_steps = 0

    def keep(self, added: Tensor) -> None:
        """Store the residual of the blocks, except in the first steps, where no step reuses it."""
        if self._num_steps >= NUM_FIRST_STEPS:
            self.added = added

    def is_due(self, modulation: Tensor) -> bool:
        """Return whether the blocks must run in this step; to be called exactly once per step.

        Args:
            modulation: modulation of the step's timestep, any shape.

        Returns:
            True if they must run, and ``keep`` be called with their residual; False if ``added``
            takes their place.
        """
        last, self._last = self._last, modulation
        self._num_steps += 1
        if last is None or self._num_steps <= NUM_FIRST_STEPS:
            return True
        # A wait for the device: whether the blocks run is the program's decision.
        change = ((modulation - last).abs().mean() / last.abs().mean()).item()
        fitted = 0.0  # the polynomial by Horner's rule
        for coefficient in self._fit:
            fitted = fitted * change + coefficient
        self._sum += fitted
        if self._sum < self._threshold:
            return False
        self._sum = 0.0
        return True
