"""From a voice to what the encoder hears per video frame.

Goes in: a waveform and an encoder. Comes out: ``Speech``. Separate because it alone decides how
the end of the audio sounds to the model.

Axes: S audio samples, T video frames, L encoder layers, D feature width.
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AudioError
from ..geometry import SAMPLE_RATE, count_frames, count_samples
from ..ports import AudioEncoder
from ..sound import Sound
from ..types import AudioFeatures, Speech, Waveform
from .io import to_waveform
from .loudness import normalize_loudness
from .resample import to_mono_16k

SILENCE_TAIL_FRAMES = 25  # one second: longer than any window reaches past the end
TAIL_CONTEXT_FRAMES = 250  # ten seconds of voice tell the encoder what falls silent


def encode_speech(
    waveform: Sound, encoder: AudioEncoder, *, normalizes_loudness: bool = True
) -> Speech:
    """Hear a voice from its first sample to its last.

    Args:
        waveform: the voice, any rate and channel count; silence is valid.
        encoder: hears 16 kHz mono.
        normalizes_loudness: bring the voice to -23 LUFS first, as InfiniteTalk does.

    Returns:
        The features of ``hear``, and the untouched waveform.

    Raises:
        AudioError: the audio is shorter than one video frame.
    """
    seconds = Fraction(waveform.num_samples, waveform.sample_rate)
    waveform_S = to_encoder_input(to_waveform(waveform), normalizes_loudness)
    return Speech(features=hear(waveform_S, seconds, encoder), waveform=waveform)


def to_encoder_input(waveform: Waveform, normalizes_loudness: bool) -> Tensor:
    """Bring a voice to the encoder's sample rate and, where asked, to -23 LUFS.

    Args:
        waveform: the voice, any rate from 1 kHz on and any channel count.
        normalizes_loudness: whether to change its level.

    Returns:
        16 kHz mono, [S].
    """
    waveform_S = to_mono_16k(waveform)
    return normalize_loudness(waveform_S) if normalizes_loudness else waveform_S


def hear(waveform_S: Tensor, seconds: Fraction, encoder: AudioEncoder) -> AudioFeatures:
    """Encode sound: one row of features per video frame, and a tail of encoded silence.

    The tail is encoded on its own, as the silence after the last seconds of the audio, so that the
    rows inside the audio are exactly those of the whole audio alone.

    Args:
        waveform_S: 16 kHz mono.
        seconds: length of the sound before it was resampled, which may round.
        encoder: hears 16 kHz mono.

    Returns:
        floor(25 * seconds) rows and ``SILENCE_TAIL_FRAMES`` more.

    Raises:
        AudioError: the sound is shorter than one video frame.
    """
    num_frames = count_frames(seconds.numerator, seconds.denominator)
    if num_frames < 1:
        raise AudioError(
            f"got {1000 * float(seconds):.3g} ms of audio; at least one video frame (40 ms) is "
            "needed, so give a longer recording"
        )
    inside_TLD = encoder.encode(waveform_S, num_frames)
    tail_TLD = _encode_silence_after(waveform_S, num_frames, encoder)
    return AudioFeatures(features_TLD=torch.cat([inside_TLD, tail_TLD]), num_frames=num_frames)


def _encode_silence_after(waveform_S: Tensor, num_frames: int, encoder: AudioEncoder) -> Tensor:
    start = max(0, num_frames - TAIL_CONTEXT_FRAMES)
    stop = num_frames + SILENCE_TAIL_FRAMES
    context_S = waveform_S[count_samples(start, SAMPLE_RATE) :]
    num_samples = count_samples(stop - start, SAMPLE_RATE)
    padded_S = F.pad(context_S, (0, num_samples - context_S.shape[0]))
    return encoder.encode(padded_S, stop - start)[-SILENCE_TAIL_FRAMES:]
