"""Loudness of speech, brought to what the audio encoder was used to in training.

Goes in: mono samples. Comes out: the same samples times one gain. Separate because it is the only
file that needs pyloudnorm.

Axes: S audio samples.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..geometry import SAMPLE_RATE

TARGET_LUFS = -23.0  # InfiniteTalk, loudness_norm; also the level of EBU R 128
GATING_BLOCK_SECONDS = 0.4  # ITU-R BS.1770-4: loudness is not defined for less


def normalize_loudness(
    waveform_S: Tensor, sample_rate: int = SAMPLE_RATE, target_lufs: float = TARGET_LUFS
) -> Tensor:
    """Apply the gain that brings a sound to an integrated loudness; nothing is clipped.

    Silence (no block over the -70 LUFS gate) and sounds under 0.4 s have no loudness and are
    returned unchanged.

    Args:
        waveform_S: mono samples.
        sample_rate: Hz.
        target_lufs: wanted integrated loudness, LUFS.

    Returns:
        [S], same dtype and device; peaks may exceed 1.

    Source: ITU-R BS.1770-4; InfiniteTalk, generate_infinitetalk.py, loudness_norm.
    """
    lufs = measure_loudness(waveform_S, sample_rate)
    return waveform_S if lufs is None else waveform_S * 10 ** ((target_lufs - lufs) / 20)


def measure_loudness(waveform_S: Tensor, sample_rate: int = SAMPLE_RATE) -> float | None:
    """Measure the integrated loudness of a sound.

    Args:
        waveform_S: mono samples.
        sample_rate: Hz.

    Returns:
        LUFS; None for silence and sounds under 0.4 s, which have none.

    Source: ITU-R BS.1770-4.
    """
    # Imported when used: it brings in SciPy, which takes a second.
    from pyloudnorm import Meter

    if waveform_S.shape[0] < GATING_BLOCK_SECONDS * sample_rate:
        return None
    meter = Meter(sample_rate, block_size=GATING_BLOCK_SECONDS)
    lufs = meter.integrated_loudness(waveform_S.detach().double().cpu().numpy())
    return float(lufs) if math.isfinite(lufs) else None
