"""Sound at another sample rate, whole or block by block, and its reduction to 16 kHz mono.

Goes in: a ``Sound``, or samples. Comes out: another ``Sound``, or samples. Separate because it
alone knows how far a filter reaches.

Axes: C channels, S audio samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torchaudio.functional as AF
from torch import Tensor

from ..errors import AudioError
from ..geometry import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE, SAMPLE_RATE
from ..sound import Sound, SoundReader
from ..types import Waveform

# An odd rate such as 44101 Hz would need a resampling filter of gigabytes; a ratio this fine drifts
# by less than a tenth of a video frame per hour.
MAX_RATIO_DENOMINATOR = 1_000
BLOCK_SECONDS = 10  # of the grid on which a long sound is resampled
_ZERO_CROSSINGS, _ROLLOFF = 6, 0.99  # of the filter: torchaudio's own choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampled:
    """A sound at another sample rate, computed while it is read; a ``Sound``.

    It is computed in blocks that lie on a fixed grid, each with as much of its neighbours as the
    filter reaches. So a sample is the same from wherever reading began.

    Attributes:
        sound: at its own rate.
        sample_rate: wanted, Hz.
    """

    sound: Sound
    sample_rate: int

    @property
    def num_channels(self) -> int:
        """Channels of the sound."""
        return self.sound.num_channels

    @property
    def num_samples(self) -> int:
        """Length, rounded up."""
        ratio = _find_ratio(self.sound.sample_rate, self.sample_rate)
        return ceil(self.sound.num_samples / ratio)

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Read from a sample on; see ``Sound``."""
        ratio = _find_ratio(self.sound.sample_rate, self.sample_rate)
        if ratio == 1:
            yield from self.sound.blocks(start)
            return
        # The filter's pattern repeats after so many samples before and after.
        period, new_period = ratio.numerator, ratio.denominator
        reach = ceil(_ZERO_CROSSINGS * period / (min(period, new_period) * _ROLLOFF))
        margin = ceil(reach / period)
        length = max(1, round(BLOCK_SECONDS * self.sound.sample_rate / period))
        num_periods = ceil(self.sound.num_samples / period)
        reader = SoundReader(self.sound)
        for first in range(start // (length * new_period) * length, num_periods, length):
            begin, stop = max(0, first - margin), min(num_periods, first + length + margin)
            block_CS = _resample(reader.read(begin * period, stop * period), ratio)
            wanted = max(start, first * new_period)
            end = min(self.num_samples, (first + length) * new_period)
            yield block_CS[:, wanted - begin * new_period : end - begin * new_period]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mono:
    """The average of a sound's channels; a ``Sound``."""

    sound: Sound

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.sound.sample_rate

    @property
    def num_channels(self) -> int:
        """One."""
        return 1

    @property
    def num_samples(self) -> int:
        """Length of the sound."""
        return self.sound.num_samples

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Read from a sample on; see ``Sound``."""
        for block_CS in self.sound.blocks(start):
            yield block_CS.mean(dim=0, keepdim=True)


def read_mono_16k(sound: Sound) -> Sound:
    """Average the channels and resample to the encoder's 16 kHz while the sound is read.

    Args:
        sound: any rate from 1 kHz on, any channel count.

    Returns:
        One channel at 16 kHz; its samples are those of ``to_mono_16k``, up to rounding.

    Raises:
        AudioError: the sample rate is under 1 kHz, or above ``MAX_SAMPLE_RATE``.
    """
    _find_ratio(sound.sample_rate, SAMPLE_RATE)  # refused now, not when it is read
    return Resampled(sound=Mono(sound=sound), sample_rate=SAMPLE_RATE)


def to_mono_16k(waveform: Waveform) -> Tensor:
    """Average the channels and resample to the encoder's 16 kHz, all at once.

    Args:
        waveform: any rate from 1 kHz on, any channel count.

    Returns:
        [S] float32, ceil(16000 * seconds) samples.

    Raises:
        AudioError: as for ``resample``.
    """
    return resample(waveform.samples_CS.mean(dim=0), waveform.sample_rate, SAMPLE_RATE)


def resample(samples: Tensor, sample_rate: int, wanted_rate: int) -> Tensor:
    """Bring sound to another sample rate, all at once.

    Args:
        samples: [..., S].
        sample_rate: of the samples, Hz.
        wanted_rate: Hz.

    Returns:
        [..., ceil(S * wanted_rate / sample_rate)], but for odd ratios a few samples more or fewer.

    Raises:
        AudioError: the sample rate is under 1 kHz, or above ``MAX_SAMPLE_RATE``.
    """
    return _resample(samples, _find_ratio(sample_rate, wanted_rate))


def _find_ratio(sample_rate: int, wanted_rate: int) -> Fraction:
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:  # or the filter may need gigabytes
        raise AudioError(
            f"got a sample rate of {sample_rate} Hz; speech needs at least {MIN_SAMPLE_RATE} Hz "
            f"and at most {MAX_SAMPLE_RATE}, so give the recording at its true rate"
        )
    return Fraction(sample_rate, wanted_rate).limit_denominator(MAX_RATIO_DENOMINATOR)


def _resample(samples: Tensor, ratio: Fraction) -> Tensor:
    return AF.resample(
        samples,
        ratio.numerator,
        ratio.denominator,
        lowpass_filter_width=_ZERO_CROSSINGS,
        rolloff=_ROLLOFF,
    )
