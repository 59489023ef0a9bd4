"""Resampling of sound, whole or block by block, and conversion to 16 kHz mono.

Separate because it alone deals with the length of the resampling filter.

Axes: C channels, S audio samples, P phases of the filter, K its taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, pi

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AudioError
from ..geometry import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE, SAMPLE_RATE
from ..sound import Sound, SoundReader
from ..types import Waveform

# The exact ratio of an odd rate such as 44101 Hz to 16 kHz would need a filter of gigabytes. A
# fraction with a denominator up to this replaces it; its error makes the sound drift by less than a
# tenth of a video frame per hour.
MAX_RATIO_DENOMINATOR = 1_000
CANCELLED = 0.1  # of the power that the average of independent channels has
BLOCK_SECONDS = 10  # spacing of the grid on which a long sound is resampled
# Of the windowed sinc filter, with torchaudio's defaults: half its length in zero crossings, and
# its cutoff in units of the lower Nyquist frequency.
_ZERO_CROSSINGS, _ROLLOFF = 6, 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampled:
    """Sound at another sample rate, computed while it is read; a ``Sound``.

    It is computed in blocks on a fixed grid, each with as many samples of its neighbours as the
    filter covers. So the value of a sample does not depend on where reading began.

    Attributes:
        sound: sound at its own rate.
        sample_rate: new sample rate, Hz.
    """

    sound: Sound
    sample_rate: int

    @property
    def num_channels(self) -> int:
        """Number of channels of the sound."""
        return self.sound.num_channels

    @property
    def num_samples(self) -> int:
        """Length in samples at the new rate, rounded up."""
        ratio = _find_ratio(self.sound.sample_rate, self.sample_rate)
        return ceil(self.sound.num_samples / ratio)

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the samples from ``start`` to the end; see ``Sound``."""
        ratio = _find_ratio(self.sound.sample_rate, self.sample_rate)
        if ratio == 1:
            yield from self.sound.blocks(start)
            return
        # The positions of new samples between old ones repeat after ``period`` old samples, which
        # are ``new_period`` new ones. Blocks and margins are multiples of it, so that each block
        # starts at the same phase of the filter.
        period, new_period = ratio.numerator, ratio.denominator
        margin = ceil(_find_reach(ratio) / period)
        length = max(1, round(BLOCK_SECONDS * self.sound.sample_rate / period))
        num_periods = ceil(self.sound.num_samples / period)
        reader = SoundReader(self.sound)
        for first in range(start // (length * new_period) * length, num_periods, length):
            begin, stop = max(0, first - margin), min(num_periods, first + length + margin)
            block_CS = _resample(reader.read(begin * period, stop * period), ratio)
            wanted = max(start, first * new_period)
            end = min(self.num_samples, (first + length) * new_period)
            yield block_CS[:, wanted - begin * new_period : end - begin * new_period]


def find_uncancelled(sound: Sound) -> int | None:
    """Find a channel to use instead of the average, if the channels cancel each other in that.

    Channels of independent sounds have an average with 1 / C² of the sum of their powers. Channels
    in phase have more, channels in opposite phase close to none, although each can be heard.

    Args:
        sound: any sound; it is read once if it has several channels.

    Returns:
        The loudest channel; None if the average is fine.
    """
    if sound.num_channels == 1:
        return None
    powers_C, power = torch.zeros(sound.num_channels, dtype=torch.float64), 0.0
    for block_CS in sound.blocks():
        powers_C += block_CS.square().sum(1, dtype=torch.float64)
        power += block_CS.mean(0).square().sum(dtype=torch.float64).item()
    if power * sound.num_channels**2 >= CANCELLED * powers_C.sum().item():
        return None
    return int(powers_C.argmax())


def pick_audible(sound: Sound) -> Sound:
    """Return the loudest channel of a sound whose channels cancel each other, else the sound."""
    index = find_uncancelled(sound)
    if index is None:
        return sound
    if isinstance(sound, Waveform):
        return replace(sound, samples_CS=sound.samples_CS[index : index + 1])
    return Mono(sound=sound, channel=index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mono:
    """One channel of a sound, or the average of all; a ``Sound``.

    Attributes:
        sound: sound of any number of channels.
        channel: number of the channel; None for the average.
    """

    sound: Sound
    channel: int | None = None

    @property
    def sample_rate(self) -> int:
        """Sample rate, Hz."""
        return self.sound.sample_rate

    @property
    def num_channels(self) -> int:
        """Number of channels: 1."""
        return 1

    @property
    def num_samples(self) -> int:
        """Length of the sound in samples."""
        return self.sound.num_samples

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the samples from ``start`` to the end; see ``Sound``."""
        for block_CS in self.sound.blocks(start):
            if self.channel is None:
                yield block_CS.mean(dim=0, keepdim=True)
            else:
                yield block_CS[self.channel : self.channel + 1]


def read_mono_16k(sound: Sound) -> Sound:
    """Convert a sound to the encoder's 16 kHz mono while it is read.

    Args:
        sound: sound with any number of channels and a rate of 1 kHz to ``MAX_SAMPLE_RATE``.

    Returns:
        One channel at 16 kHz, the average of all, or the loudest if they cancel each other; equal
        to ``to_mono_16k`` up to rounding.

    Raises:
        AudioError: if the sample rate is under 1 kHz or above ``MAX_SAMPLE_RATE``.
    """
    _find_ratio(sound.sample_rate, SAMPLE_RATE)  # to raise now, not when the sound is read
    return Resampled(sound=Mono(sound=pick_audible(sound)), sample_rate=SAMPLE_RATE)


def to_mono_16k(waveform: Waveform) -> Tensor:
    """Convert a waveform to the encoder's 16 kHz mono at once.

    Args:
        waveform: waveform with any number of channels and a rate of 1 kHz to ``MAX_SAMPLE_RATE``.

    Returns:
        [S], float32, the average of all channels, or the loudest if they cancel each other;
        ceil(16000 * seconds) samples.

    Raises:
        AudioError: as for ``resample``.
    """
    samples_CS = waveform.samples_CS
    index = find_uncancelled(waveform)
    mono_S = samples_CS.mean(dim=0) if index is None else samples_CS[index]
    return resample(mono_S, waveform.sample_rate, SAMPLE_RATE)


def resample(samples: Tensor, sample_rate: int, wanted_rate: int) -> Tensor:
    """Resample samples to another rate at once.

    Args:
        samples: [..., S].
        sample_rate: sample rate of the samples, Hz.
        wanted_rate: new sample rate, Hz.

    Returns:
        [..., ceil(S * wanted_rate / sample_rate)]; for odd ratios a few samples more or fewer.

    Raises:
        AudioError: if the sample rate is under 1 kHz or above ``MAX_SAMPLE_RATE``.
    """
    return _resample(samples, _find_ratio(sample_rate, wanted_rate))


def _find_ratio(sample_rate: int, wanted_rate: int) -> Fraction:
    # Outside these limits the filter could need gigabytes.
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise AudioError(
            f"got a sample rate of {sample_rate} Hz; speech needs at least {MIN_SAMPLE_RATE} Hz "
            f"and at most {MAX_SAMPLE_RATE}, so give the recording at its true rate"
        )
    return Fraction(sample_rate, wanted_rate).limit_denominator(MAX_RATIO_DENOMINATOR)


def _resample(samples: Tensor, ratio: Fraction) -> Tensor:
    """Apply the filter to samples [..., S] with silence around them, in one strided convolution."""
    if ratio == 1:
        return samples
    period, reach = ratio.numerator, _find_reach(ratio)
    num_samples = samples.shape[-1]
    padded_N1S = F.pad(samples.reshape(-1, 1, num_samples), (reach, reach + period))
    kernel_P1K = _make_kernel(ratio).to(samples)[:, None]
    # One step of the convolution for each period of old samples, one channel for each new sample.
    result_NPT = F.conv1d(padded_N1S, kernel_P1K, stride=period)
    result_NS = result_NPT.transpose(1, 2).flatten(1)[:, : ceil(num_samples / ratio)]
    return result_NS.reshape(*samples.shape[:-1], -1)


def _find_reach(ratio: Fraction) -> int:
    """Return how many old samples the filter covers on each side of a new one, rounded up."""
    return ceil(_ZERO_CROSSINGS / _find_cutoff(ratio))


def _find_cutoff(ratio: Fraction) -> float:
    """Return the cutoff of the filter in units of the Nyquist frequency of the old samples."""
    return _ROLLOFF * min(1, 1 / ratio)


def _make_kernel(ratio: Fraction) -> Tensor:
    """Compute the taps of the filter at the phases of the new samples of one period.

    An ideal low pass at the cutoff c interpolates x to the sum of x[n] c sinc(c (t - n)), with
    times in old samples. A Hann window of ``_ZERO_CROSSINGS`` on each side makes that sum finite.

    Args:
        ratio: old rate by new rate.

    Returns:
        Taps for the old samples from -reach to reach + period, float32 [P, K].

    Source: J. O. Smith, Digital Audio Resampling (bandlimited interpolation); window and constants
        as sinc_interp_hann of torchaudio.functional.resample.
    """
    period, new_period, reach = ratio.numerator, ratio.denominator, _find_reach(ratio)
    # float32 and times in periods round as torchaudio rounds. In float64 results would differ by up
    # to 1e-4 from those on which the embedded models were trained.
    times_K = torch.arange(-reach, reach + period, dtype=torch.float32) / period
    new_times_P = torch.arange(new_period, dtype=torch.float32) / new_period
    crossings_PK = (times_K - new_times_P[:, None]) * (_ROLLOFF * min(period, new_period))
    crossings_PK.clamp_(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window_PK = torch.cos(crossings_PK * pi / _ZERO_CROSSINGS / 2) ** 2
    angles_PK = crossings_PK.mul_(pi)
    sinc_PK = torch.where(angles_PK == 0, 1.0, angles_PK.sin() / angles_PK)
    return sinc_PK.mul_(window_PK.mul_(_find_cutoff(ratio)))
