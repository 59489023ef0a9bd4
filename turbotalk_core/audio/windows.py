"""The audio neighbourhood of each latent frame of a chunk.

Goes in: the features of a whole clip and a chunk of it. Comes out: the windows that the audio
adapter reads. Separate because it is pure index arithmetic, shared by training and inference.

Axes: K window length, T video frames, F latent frames, L encoder layers, D feature width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ChunkError
from ..geometry import TEMPORAL_STRIDE, count_latent_frames
from ..types import AudioFeatures, AudioWindows, Chunk

RADIUS = 2  # video frames on each side; InfiniteTalk, audio_window = 5
FIRST_WINDOW = 2 * RADIUS + 1  # a chunk's first latent frame covers one video frame
LATER_WINDOW = TEMPORAL_STRIDE + 2 * RADIUS  # each later one covers TEMPORAL_STRIDE


def take_windows(features: AudioFeatures, chunk: Chunk) -> AudioWindows:
    """Gather for each latent frame of a chunk the features of its video frames and neighbours.

    Video frames before the clip's first row or after its last repeat that row. Later latent frame
    j covers the video frames 4j - 3 ... 4j of the chunk, so with its neighbours 4j - 5 ... 4j + 2.

    Args:
        features: one row per video frame of the whole clip.
        chunk: frames to cover.

    Returns:
        Windows of the same dtype and device as the features.

    Raises:
        ChunkError: the chunk starts before the first row or after the last.

    Source: InfiniteTalk, wan/multitalk.py (window gather) and wan/modules/multitalk_model.py
    (regrouping for the first and the later latent frames).
    """
    num_rows = features.features_TLD.shape[0]
    if not 0 <= chunk.start < num_rows:
        raise ChunkError(
            f"chunk {chunk.index} starts at frame {chunk.start}; the audio has rows for frames 0 "
            f"to {num_rows - 1}, so plan the chunks from the audio's own length"
        )
    first_K, later_FK = _window_indices(chunk)
    return AudioWindows(
        first_KLD=features.features_TLD[first_K.clamp(0, num_rows - 1)],
        later_FKLD=features.features_TLD[later_FK.clamp(0, num_rows - 1)],
    )


def hold_last_row(features: AudioFeatures, stop: int) -> AudioFeatures:
    """Repeat the last row of a voice that ends early, as far as another voice goes on.

    Args:
        features: of one speaker.
        stop: rows wanted at least.

    Returns:
        The features, with at least ``stop`` rows.
    """
    missing = stop - features.features_TLD.shape[0]
    if missing <= 0:
        return features
    held_TLD = features.features_TLD[-1:].expand(missing, -1, -1)
    return replace(features, features_TLD=torch.cat((features.features_TLD, held_TLD)))


def mirror_end(features: AudioFeatures, stop: int) -> AudioFeatures:
    """Let a voice run backwards from its end, as the reference does in its last chunk.

    Args:
        features: of one speaker; rows after the voice are dropped.
        stop: end of the last chunk, in video frames.

    Returns:
        Rows of the voice, and where it ends before ``stop``, its last rows in reverse, three more
        than are missing.

    Source: InfiniteTalk, wan/multitalk.py, the end of the chunk loop in generate_infinitetalk.
    """
    voice_TLD = features.features_TLD[: features.num_frames]
    if stop >= features.num_frames:
        missing = stop - features.num_frames + 3
        voice_TLD = torch.cat((voice_TLD, voice_TLD[-missing:].flip(0)))
    return replace(features, features_TLD=voice_TLD)


def null_windows(features: AudioFeatures, chunk: Chunk) -> AudioWindows:
    """Make the windows that stand for no audio at all: zeros.

    Args:
        features: gives layers, width, dtype and device.
        chunk: gives the number of windows.

    Returns:
        Zeros, shaped as ``take_windows`` returns them.

    Source: InfiniteTalk, wan/multitalk.py (the null audio of audio guidance).
    """
    num_layers_width = features.features_TLD.shape[1:]
    num_later = count_latent_frames(chunk.num_frames) - 1
    return AudioWindows(
        first_KLD=features.features_TLD.new_zeros(FIRST_WINDOW, *num_layers_width),
        later_FKLD=features.features_TLD.new_zeros(num_later, LATER_WINDOW, *num_layers_width),
    )


def _window_indices(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Number the video frames of each window, before clamping: [5] and [F - 1, 8]."""
    first_K = chunk.start - RADIUS + torch.arange(FIRST_WINDOW)
    # The chunk's frame 1 is the first that the first later latent frame covers.
    later_starts_F = torch.arange(1, chunk.num_frames, TEMPORAL_STRIDE)
    later_FK = chunk.start + later_starts_F[:, None] - RADIUS + torch.arange(LATER_WINDOW)
    return first_K, later_FK
