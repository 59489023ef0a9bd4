"""Features of E-FID: facial expressions of a clip, by a regressor that the user supplies.

Input: the regressor and a face detector. Output: a feature space. No library provides the metric:
papers define it as the Fréchet distance of the expression coefficients of a 3D face model, pooled
over all frames of all clips, and use different models. The coefficients are used directly, without
an Inception network.

Axes: T video frames, C channels, H height, W width, D coefficients.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from training.data.scores import FaceDetector
from training.metrics.clips import SPAN_FRAMES, Clip, check_features
from training.metrics.faces import cut_faces


class Regressor(Protocol):
    """Expression regressor; a ``torch.export`` program of this form can be supplied."""

    def __call__(self, faces_TCHW: Tensor) -> Tensor:
        """Estimate coefficients [T, D] of faces [T, 3, 224, 224], RGB in [0, 1]."""
        ...


class ExpressionSpace:
    """Feature space with one sample per frame."""

    def __init__(self, regressor: Regressor, detector: FaceDetector) -> None:
        """Store the networks.

        Args:
            regressor: expression regressor.
            detector: face detector.
        """
        self._regressor = regressor
        self._detector = detector

    @torch.no_grad()
    def __call__(self, clip: Clip) -> Tensor:
        """Compute the expression coefficients of a clip.

        Args:
            clip: clip to decode.

        Returns:
            Coefficients, [frames, D].

        Raises:
            ImageError: if the file is damaged, or no face can be tracked through it.
            CheckpointError: if the output of the regressor has the wrong form.
        """
        # Parts of equal size: a torch.export program accepts any number of faces except one.
        num_parts = -(-clip.num_frames // SPAN_FRAMES)
        batches = cut_faces(clip, self._detector).tensor_split(num_parts)
        return torch.cat(
            [
                check_features(
                    self._regressor(faces_TCHW), len(faces_TCHW), None, "the expression regressor"
                )
                for faces_TCHW in batches
            ]
        )
