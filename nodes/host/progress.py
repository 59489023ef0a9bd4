"""The host's progress bar and stop button behind the core's protocols."""

from __future__ import annotations

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.utils import ProgressBar
from PIL import Image
from torch import Tensor

PREVIEW_SIDE = 512  # pixels, the longer side of a preview


class HostProgress:
    """Progress bar of the host over all work of a node; satisfies ``protocols.Progress``."""

    def __init__(self, total: int) -> None:
        """Start the bar at 0.

        Args:
            total: units of work.
        """
        self._bar = ProgressBar(total)

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        """Count finished units; see ``protocols.Progress``."""
        preview = None
        if preview_HWC is not None:
            picture = Image.fromarray((preview_HWC * 255).round().to(torch.uint8).numpy())
            # without the limit the host would enlarge a smaller picture
            preview = ("JPEG", picture, min(PREVIEW_SIDE, max(picture.size)))
        self._bar.update_absolute(self._bar.current + units, preview=preview)


def check_stop() -> None:
    """Raise the host's exception if its stop button was pressed; see ``protocols.CheckStop``."""
    comfy.model_management.throw_exception_if_processing_interrupted()
