"""Features of FVD: spans of sixteen frames, by the I3D network of Kinetics-400.

Input: the network's TorchScript file. Output: a feature space. No other file loads TorchScript.

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

WIDTH = 400  # number of classes: FVD uses the activations before the softmax


class I3DSpace:
    """Feature space with one sample per span; an incomplete span at the end is left out."""

    def __init__(self, network: Callable[..., Tensor], device: torch.device) -> None:
        """Store the network.

        Args:
            network: function of [B, 3, T, H, W] in [0, 255], ``rescale``, ``resize`` and
                ``return_features`` that returns [B, 400].
            device: device of the network.
        """
        self._network = network
        self._device = device

    @torch.no_grad()
    def __call__(self, clip: Clip) -> Tensor:
        """Compute the features of a clip.

        Args:
            clip: to decode.

        Returns:
            Features, [spans, 400].

        Raises:
            ImageError: if the file is damaged.
            GeometryError: if the clip is shorter than a span.
            CheckpointError: if the output of the network has the wrong form.
        """
        if clip.num_frames < SPAN_FRAMES:
            raise GeometryError(
                f"{clip.name} has {clip.num_frames} frames, and a span has {SPAN_FRAMES}"
            )
        return torch.cat(
            [self._embed(span) for span in iterate_spans(clip) if len(span) == SPAN_FRAMES]
        )

    def _embed(self, span_TCHW: Tensor) -> Tensor:
        # The network's own resize needs contiguous memory.
        span_BCTHW = span_TCHW.transpose(0, 1).unsqueeze(0).to(self._device).float().contiguous()
        try:
            features = self._network(span_BCTHW, rescale=True, resize=True, return_features=True)
        except RuntimeError as error:  # TorchScript raises no other kind
            raise CheckpointError(
                f"the I3D network cannot be called ({str(error).strip().splitlines()[-1]}); take "
                "the file that docs/evaluation.md names"
            ) from error
        return check_features(features, 1, WIDTH, "the I3D network")


def load_i3d(path: Path, device: torch.device) -> I3DSpace:
    """Load the network.

    Args:
        path: the TorchScript file.
        device: device of the network.

    Returns:
        The feature space.

    Raises:
        CheckpointError: if the file is not TorchScript.
    """
    with warnings.catch_warnings():
        # The network of published numbers exists only as TorchScript, which torch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            network = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise CheckpointError(f"{path} is no TorchScript file; download it again") from error
    return I3DSpace(network, device)
