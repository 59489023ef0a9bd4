"""From a voice to what the encoder hears per video frame.

Goes in: a waveform and an encoder. Comes out: ``Speech``. Separate because it alone decides how
the end of the audio sounds to the model.

Axes: S audio samples, T video frames, L encoder layers, D feature width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AudioError
from ..geometry import SAMPLE_RATE, count_samples
from ..ports import AudioEncoder
from ..types import AudioFeatures, Speech, Waveform
from .io import to_mono_16k
from .loudness import normalize_loudness

SILENCE_TAIL_FRAMES = 25  # one second: longer than any window reaches past the end
TAIL_CONTEXT_FRAMES = 250  # ten seconds of voice tell the encoder what falls silent


def encode_speech(
    waveform: Waveform, encoder: AudioEncoder, *, normalizes_loudness: bool = True
) -> Speech:
    """Hear a voice: one row of features per video frame, and a tail of encoded silence.

    The tail is encoded on its own, as the silence after the last seconds of the audio, so that the
    rows inside the audio are exactly those of the whole audio alone.

    Args:
        waveform: the voice, any rate and channel count; silence is valid.
        encoder: hears 16 kHz mono.
        normalizes_loudness: bring the voice to -23 LUFS first, as InfiniteTalk does.

    Returns:
        floor(25 * seconds) rows and ``SILENCE_TAIL_FRAMES`` more, and the untouched waveform.

    Raises:
        AudioError: the audio is shorter than one video frame.
    """
    num_frames = waveform.num_frames
    if num_frames < 1:
        raise AudioError(
            f"got {1000 * waveform.seconds:.3g} ms of audio; at least one video frame (40 ms) is "
            "needed, so give a longer recording"
        )
    waveform_S = to_mono_16k(waveform)
    if normalizes_loudness:
        waveform_S = normalize_loudness(waveform_S)
    inside_TLD = encoder.encode(waveform_S, num_frames)
    tail_TLD = _encode_silence_after(waveform_S, num_frames, encoder)
    return Speech(
        features=AudioFeatures(
            features_TLD=torch.cat([inside_TLD, tail_TLD]), num_frames=num_frames
        ),
        waveform=waveform,
    )


def _encode_silence_after(waveform_S: Tensor, num_frames: int, encoder: AudioEncoder) -> Tensor:
    start = max(0, num_frames - TAIL_CONTEXT_FRAMES)
    stop = num_frames + SILENCE_TAIL_FRAMES
    context_S = waveform_S[count_samples(start, SAMPLE_RATE) :]
    num_samples = count_samples(stop - start, SAMPLE_RATE)
    padded_S = F.pad(context_S, (0, num_samples - context_S.shape[0]))
    return encoder.encode(padded_S, stop - start)[-SILENCE_TAIL_FRAMES:]
