"""From several voices, or one, to what the encoder hears of each and the sound of the video.

Goes in: speakers and an encoder. Comes out: ``Conversation``. Separate because it alone knows who
speaks when; how one voice is heard stands in features.

Axes: C channels, S audio samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AudioError
from ..geometry import SAMPLE_RATE
from ..ports import AudioEncoder
from ..types import Conversation, Speaker, Speech, Waveform
from .features import hear, to_encoder_input
from .io import resample

_SILENCE = Waveform(samples_CS=torch.zeros(1, 1), sample_rate=SAMPLE_RATE)


def encode_conversation(
    speakers: Sequence[Speaker], encoder: AudioEncoder, *, normalizes_loudness: bool = True
) -> Conversation:
    """Hear each speaker through the whole conversation, silences included.

    Silence is added to the sound before the encoder hears it, so that it is encoded as silence.
    Loudness is measured before, on the voice alone. A lone speaker is heard as by
    ``encode_speech``.

    Args:
        speakers: in the order in which they follow each other.
        encoder: hears 16 kHz mono.
        normalizes_loudness: bring each voice to -23 LUFS before it is heard, as InfiniteTalk does.

    Returns:
        One speech per speaker, as long as until the last has ended, and the mix of
        ``mix_voices``.

    Raises:
        AudioError: nobody has a voice, or all together is shorter than one video frame.

    Source: InfiniteTalk, generate_infinitetalk.py, audio_prepare_multi: "para" is nobody following,
        "add" everybody.
    """
    starts, end = _take_turns(speakers)
    heard = [
        torch.zeros(1)
        if speaker.waveform is None
        else _lay(to_encoder_input(speaker.waveform, normalizes_loudness), start * SAMPLE_RATE)
        for speaker, start in zip(speakers, starts, strict=True)
    ]
    longest = max(waveform_S.shape[0] for waveform_S in heard)
    speeches = [
        Speech(
            # Equally long to the sample: the encoder spreads its rows over all that it is given.
            features=hear(_lay(waveform_S, 0, longest), end, encoder),
            waveform=_span(speaker.waveform or _SILENCE, start, end),
        )
        for speaker, waveform_S, start in zip(speakers, heard, starts, strict=True)
    ]
    return Conversation(
        speakers=tuple(speakers), speeches=tuple(speeches), waveform=mix_voices(speakers)
    )


def mix_voices(speakers: Sequence[Speaker]) -> Waveform:
    """Let all voices sound as they follow each other, each as loud as it was recorded.

    Args:
        speakers: in the order in which they follow each other.

    Returns:
        The sound of the video, in the highest of their sample rates and channel counts (one channel
        goes to all, several to the first), scaled down as a whole where together they exceed full
        scale. A lone voice is not touched.

    Raises:
        AudioError: nobody has a voice.
    """
    starts, end = _take_turns(speakers)
    voices = [
        _span(speaker.waveform, start, end)
        for speaker, start in zip(speakers, starts, strict=True)
        if speaker.waveform is not None
    ]
    rate = max(voice.sample_rate for voice in voices)
    num_channels = max(voice.samples_CS.shape[0] for voice in voices)
    sounds = [resample(voice.samples_CS, voice.sample_rate, rate) for voice in voices]
    mix_CS = torch.zeros(num_channels, max(sound_CS.shape[1] for sound_CS in sounds))
    for sound_CS in sounds:
        num_filled = num_channels if sound_CS.shape[0] == 1 else sound_CS.shape[0]
        mix_CS[:num_filled, : sound_CS.shape[1]] += sound_CS
    # Peaks of lossy formats may exceed 1 slightly, which is not the mix's doing.
    limit = max(1.0, *(sound_CS.abs().max().item() for sound_CS in sounds))
    peak = mix_CS.abs().max().item()
    return Waveform(samples_CS=mix_CS * limit / peak if peak > limit else mix_CS, sample_rate=rate)


def _take_turns(speakers: Sequence[Speaker]) -> tuple[list[Fraction], Fraction]:
    """Find when each speaker begins and when all have ended, in seconds."""
    starts, ends = [], [Fraction(0)]
    for speaker in speakers:
        start = ends[-1] if speaker.follows else Fraction(0)
        starts.append(start)
        if speaker.waveform is not None:
            seconds = Fraction(speaker.waveform.samples_CS.shape[1], speaker.waveform.sample_rate)
            ends.append(start + seconds)
    if len(ends) == 1:
        raise AudioError(
            f"got {len(speakers)} speakers of whom none has a voice; give at least one a recording"
        )
    return starts, max(ends)


def _lay(samples: Tensor, start: Fraction | int, length: int = 0) -> Tensor:
    """Put silence before samples [..., S], and behind them up to a length."""
    before = round(start)
    return F.pad(samples, (before, max(0, length - before - samples.shape[-1])))


def _span(waveform: Waveform, start: Fraction, end: Fraction) -> Waveform:
    """Let a sound begin at a time and last to the end, in seconds."""
    rate = waveform.sample_rate
    samples_CS = _lay(waveform.samples_CS, start * rate, math.ceil(end * rate))
    return replace(waveform, samples_CS=samples_CS)
