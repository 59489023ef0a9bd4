"""Encoding of the voices of several speakers, or of one, and mixing of the sound of the video.

Input: speakers and an encoder. Output: ``Conversation``. Separate because only this module
places voices in time; ``features`` encodes one voice.

Axes: C channels, S audio samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AudioError
from ..fingerprints import digest_text
from ..geometry import SAMPLE_RATE
from ..protocols import AudioEncoder
from ..request import EncodeMode
from ..sound import BLOCK_SAMPLES, Note, Sound, SoundReader, Span, log_note
from ..types import Conversation, FeatureRows, Speaker, Speech, Waveform
from .features import (
    describe_encoding,
    encode_in_sections,
    encode_whole,
    encodes_whole,
    to_encoder_input,
)
from .io import to_waveform
from .resample import Resampled, pick_audible

LONE_SPEAKER = "the speaker"  # name of a single speaker
_SILENCE = Waveform(samples_CS=torch.zeros(1, 1), sample_rate=SAMPLE_RATE)


def encode_conversation(
    speakers: Sequence[Speaker],
    encoder: AudioEncoder,
    *,
    normalizes_loudness: bool = True,
    hearing: EncodeMode = "auto",
    mix: Sound | None = None,
    on_note: Note = log_note,
) -> Conversation:
    """Encode each speaker's voice over the whole conversation, silences included.

    Silence is added to the sound before it is encoded, so that it is encoded as silence. Loudness
    is measured before that, on the voice alone.

    Args:
        speakers: speakers in the order of their turns.
        encoder: encoder of 16 kHz mono.
        normalizes_loudness: whether to bring each voice to -23 LUFS first, as InfiniteTalk does.
        hearing: encode mode, at once or in sections; see ``features.encodes_whole``.
        mix: result of ``mix_voices`` for these speakers, if the caller has it already; it measures
            its peaks only once.
        on_note: called with a note about each voice whose channels cancel each other.

    Returns:
        One speech per speaker, each until the last speaker has ended, and the mix.

    Raises:
        AudioError: if no speaker has a voice, or the conversation is shorter than one video frame.
        RequestError: if hearing is none of ``request.ENCODE_MODES``.

    Source: InfiniteTalk, generate_infinitetalk.py, audio_prepare_multi: "para" is nobody following,
        "add" everybody.
    """
    starts, end = _find_turns(speakers)
    sounds = [speaker.waveform or _SILENCE for speaker in speakers]
    audible = [
        _pick_audible(speaker.name, sound, on_note)
        for speaker, sound in zip(speakers, sounds, strict=True)
    ]
    features: list[FeatureRows]
    encodes_at_once = encodes_whole(end, hearing)
    if encodes_at_once:
        waveforms = [
            _pad_silence(
                to_encoder_input(to_waveform(sound), normalizes_loudness), start * SAMPLE_RATE
            )
            for sound, start in zip(audible, starts, strict=True)
        ]
        longest = max(waveform_S.shape[0] for waveform_S in waveforms)
        # Equally long to the sample: the encoder spreads its rows over all samples.
        features = [
            encode_whole(_pad_silence(waveform_S, 0, longest), end, encoder)
            for waveform_S in waveforms
        ]
    else:
        features = [
            encode_in_sections(sound, start, end, encoder, normalizes_loudness=normalizes_loudness)
            for sound, start in zip(audible, starts, strict=True)
        ]
    encoding = describe_encoding(encoder, encodes_at_once, normalizes_loudness)
    speeches = tuple(
        Speech(
            features=rows,
            waveform=_pad_sound(sound, start, end),
            # Loudness is measured without the silence around a voice, so the features also depend
            # on the position of the voice in its waveform. A single voice fills its waveform.
            origin=digest_text(
                (
                    f"{encoding}, {sound.num_samples} samples from {start} s on"
                    if len(speakers) > 1
                    else encoding
                )
                + ("" if heard is sound else ", the loudest channel alone")
            ),
        )
        for rows, sound, heard, start in zip(features, sounds, audible, starts, strict=True)
    )
    if mix is None:
        mix = mix_voices(speakers)
    return Conversation(speakers=tuple(speakers), speeches=speeches, waveform=mix)


def encode_speech(
    waveform: Sound,
    encoder: AudioEncoder,
    *,
    normalizes_loudness: bool = True,
    hearing: EncodeMode = "auto",
) -> Speech:
    """Encode one voice from its first sample to its last.

    Args:
        waveform: the voice, any rate, channel count and length; silence is valid.
        encoder: of 16 kHz mono.
        normalizes_loudness: whether to bring the voice to -23 LUFS first, as InfiniteTalk does.
        hearing: encode mode, at once, as InfiniteTalk does, or in sections; see
            ``features.encodes_whole``.

    Returns:
        The speech of the only speaker of ``encode_conversation``, with the untouched waveform.

    Raises:
        AudioError: if the audio is shorter than one video frame.
        RequestError: if hearing is none of ``request.ENCODE_MODES``.
    """
    speaker = Speaker(name=LONE_SPEAKER, waveform=waveform)
    (speech,) = encode_conversation(
        [speaker], encoder, normalizes_loudness=normalizes_loudness, hearing=hearing
    ).speeches
    return speech


def mix_voices(speakers: Sequence[Speaker]) -> Sound:
    """Mix all voices, each in its turn and as loud as it was recorded.

    Args:
        speakers: speakers in the order of their turns.

    Returns:
        The sound of the video, in the highest of their sample rates and channel counts (one channel
        goes to all, several to the first), scaled down as a whole if their sum exceeds full scale.
        A single voice is unchanged. Several are mixed whenever the mix is read, and once before
        that, to measure its peak.

    Raises:
        AudioError: if no speaker has a voice.
    """
    starts, end = _find_turns(speakers)
    voices = [
        _pad_sound(speaker.waveform, start, end)
        for speaker, start in zip(speakers, starts, strict=True)
        if speaker.waveform is not None
    ]
    if len(voices) == 1:
        return voices[0]
    rate = max(voice.sample_rate for voice in voices)
    return _Mix(sounds=tuple(Resampled(sound=voice, sample_rate=rate) for voice in voices))


@dataclass(frozen=True, kw_only=True)
class _Mix:
    """Sounds of one sample rate, added while they are read; a ``Sound``.

    Attributes:
        sounds: two or more sounds, which all begin at the start.
    """

    sounds: tuple[Sound, ...]

    @property
    def sample_rate(self) -> int:
        return self.sounds[0].sample_rate

    @property
    def num_channels(self) -> int:
        return max(sound.num_channels for sound in self.sounds)

    @property
    def num_samples(self) -> int:
        return max(sound.num_samples for sound in self.sounds)

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        limit, peak = self._peaks
        for *_, mix_CS in self._read(start):
            yield mix_CS * limit / peak if peak > limit else mix_CS

    @cached_property
    def _peaks(self) -> tuple[float, float]:
        """Largest allowed peak of the mix, and its peak without scaling."""
        limit, peak = 1.0, 0.0
        for *parts, mix_CS in self._read():
            # Decoded lossy formats may exceed 1 slightly; the mix may then, too.
            limit = max(limit, *(_find_peak(part_CS) for part_CS in parts))
            peak = max(peak, _find_peak(mix_CS))
        return limit, peak

    def _read(self, start: int = 0) -> Iterator[list[Tensor]]:
        """Yield blocks: one of each sound, followed by one of their sum."""
        readers = [SoundReader(sound) for sound in self.sounds]
        for begin in range(start, self.num_samples, BLOCK_SAMPLES):
            stop = min(begin + BLOCK_SAMPLES, self.num_samples)
            parts = [reader.read(begin, stop) for reader in readers]
            mix_CS = torch.zeros(self.num_channels, stop - begin)
            for part_CS in parts:
                num_filled = self.num_channels if part_CS.shape[0] == 1 else part_CS.shape[0]
                mix_CS[:num_filled] += part_CS
            yield [*parts, mix_CS]


def _pick_audible(name: str, sound: Sound, on_note: Note) -> Sound:
    audible = pick_audible(sound)
    if audible is not sound:
        on_note(
            f"the channels of the voice of {name} are in opposite phase and cancel each other in "
            "mono: its loudest channel alone is encoded"
        )
    return audible


def _find_peak(samples_CS: Tensor) -> float:
    return samples_CS.abs().max().item()


def _find_turns(speakers: Sequence[Speaker]) -> tuple[list[Fraction], Fraction]:
    """Return the start of each speaker's voice and the end of the last, in seconds."""
    starts, ends = [], [Fraction(0)]
    for speaker in speakers:
        speaks_later = speaker.follows and speaker.waveform is not None
        starts.append(ends[-1] if speaks_later else Fraction(0))
        if speaker.waveform is not None:
            seconds = Fraction(speaker.waveform.num_samples, speaker.waveform.sample_rate)
            ends.append(starts[-1] + seconds)
    if len(ends) == 1:
        raise AudioError(
            f"got {len(speakers)} speakers of whom none has a voice; give at least one a recording"
        )
    return starts, max(ends)


def _pad_silence(samples: Tensor, start: Fraction | int, length: int = 0) -> Tensor:
    """Add silence before samples [..., S], and after them up to a length."""
    before = round(start)
    return F.pad(samples, (before, max(0, length - before - samples.shape[-1])))


def _pad_sound(sound: Sound, start: Fraction, end: Fraction) -> Sound:
    """Add silence before a sound up to its start and after it up to the end, in seconds."""
    before = round(start * sound.sample_rate)
    num_samples = max(before + sound.num_samples, ceil(end * sound.sample_rate))
    if (before, num_samples) == (0, sound.num_samples):
        return sound
    return Span(sound=sound, start=-before, num_samples=num_samples)
