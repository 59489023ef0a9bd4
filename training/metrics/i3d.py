"""What FVD sees of a clip: spans of sixteen frames, by the I3D network of Kinetics-400.

In: its TorchScript file. Out: a feature space. Separate because it is the one file that loads
TorchScript.

Axes: B batch, T video frames, C channels, H height, W width, N samples, D feature width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from training.metrics.clips import SPAN_FRAMES, Clip, check_features, iterate_spans
from turbotalk_core.errors import CheckpointError, GeometryError

WIDTH = 400  # the classes: FVD is of what comes before the softmax


class I3DSpace:
    """A sample per span; spans follow each other, and what is left at the end does not count."""

    def __init__(self, network: Callable[..., Tensor], device: torch.device) -> None:
        """Take a network.

        Args:
            network: [B, 3, T, H, W] in [0, 255], ``rescale``, ``resize`` and ``return_features``
                to [B, 400].
            device: where it runs.
        """
        self._network = network
        self._device = device

    @torch.no_grad()
    def __call__(self, clip: Clip) -> Tensor:
        """Describe a clip.

        Args:
            clip: to decode.

        Returns:
            [spans, 400].

        Raises:
            ImageError: the file is damaged.
            GeometryError: it is shorter than a span.
            CheckpointError: the network gives something else.
        """
        if clip.num_frames < SPAN_FRAMES:
            raise GeometryError(
                f"{clip.name} has {clip.num_frames} frames, and a span has {SPAN_FRAMES}"
            )
        return torch.cat(
            [self._embed(span) for span in iterate_spans(clip) if len(span) == SPAN_FRAMES]
        )

    def _embed(self, span_TCHW: Tensor) -> Tensor:
        # The network's own resize cannot take a view.
        span_BCTHW = span_TCHW.transpose(0, 1).unsqueeze(0).to(self._device).float().contiguous()
        try:
            features = self._network(span_BCTHW, rescale=True, resize=True, return_features=True)
        except RuntimeError as error:  # TorchScript has no other kind
            raise CheckpointError(
                f"the I3D network cannot be called ({str(error).strip().splitlines()[-1]}); take "
                "the file that docs/evaluation.md names"
            ) from error
        return check_features(features, 1, WIDTH, "the I3D network")


def load_i3d(path: Path, device: torch.device) -> I3DSpace:
    """Load the network.

    Args:
        path: of its TorchScript file.
        device: where it runs.

    Returns:
        The feature space.

    Raises:
        CheckpointError: it is no TorchScript.
    """
    with warnings.catch_warnings():
        # The network of the published numbers exists in this form alone, deprecated or not.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            network = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise CheckpointError(f"{path} is no TorchScript file; download it again") from error
    return I3DSpace(network, device)
