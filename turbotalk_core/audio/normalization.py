"""Normalisation of a wav2vec2 by the statistics of a whole sound when it encodes a section.

The first layer of wav2vec2-base normalises each channel of its convolution over its whole input
(group norm). A quiet section encoded by itself would therefore be amplified to the level of a loud
one. The convolution is linear, so mean and variance of its output follow from mean and covariance
of its input, the stretches of K samples that it is applied to: for weights w and bias b, the mean
is w·mean + b and the variance w·covariance·w. They are computed here in one pass over the sound and
replace the statistics of the section.

Axes: B batch, C channels of the convolution, K its width in samples, T its steps, S audio samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..types import SoundMoments


class RunningStats:
    """Running mean and covariance of the stretches of a mono sound that comes in blocks."""

    def __init__(self, width: int, stride: int) -> None:
        """Start without samples.

        Args:
            width: length K of a stretch, samples.
            stride: distance from the start of each stretch to that of the next, samples.
        """
        self._width, self._stride = width, stride
        self._rest_S = torch.zeros(0, dtype=torch.float64)  # samples from the next stretch on
        self._sum_K = torch.zeros(width, dtype=torch.float64)
        self._products_KK = torch.zeros(width, width, dtype=torch.float64)

    def add(self, samples_S: Tensor) -> None:
        """Process the next samples.

        Args:
            samples_S: mono samples, any number.
        """
        self._rest_S = torch.cat((self._rest_S, samples_S.detach().cpu().double()))
        num_stretches = self._count(self._rest_S.shape[0])
        if num_stretches < 1:
            return
        stretches_TK = self._rest_S.unfold(0, self._width, self._stride)
        self._sum_K += stretches_TK.sum(0)
        self._products_KK += stretches_TK.T @ stretches_TK
        self._rest_S = self._rest_S[num_stretches * self._stride :].clone()

    def measure(self, num_samples: int, gain: float = 1.0) -> SoundMoments:
        """Return mean and covariance of all samples so far, padded with silence.

        Args:
            num_samples: length of the sound with the silence, at least the number of samples so
                far. The few stretches that contain both sound and silence are left out.
            gain: gain that will be applied to the sound before it is encoded.

        Returns:
            Mean and covariance of the stretches.
        """
        # Stretches of silence add zeros to the sums, so only their number counts.
        num_stretches = max(1, self._count(num_samples))
        mean_K = self._sum_K / num_stretches
        covariance_KK = self._products_KK / num_stretches - mean_K[:, None] * mean_K
        return SoundMoments(mean_K=mean_K * gain, covariance_KK=covariance_KK * gain**2)

    def _count(self, num_samples: int) -> int:
        return (num_samples - self._width) // self._stride + 1


def find_first_kernel(layer: Any) -> tuple[int, int] | None:  # noqa: ANN401
    """Return the kernel of a wav2vec2's first convolution if its norm spans the whole input.

    Args:
        layer: first layer of the feature extractor, of transformers or ComfyUI, with ``conv`` and
            ``layer_norm``.

    Returns:
        Width and stride of its convolution, samples; None if it does not normalise over time.
    """
    if not isinstance(layer.layer_norm, nn.GroupNorm):
        return None
    return layer.conv.kernel_size[0], layer.conv.stride[0]


@contextmanager
def normalized_by(layer: Any, moments: SoundMoments | None) -> Iterator[None]:  # noqa: ANN401
    """Make a wav2vec2 normalise by the statistics of a whole sound; not differentiable.

    In effect within the ``with`` block; afterwards the layer is as before.

    Args:
        layer: first layer of the feature extractor; see ``find_first_kernel``.
        moments: mean and covariance of the whole sound. Nothing changes if they are None or the
            layer does not normalise over time.

    Yields:
        None.
    """
    if moments is None or find_first_kernel(layer) is None:
        yield
        return
    norm: nn.GroupNorm = layer.layer_norm
    # The weights to the CPU and the factors back: some waits for the device per section of a sound.
    weight_CK = layer.conv.weight.detach().cpu().double()[:, 0]
    mean_C = weight_CK @ moments.mean_K
    if layer.conv.bias is not None:
        mean_C += layer.conv.bias.detach().cpu().double()
    variance_C = ((weight_CK @ moments.covariance_KK) * weight_CK).sum(1).clamp(min=0)
    scale_C = norm.weight.detach().cpu().double() / (variance_C + norm.eps).sqrt()
    shift_C = norm.bias.detach().cpu().double() - mean_C * scale_C

    def normalize(_module: nn.Module, inputs: tuple[Tensor], output_BCT: Tensor) -> Tensor:
        scale_CT, shift_CT = (factor_C[:, None].to(output_BCT) for factor_C in (scale_C, shift_C))
        return torch.addcmul(shift_CT, inputs[0], scale_CT, out=output_BCT)  # no new memory

    hook = norm.register_forward_hook(normalize)
    try:
        yield
    finally:
        hook.remove()
