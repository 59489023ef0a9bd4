"""What E-FID sees of a clip: the expression of its face, by a regressor that the user supplies.

In: the regressor and a face detector. Out: a feature space. Separate because no library has the
metric: papers name it after the Fréchet distance of the expression coefficients of a 3D face model,
pooled over all frames of all clips, and differ in the model. The coefficients are taken as they
are; no Inception network sees them.

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
    """Reads expressions; a ``torch.export`` program of this form can be given."""

    def __call__(self, faces_TCHW: Tensor) -> Tensor:
        """Read faces [T, 3, 224, 224], RGB in [0, 1]: coefficients [T, D]."""
        ...


class ExpressionSpace:
    """A sample per picture."""

    def __init__(self, regressor: Regressor, detector: FaceDetector) -> None:
        """Take the networks.

        Args:
            regressor: reads expressions.
            detector: finds faces.
        """
        self._regressor = regressor
        self._detector = detector

    @torch.no_grad()
    def __call__(self, clip: Clip) -> Tensor:
        """Describe a clip.

        Args:
            clip: to decode.

        Returns:
            [frames, D].

        Raises:
            ImageError: the file is damaged, or no face can be followed through it.
            CheckpointError: the regressor gives something else.
        """
        # In equal parts: programs of torch.export take every number of faces but a single one.
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
