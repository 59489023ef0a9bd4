"""Tone mapping: signals of high dynamic range (HLG and PQ) become those of standard range.

Cameras of phones record HLG, and films for television are in PQ. Shown as they are, such signals
look flat and grey. Separate because pictures and videos contain them.

Axes: H height, W width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

PQ, HLG = 16, 18  # transfer characteristics, ISO/IEC 23091-2 table 3
TRANSFERS = (PQ, HLG)
WHITE = 203.0  # cd/m², ITU-R BT.2408: diffuse white, which becomes the white of standard range
PEAK = 1000.0  # cd/m², the brightest that is kept; the nominal peak of HLG, ITU-R BT.2100
_GAMMA = 2.4  # of displays of standard range, ITU-R BT.1886

# ITU-R BT.2100, table 4 (PQ) and table 5 (HLG)
_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073
_SYSTEM_GAMMA = 1.2
_LUMINANCE = (0.2627, 0.6780, 0.0593)  # of BT.2020 primaries
# ITU-R BT.2087, from BT.2020 to BT.709 primaries
_TO_BT709 = (
    (1.6605, -0.5876, -0.0728),
    (-0.1246, 1.1329, -0.0083),
    (-0.0182, -0.1006, 1.1187),
)


def tone_map(signal_HWC: Tensor, transfer: int) -> Tensor:
    """Convert a picture of high dynamic range to standard range, with BT.709 primaries.

    The signal becomes light. Light up to half of the diffuse white is kept. Brighter light is
    compressed by the curve of ITU-R BT.2390 so that ``PEAK`` becomes white. The curve is applied to
    the largest of the three channels, and all are scaled alike, so hues are kept.

    Args:
        signal_HWC: [H, W, 3] in [0, 1], full range RGB with BT.2020 primaries.
        transfer: one of ``TRANSFERS``.

    Returns:
        [H, W, 3], float32 in [0, 1].
    """
    decode = _decode_pq if transfer == PQ else _decode_hlg
    light_HWC = decode(signal_HWC.float().clamp(0, 1))
    largest_HW1 = light_HWC.amax(2, keepdim=True).clamp(1e-4, None)
    light_HWC = light_HWC * (_compress(largest_HW1) / (WHITE * largest_HW1))
    light_HWC = light_HWC @ torch.tensor(_TO_BT709).T
    return light_HWC.clamp(0, 1).pow(1 / _GAMMA)


def _decode_pq(signal: Tensor) -> Tensor:
    """Return the light of a PQ signal, cd/m²."""
    power = signal.pow(1 / _M2)
    return 10_000 * ((power - _C1).clamp(0, None) / (_C2 - _C3 * power)).pow(1 / _M1)


def _encode_pq(light: Tensor) -> Tensor:
    """Return the PQ signal of light in cd/m²."""
    power = (light / 10_000).pow(_M1)
    return ((_C1 + _C2 * power) / (1 + _C3 * power)).pow(_M2)


def _decode_hlg(signal_HWC: Tensor) -> Tensor:
    """Return the light of an HLG signal on a display of ``PEAK``, cd/m²."""
    bright_HWC = (((signal_HWC - _C) / _A).exp() + _B) / 12
    scene_HWC = torch.where(signal_HWC <= 0.5, signal_HWC.square() / 3, bright_HWC)
    luminance_HW1 = (scene_HWC * torch.tensor(_LUMINANCE)).sum(2, keepdim=True).clamp(1e-6, None)
    return PEAK * luminance_HW1.pow(_SYSTEM_GAMMA - 1) * scene_HWC


def _compress(light: Tensor) -> Tensor:
    """Compress light of [0, PEAK] to [0, WHITE], cd/m²; ITU-R BT.2390, section 5.4.1."""
    white, peak = _encode_pq(torch.tensor([WHITE, PEAK]))
    level = (_encode_pq(light) / peak).clamp(0, 1)
    most = white / peak
    knee = 1.5 * most - 0.5
    t = (level - knee) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * most
    )
    return _decode_pq(torch.where(level < knee, level, spline) * peak)
