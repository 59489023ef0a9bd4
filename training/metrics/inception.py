"""Features of FID and KID: single frames, by the Inception network of 2015.

This is the only module that uses torch-fidelity, whose network and resize agree with those of
published numbers. Torchvision's Inception has other weights and leads to other numbers.

Axes: T video frames, C channels, H height, W width, N samples, D feature width.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from training.metrics.clips import NetworkSpace, check_features
from turbotalk_core.errors import CheckpointError, MissingToolError

WIDTH = 2048


class InceptionSpace(NetworkSpace):
    """Feature space with one sample per frame; its network maps uint8 [T, 3, H, W] to [T, 2048]."""

    def embed(self, span_TCHW: Tensor) -> Tensor:
        """Compute the features of the frames, [T, 2048]."""
        features = self._network(span_TCHW.to(self._device))
        return check_features(features, len(span_TCHW), WIDTH, "the Inception network")


def load_inception(path: Path, device: torch.device) -> InceptionSpace:
    """Load the network.

    Args:
        path: file of its weights. It must already be verified as the public file, because
            torch-fidelity unpickles any content.
        device: device of the network.

    Returns:
        The feature space.

    Raises:
        MissingToolError: if torch-fidelity is not installed.
        CheckpointError: if the weights do not fit.
    """
    if find_spec("torch_fidelity") is None:
        raise MissingToolError(
            "torch-fidelity is not installed, whose Inception network FID and KID are measured "
            "with; install it with pip install -e '.[metrics]'"
        )
    # Imported when used: the import takes seconds, and the package is an optional extra.
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3(
            "inception", [str(WIDTH)], feature_extractor_weights_path=str(path)
        )
    except Exception as error:  # torch raises many kinds of errors for files that are no weights
        raise CheckpointError(
            f"{path} does not fit the Inception network ({type(error).__name__}); download it again"
        ) from error
    network = network.to(device)
    return InceptionSpace(lambda pictures_TCHW: network(pictures_TCHW)[0], device)
