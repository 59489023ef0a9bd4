"""Integrated loudness of speech and its normalisation to the level used in training.

Works on mono samples, whole or block by block. Separate because it is the only file that needs
pyloudnorm.

Axes: S audio samples.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ..dependencies import required_for
from ..geometry import SAMPLE_RATE

TARGET_LUFS = -23.0  # InfiniteTalk, loudness_norm; also the level of EBU R 128

# ITU-R BS.1770-4, annex 1: the two filters of the K-weighting, here as gain (dB), quality and
# frequency (Hz) of a second-order shelf and a high pass; equations 1 to 7 for the gates, which
# exclude pauses from the mean.
_SHELF = (4.0, 1 / math.sqrt(2), 1500.0)
_HIGH_PASS = (0.0, 0.5, 38.0)
_OFFSET_LUFS = -0.691
_ABSOLUTE_GATE_LUFS = -70.0
_RELATIVE_GATE_LU = -10.0
GATING_BLOCK_SECONDS = 0.4  # loudness is not defined for shorter sounds
_STEP = 0.25  # from each gating block to the next, in gating blocks: they overlap by 75 %


class LoudnessMeter:
    """Meter of the integrated loudness of a mono sound that comes in blocks of any length.

    Memory holds one gating block of samples, and 10 numbers for each second before. The result
    equals bit for bit that of the whole sound at once.

    Source: ITU-R BS.1770-4.
    """

    def __init__(self, sample_rate: int = SAMPLE_RATE) -> None:
        """Start without samples.

        Args:
            sample_rate: sample rate, Hz.

        Raises:
            MissingToolError: if pyloudnorm or SciPy is not installed.
        """
        # Imported when used: SciPy takes a second.
        with required_for(
            "loudness normalisation (off with --no-loudness, or normalize_loudness of the node)"
        ):
            from pyloudnorm.iirfilter import IIRfilter
            from scipy.signal import lfilter

        self._lfilter = lfilter
        self._sample_rate = sample_rate
        self._filters = [
            (stage.b, stage.a)
            for stage in (
                IIRfilter(*_SHELF, sample_rate, "high_shelf"),
                IIRfilter(*_HIGH_PASS, sample_rate, "high_pass"),
            )
        ]
        self._states = [np.zeros(2), np.zeros(2)]
        self._weighted = np.zeros(0)  # filtered samples from the next gating block on
        self._start = self._num_samples = 0  # sample number of the first of them, and of the end
        self._powers: list[float] = []  # mean square of each gating block

    def add(self, samples_S: Tensor) -> None:
        """Process the next samples.

        Args:
            samples_S: mono samples, any number.
        """
        weighted = samples_S.detach().double().cpu().numpy()
        for index, (b, a) in enumerate(self._filters):
            weighted, self._states[index] = self._lfilter(b, a, weighted, zi=self._states[index])
        self._weighted = np.concatenate((self._weighted, weighted))
        self._num_samples += samples_S.shape[0]
        while self._find(len(self._powers))[1] <= self._num_samples:
            self._powers.append(self._measure(len(self._powers)))
        passed = max(0, self._find(len(self._powers))[0] - self._start)
        self._weighted, self._start = self._weighted[passed:].copy(), self._start + passed

    def measure(self) -> float | None:
        """Return the integrated loudness of all samples so far.

        It is the mean power of the gating blocks above -70 LUFS that are also above the relative
        gate, 10 LU below the mean of those.

        Returns:
            LUFS; None for silence and sounds under 0.4 s, whose loudness is not defined.
        """
        if self._num_samples < GATING_BLOCK_SECONDS * self._sample_rate:
            return None
        powers = list(self._powers)
        steps = (self._num_samples / self._sample_rate - GATING_BLOCK_SECONDS) / (
            GATING_BLOCK_SECONDS * _STEP
        )
        if round(steps) + 1 > len(powers):  # more than half a step is left: an incomplete block
            powers.append(self._measure(len(powers)))
        block_powers = np.array(powers)
        with np.errstate(divide="ignore"):
            levels = _OFFSET_LUFS + 10 * np.log10(block_powers)
        is_loud = levels >= _ABSOLUTE_GATE_LUFS
        if not is_loud.any():
            return None
        gate = _OFFSET_LUFS + 10 * np.log10(block_powers[is_loud].mean()) + _RELATIVE_GATE_LU
        is_loud &= levels > gate
        return float(_OFFSET_LUFS + 10 * np.log10(block_powers[is_loud].mean()))

    def _find(self, index: int) -> tuple[int, int]:
        """Return the first sample of a gating block and one past its last."""
        start = GATING_BLOCK_SECONDS * (index * _STEP) * self._sample_rate
        stop = GATING_BLOCK_SECONDS * (index * _STEP + 1) * self._sample_rate
        return int(start), int(stop)

    def _measure(self, index: int) -> float:
        start, stop = (edge - self._start for edge in self._find(index))
        power = np.square(self._weighted[start:stop]).sum()
        return power * (1 / (GATING_BLOCK_SECONDS * self._sample_rate))


def normalize_loudness(
    waveform_S: Tensor, sample_rate: int = SAMPLE_RATE, target_lufs: float = TARGET_LUFS
) -> Tensor:
    """Scale a sound to an integrated loudness, without clipping.

    Silence (no block over the -70 LUFS gate) and sounds under 0.4 s have no loudness and are
    returned unchanged.

    Args:
        waveform_S: mono samples.
        sample_rate: sample rate, Hz.
        target_lufs: target integrated loudness, LUFS.

    Returns:
        [S], in the same dtype and on the same device; peaks may exceed 1.

    Source: ITU-R BS.1770-4; InfiniteTalk, generate_infinitetalk.py, loudness_norm.
    """
    gain = find_gain(measure_loudness(waveform_S, sample_rate), target_lufs)
    return waveform_S if gain is None else waveform_S * gain


def find_gain(lufs: float | None, target_lufs: float = TARGET_LUFS) -> float | None:
    """Compute the gain from one loudness to another.

    Args:
        lufs: loudness of the sound, LUFS; None if it has none.
        target_lufs: target loudness, LUFS.

    Returns:
        Factor on the samples; None if the sound has no loudness and is to stay as it is.
    """
    return None if lufs is None else 10 ** ((target_lufs - lufs) / 20)


def measure_loudness(waveform_S: Tensor, sample_rate: int = SAMPLE_RATE) -> float | None:
    """Measure the integrated loudness of a sound.

    Args:
        waveform_S: mono samples.
        sample_rate: sample rate, Hz.

    Returns:
        LUFS; None for silence and sounds under 0.4 s, whose loudness is not defined.

    Source: ITU-R BS.1770-4.
    """
    meter = LoudnessMeter(sample_rate)
    meter.add(waveform_S)
    return meter.measure()
