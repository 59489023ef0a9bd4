"""What a wav2vec2 that is given a part of a sound has to know of the whole.

The first layer of wav2vec2-base normalises each channel of its convolution over all that it is
given (group norm), so a quiet part heard alone is as loud to it as a cry. Mean and variance of what
a convolution makes follow from those of what it reads: all stretches of K samples, one every few
samples. They are taken here in one pass over the sound, and put in the place of the part's own.

Axes: B batch, C channels of the convolution, K its width in samples, T its steps, S audio samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..types import SoundMoments


class MomentsMeter:
    """Takes the moments of a mono sound that comes in blocks of any length."""

    def __init__(self, width: int, stride: int) -> None:
        """Start with nothing.

        Args:
            width: of a stretch, samples, K.
            stride: from the start of each to that of the next.
        """
        self._width, self._stride = width, stride
        self._rest_S = torch.zeros(0, dtype=torch.float64)  # from the next stretch on
        self._sum_K = torch.zeros(width, dtype=torch.float64)
        self._products_KK = torch.zeros(width, width, dtype=torch.float64)

    def add(self, samples_S: Tensor) -> None:
        """Take the next samples.

        Args:
            samples_S: mono, any number of them.
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
        """Tell the moments of all samples so far, with silence around them.

        Args:
            num_samples: of the sound with the silence, not fewer than there are; the few stretches
                that reach from the one into the other are left out.
            gain: that the sound is to have.

        Returns:
            The moments.
        """
        num_stretches = max(1, self._count(num_samples))
        mean_K = self._sum_K / num_stretches
        covariance_KK = self._products_KK / num_stretches - mean_K[:, None] * mean_K
        return SoundMoments(mean_K=mean_K * gain, covariance_KK=covariance_KK * gain**2)

    def _count(self, num_samples: int) -> int:
        return (num_samples - self._width) // self._stride + 1


def find_first_kernel(layer: Any) -> tuple[int, int] | None:  # noqa: ANN401
    """Tell over what a wav2vec2 normalises all that it is given.

    Args:
        layer: the first of its feature extractor, of transformers or the host: ``conv`` and
            ``layer_norm``.

    Returns:
        Width and stride of its convolution, samples; None where it does not normalise over time.
    """
    if not isinstance(layer.layer_norm, nn.GroupNorm):
        return None
    return layer.conv.kernel_size[0], layer.conv.stride[0]


@contextmanager
def normalized_by(layer: Any, moments: SoundMoments | None) -> Iterator[None]:  # noqa: ANN401
    """Let a wav2vec2 normalise by a whole sound instead of what it is given; not differentiable.

    Args:
        layer: as for ``find_first_kernel``.
        moments: of the sound; None changes nothing, nor does a layer that needs none.

    Yields:
        Nothing; afterwards the layer is as before.
    """
    if moments is None or find_first_kernel(layer) is None:
        yield
        return
    norm: nn.GroupNorm = layer.layer_norm
    weight_CK = layer.conv.weight.detach().cpu().double()[:, 0]
    mean_C = weight_CK @ moments.mean_K
    if layer.conv.bias is not None:
        mean_C += layer.conv.bias.detach().cpu().double()
    variance_C = ((weight_CK @ moments.covariance_KK) * weight_CK).sum(1).clamp(min=0)
    scale_C = norm.weight.detach().cpu().double() / (variance_C + norm.eps).sqrt()
    shift_C = norm.bias.detach().cpu().double() - mean_C * scale_C

    def normalize(_module: nn.Module, inputs: tuple[Tensor], output_BCT: Tensor) -> Tensor:
        scale_CT, shift_CT = (factor_C[:, None].to(output_BCT) for factor_C in (scale_C, shift_C))
        return torch.addcmul(shift_CT, inputs[0], scale_CT, out=output_BCT)  # where it lies already

    hook = norm.register_forward_hook(normalize)
    try:
        yield
    finally:
        hook.remove()
