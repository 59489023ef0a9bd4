"""Mouth curves over video frames, computed from sound by a fixed function.

The renderer draws these curves; ``training.evaluation.mouth`` measures them in pixels.

Axes: S audio samples, T video frames, K samples of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from turbotalk_core.audio.loudness import normalize_loudness
from turbotalk_core.errors import AudioError
from turbotalk_core.geometry import FPS, SAMPLE_RATE

WINDOW_SECONDS = 0.05
FFT_SIZE = 1024
LOW_HZ, SPLIT_HZ, HIGH_HZ = 150.0, 1500.0, 4000.0

# Band energy of speech at -23 LUFS, in dB relative to full scale: pauses with mild room noise are
# below the first value, the middle of a stressed vowel is near the second.
CLOSED_DB, OPEN_DB = -40.0, -16.0
# Energy above SPLIT_HZ relative to the energy below it, in dB: 'oo' is near the first value, 'ee'
# and 's' are above the second.
ROUND_DB, WIDE_DB = -28.0, -3.0

# Colour of an open mouth, red-green-blue in [0, 1]. No other colour of the set has a green value
# clearly below both red and blue, so mouth pixels can be recognised by it.
MOUTH_COLOUR = (0.42, 0.0, 0.30)


@dataclass(frozen=True, slots=True, kw_only=True)
class MouthCurve:
    """Mouth shape in each video frame.

    Attributes:
        opening_T: 0 closed to 1 fully open.
        width_T: 0 narrow to 1 wide; 0.5 is neutral and the value of a closed mouth.
        rounding_T: 0 spread to 1 round lips; 1 - width.
    """

    opening_T: Tensor
    width_T: Tensor
    rounding_T: Tensor

    @property
    def aperture_T(self) -> Tensor:
        """Drawn open area as a fraction of the largest: opening times relative width."""
        return self.opening_T * (0.65 + 0.35 * self.width_T)

    def select(self, start: int, stop: int) -> MouthCurve:
        """Return the frames `[start, stop)`."""
        return replace(
            self,
            opening_T=self.opening_T[start:stop],
            width_T=self.width_T[start:stop],
            rounding_T=self.rounding_T[start:stop],
        )


def _smooth(curve_T: Tensor, passes: int) -> Tensor:
    """Smooth with the binomial kernel [1/4, 1/2, 1/4], edges repeated."""
    for _ in range(passes):
        padded = functional.pad(curve_T[None, None], (1, 1), mode="replicate")[0, 0]
        curve_T = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
    return curve_T


def mouth_curve(
    waveform_S: Tensor, sample_rate: int = SAMPLE_RATE, num_frames: int | None = None
) -> MouthCurve:
    """Compute the mouth curve of a sound.

    The sound is brought to -23 LUFS. For frame `i` a Hann window of 50 ms centred on `i / 25` s
    gives the energy between 150 and 4000 Hz in dB. The opening is this energy, mapped linearly from
    CLOSED_DB..OPEN_DB to 0..1 and smoothed by [1/4, 1/2, 1/4]. The width is the energy above 1500
    Hz relative to that below, in dB, mapped from ROUND_DB..WIDE_DB to 0..1: spread vowels and
    fricatives have more high frequencies than rounded vowels. It goes to 0.5 as the mouth closes
    and is smoothed twice.

    Args:
        waveform_S: mono sound in [-1, 1].
        sample_rate: Hz, at least 8000.
        num_frames: number of video frames; None for the whole frames that the sound covers. Frames
            past the end of the sound have silence.

    Returns:
        Curves of `num_frames` values.

    Raises:
        AudioError: if the sound is not mono, its rate is below 8000 Hz, or it is shorter than one
            frame.
    """
    if waveform_S.ndim != 1:
        raise AudioError(f"the sound must be mono [S], got a tensor {tuple(waveform_S.shape)}")
    if sample_rate < 2 * HIGH_HZ:
        raise AudioError(f"got a sample rate of {sample_rate} Hz; it must be at least 8000")
    count = FPS * waveform_S.shape[0] // sample_rate if num_frames is None else num_frames
    if count < 1:
        raise AudioError("the sound is shorter than one video frame; give at least 40 ms")
    windows_TK = _take_windows(normalize_loudness(waveform_S, sample_rate), sample_rate, count)
    low_T = _band_power(windows_TK, sample_rate, LOW_HZ, SPLIT_HZ)
    high_T = _band_power(windows_TK, sample_rate, SPLIT_HZ, HIGH_HZ)
    floor = 1e-9
    level_T = 10 * torch.log10(low_T + high_T + floor)
    opening_T = _smooth(((level_T - CLOSED_DB) / (OPEN_DB - CLOSED_DB)).clamp(0, 1), 1)
    tilt_T = 10 * torch.log10((high_T + floor) / (low_T + floor))
    spread_T = ((tilt_T - ROUND_DB) / (WIDE_DB - ROUND_DB)).clamp(0, 1)
    # A nearly closed mouth has no shape of its own: the spectrum is then that of the room.
    certainty_T = (4 * opening_T).clamp(0, 1)
    width_T = _smooth(0.5 + certainty_T * (spread_T - 0.5), 2)
    return MouthCurve(opening_T=opening_T, width_T=width_T, rounding_T=1 - width_T)


def _take_windows(waveform_S: Tensor, sample_rate: int, num_frames: int) -> Tensor:
    """Return Hann windows of unit power centred on the frame times, `[T, K]`."""
    size = round(WINDOW_SECONDS * sample_rate)
    centres_T = (torch.arange(num_frames) * sample_rate / FPS).round().long()
    needed = int(centres_T[-1]) + size
    padded_S = functional.pad(waveform_S.float(), (size // 2, max(0, needed - waveform_S.shape[0])))
    hann_K = torch.hann_window(size, periodic=False)
    return padded_S[centres_T[:, None] + torch.arange(size)] * (hann_K / hann_K.norm())


def _band_power(windows_TK: Tensor, sample_rate: int, low: float, high: float) -> Tensor:
    """Compute the mean square of the part of each window between two frequencies."""
    size = max(FFT_SIZE, windows_TK.shape[1])
    spectrum = torch.fft.rfft(windows_TK, n=size)
    hertz = torch.fft.rfftfreq(size, 1 / sample_rate)
    inside = (hertz >= low) & (hertz < high)
    return 2 * spectrum[:, inside].abs().square().sum(1) / size
