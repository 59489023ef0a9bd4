"""Encoding of a voice to audio features, one row per video frame.

Input: a sound of any length and an encoder. Output: ``FeatureRows``. Separate because it alone
decides how much sound is encoded at once, and how the silence after the end is encoded.

Axes: S audio samples, T video frames, L encoder layers, D feature width.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AudioError, RequestError
from ..geometry import FPS, SAMPLE_RATE, count_frames, count_samples
from ..protocols import AudioEncoder
from ..request import ENCODE_MODES, EncodeMode
from ..sound import Sound, SoundReader, Span
from ..types import AudioFeatures, SoundMoments, Waveform
from .loudness import TARGET_LUFS, LoudnessMeter, find_gain, normalize_loudness
from .normalization import RunningStats
from .resample import read_mono_16k, to_mono_16k

SILENCE_TAIL_FRAMES = 25  # one second: longer than any window reaches past the end
TAIL_CONTEXT_FRAMES = 250  # ten seconds of voice, encoded with the silence after it

# docs/numerics.md, "Long sounds", contains the measurements for these three.
MOST_WHOLE_FRAMES = 5 * 60 * FPS  # five minutes; wav2vec2-base takes 5 GB for that
SECTION_FRAMES = 1_000  # 40 seconds
CONTEXT_FRAMES = 250  # 10 seconds on each side
_KEPT_SECTIONS = 2  # a chunk may overlap two sections


def encodes_whole(seconds: Fraction, hearing: EncodeMode) -> bool:
    """Return whether a sound is encoded at once.

    Args:
        seconds: length of the sound.
        hearing: the encode mode; auto is whole up to ``MOST_WHOLE_FRAMES``.

    Returns:
        True for at once, in memory proportional to the length; False for in sections.

    Raises:
        RequestError: if the mode is none of ``request.ENCODE_MODES``.
    """
    if hearing not in ENCODE_MODES:
        raise RequestError(f"got hearing {hearing!r}; choose one of {', '.join(ENCODE_MODES)}")
    return hearing == "whole" or (hearing == "auto" and seconds * FPS <= MOST_WHOLE_FRAMES)


def describe_encoding(
    encoder: AudioEncoder, encodes_at_once: bool, normalizes_loudness: bool
) -> str:
    """Describe all settings that determine the features of a sound besides the sound itself.

    Args:
        encoder: the audio encoder.
        encodes_at_once: whether the sound is encoded at once; else in sections.
        normalizes_loudness: whether the voice is brought to -23 LUFS first.

    Returns:
        A phrase; ``Speech.origin`` is its digest.
    """
    how = (
        "whole"
        if encodes_at_once
        else f"in sections of {SECTION_FRAMES} and {CONTEXT_FRAMES} around"
    )
    loudness = f"at {TARGET_LUFS:g} LUFS" if normalizes_loudness else "as loud as it is"
    return f"{how}, {loudness}, by {encoder.fingerprint()}"


def to_encoder_input(waveform: Waveform, normalizes_loudness: bool) -> Tensor:
    """Bring a voice to the encoder's sample rate and, if requested, to -23 LUFS.

    Args:
        waveform: the voice, any rate from 1 kHz on and any channel count.
        normalizes_loudness: whether to change its level.

    Returns:
        16 kHz mono, [S].
    """
    waveform_S = to_mono_16k(waveform)
    return normalize_loudness(waveform_S) if normalizes_loudness else waveform_S


def encode_whole(waveform_S: Tensor, seconds: Fraction, encoder: AudioEncoder) -> AudioFeatures:
    """Encode a sound at once: one row of features per video frame, and a tail of encoded silence.

    The tail is encoded on its own, as the silence after the last seconds of the audio, so that the
    rows inside the audio are exactly those of the whole audio alone.

    Args:
        waveform_S: 16 kHz mono.
        seconds: exact length of the sound; resampling may have rounded that of ``waveform_S``.
        encoder: encoder of 16 kHz mono.

    Returns:
        floor(25 * seconds) rows and ``SILENCE_TAIL_FRAMES`` more.

    Raises:
        AudioError: if the sound is shorter than one video frame.
    """
    num_frames = _count_frames(seconds)
    inside_TLD = encoder.encode(waveform_S, num_frames)
    tail_TLD = _encode_silence_after(waveform_S, num_frames, encoder)
    return AudioFeatures(features_TLD=torch.cat([inside_TLD, tail_TLD]), num_frames=num_frames)


def encode_in_sections(
    sound: Sound,
    start: Fraction,
    end: Fraction,
    encoder: AudioEncoder,
    *,
    normalizes_loudness: bool = True,
    section_frames: int = SECTION_FRAMES,
    context_frames: int = CONTEXT_FRAMES,
) -> SectionFeatures:
    """Prepare to encode a sound of any length, section by section; few are in memory at a time.

    The sound is read once here, for its loudness and its normalization statistics, and once more
    when the rows are read.

    Args:
        sound: the voice.
        start: seconds of silence before the voice.
        end: length of the result in seconds; silence follows a voice that ends earlier.
        encoder: encoder of 16 kHz mono.
        normalizes_loudness: whether to bring the voice to -23 LUFS.
        section_frames: length of a section, video frames.
        context_frames: frames that are encoded with it on each side; with fewer than
            ``TAIL_CONTEXT_FRAMES`` the end of the sound is read twice.

    Returns:
        As many rows as ``encode_whole`` returns for the same sound.

    Raises:
        AudioError: if the result would be shorter than one video frame.
    """
    num_frames = _count_frames(end)
    mono = read_mono_16k(sound)
    loudness = LoudnessMeter()
    moments = None if encoder.first_kernel is None else RunningStats(*encoder.first_kernel)
    for block_CS in mono.blocks():
        if normalizes_loudness:
            loudness.add(block_CS[0])
        if moments is not None:
            moments.add(block_CS[0])
    gain = find_gain(loudness.measure()) or 1.0
    num_samples = ceil(end * SAMPLE_RATE)
    return SectionFeatures(
        Span(sound=mono, start=-round(start * SAMPLE_RATE), num_samples=num_samples),
        num_frames,
        encoder,
        gain=gain,
        moments=None if moments is None else moments.measure(num_samples, gain),
        section_frames=section_frames,
        context_frames=context_frames,
    )


class SectionFeatures:
    """Features of a sound of any length, encoded on access; ``FeatureRows``.

    Sections begin at multiples of their length, counted from the start of the sound. Each is
    encoded with the sound around it and normalised with the statistics of the whole sound. So a
    row depends on its number alone, not on the order of access. Rows of the last two sections are
    kept; access to earlier ones reads the sound again.
    """

    def __init__(
        self,
        sound: Sound,
        num_frames: int,
        encoder: AudioEncoder,
        *,
        gain: float,
        moments: SoundMoments | None,
        section_frames: int,
        context_frames: int,
    ) -> None:
        """Store the sound and the settings; see ``encode_in_sections``.

        Args:
            sound: 16 kHz mono.
            num_frames: video frames that it covers.
            encoder: the audio encoder.
            gain: factor on the samples before they are encoded.
            moments: statistics of the sound with its gain.
            section_frames: length of a section.
            context_frames: frames that are encoded with it on each side.
        """
        self.num_frames = num_frames
        self._section, self._context = section_frames, context_frames
        self._reader = SoundReader(sound)
        self._encoder = encoder
        self._gain = gain
        self._moments = moments
        self._kept: dict[int, Tensor] = {}

    @property
    def num_rows(self) -> int:
        """Number of rows, those of silence included."""
        return self.num_frames + SILENCE_TAIL_FRAMES

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows [start, stop), encoding those that are not kept; see ``FeatureRows``."""
        stop = self.num_rows if stop is None else min(stop, self.num_rows)
        parts = []
        while start < stop:
            # The tail counts as a section of its own.
            is_tail = start >= self.num_frames
            begin = self.num_frames if is_tail else start // self._section * self._section
            parts.append(self._load_section(begin)[start - begin : stop - begin])
            start += parts[-1].shape[0]
        return torch.cat(parts)

    def _load_section(self, begin: int) -> Tensor:
        if begin not in self._kept:
            if len(self._kept) == _KEPT_SECTIONS:
                del self._kept[next(iter(self._kept))]
            self._kept[begin] = self._encode(begin)
        return self._kept[begin]

    def _encode(self, begin: int) -> Tensor:
        if begin == self.num_frames:
            end, start, stop = self.num_rows, begin - TAIL_CONTEXT_FRAMES, self.num_rows
        else:
            end = min(begin + self._section, self.num_frames)
            start, stop = begin - self._context, min(end + self._context, self.num_frames)
        start = max(0, start)
        samples_CS = self._reader.read(
            *(count_samples(edge, SAMPLE_RATE) for edge in (start, stop))
        )
        rows_TLD = self._encoder.encode(samples_CS[0] * self._gain, stop - start, self._moments)
        return rows_TLD[begin - start : end - start]


def _count_frames(seconds: Fraction) -> int:
    num_frames = count_frames(seconds.numerator, seconds.denominator)
    if num_frames < 1:
        raise AudioError(
            f"got {1000 * float(seconds):.3g} ms of audio; at least one video frame (40 ms) is "
            "needed, so give a longer recording"
        )
    return num_frames


def _encode_silence_after(waveform_S: Tensor, num_frames: int, encoder: AudioEncoder) -> Tensor:
    start = max(0, num_frames - TAIL_CONTEXT_FRAMES)
    stop = num_frames + SILENCE_TAIL_FRAMES
    context_S = waveform_S[count_samples(start, SAMPLE_RATE) :]
    num_samples = count_samples(stop - start, SAMPLE_RATE)
    padded_S = F.pad(context_S, (0, num_samples - context_S.shape[0]))
    return encoder.encode(padded_S, stop - start)[-SILENCE_TAIL_FRAMES:]
