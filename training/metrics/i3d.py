"""Features of FVD: spans of sixteen frames, by the I3D network of Kinetics-400.

This is the only module that loads TorchScript.

Axes: B batch, T video frames, C channels, H height, W width, N samples, D feature width.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from training.metrics.clips import SPAN_FRAMES, Clip, NetworkSpace, check_features
from turbotalk_core.errors import CheckpointError, GeometryError

WIDTH = 400  # number of classes: FVD uses the activations before the softmax


class I3DSpace(NetworkSpace):
    """Feature space with one sample per span; an incomplete span at the end is left out.

    Its network maps [B, 3, T, H, W] in [0, 255], with ``rescale``, ``resize`` and
    ``return_features``, to [B, 400].
    """

    def __call__(self, clip: Clip) -> Tensor:
        """Compute the features of a clip; see ``NetworkSpace``.

        Args:
            clip: clip to decode.

        Returns:
            Features, [spans, 400].

        Raises:
            GeometryError: if the clip is shorter than a span.
        """
        if clip.num_frames < SPAN_FRAMES:
            raise GeometryError(
                f"{clip.name} has {clip.num_frames} frames, and a span has {SPAN_FRAMES}"
            )
        return super().__call__(clip)

    def embed(self, span_TCHW: Tensor) -> Tensor:
        """Compute the features of a whole span, [1, 400]; of a shorter one none, [0, 400]."""
        if len(span_TCHW) < SPAN_FRAMES:
            return torch.empty(0, WIDTH)
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
