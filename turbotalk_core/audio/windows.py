"""The audio neighbourhood of each latent frame of a chunk.

Goes in: the features of a whole clip and a chunk of it. Comes out: the windows that the audio
adapter reads. Separate because it is pure index arithmetic, shared by training and inference. Of
the features no more rows are asked for than a chunk needs.

Axes: K window length, T video frames, F latent frames, L encoder layers, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ChunkError
from ..geometry import (
    FIRST_WINDOW,
    LATER_WINDOW,
    TEMPORAL_STRIDE,
    WINDOW_RADIUS,
    count_latent_frames,
)
from ..types import AudioWindows, Chunk, FeatureRows


def take_windows(features: FeatureRows, chunk: Chunk) -> AudioWindows:
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
    num_rows = features.num_rows
    if not 0 <= chunk.start < num_rows:
        raise ChunkError(
            f"chunk {chunk.index} starts at frame {chunk.start}; the audio has rows for frames 0 "
            f"to {num_rows - 1}, so plan the chunks from the audio's own length"
        )
    first_K, later_FK = (rows.clamp(0, num_rows - 1) for rows in _window_indices(chunk))
    needed = torch.cat((first_K, later_FK.flatten()))
    start = int(needed.min())
    rows_TLD = features.rows(start, int(needed.max()) + 1)
    return AudioWindows(first_KLD=rows_TLD[first_K - start], later_FKLD=rows_TLD[later_FK - start])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Renumbered:
    """Rows of features in another order; ``FeatureRows``.

    Attributes:
        features: that the rows are of.
        num_rows: length of the order.
        find: the numbers of the features' rows for numbers of the order.
    """

    features: FeatureRows
    num_rows: int
    find: Callable[[Tensor], Tensor]

    @property
    def num_frames(self) -> int:
        return self.features.num_frames

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        wanted = range(self.num_rows)[start:stop]
        found_T = self.find(torch.arange(wanted.start, wanted.stop))
        first = int(found_T.min())
        return self.features.rows(first, int(found_T.max()) + 1)[found_T - first]


def hold_last_row(features: FeatureRows, stop: int) -> FeatureRows:
    """Repeat the last row of a voice that ends early, as far as another voice goes on.

    Args:
        features: of one speaker.
        stop: rows wanted at least.

    Returns:
        The features, with at least ``stop`` rows.
    """
    last = features.num_rows - 1
    if stop <= features.num_rows:
        return features
    return _Renumbered(features=features, num_rows=stop, find=lambda rows: rows.clamp(max=last))


def drop_silence(features: FeatureRows) -> FeatureRows:
    """Leave out the rows after the voice, as the reference does.

    Args:
        features: of one speaker.

    Returns:
        The rows of the voice.
    """
    return _Renumbered(features=features, num_rows=features.num_frames, find=lambda rows: rows)


def mirror_end(features: FeatureRows, stop: int) -> FeatureRows:
    """Let a voice run backwards from its end, as the reference does in its last chunk.

    Args:
        features: of one speaker; rows after the voice are dropped.
        stop: end of the last chunk, in video frames.

    Returns:
        Rows of the voice, and where it ends before ``stop``, its last rows in reverse, three more
        than are missing.

    Source: InfiniteTalk, wan/multitalk.py, the end of the chunk loop in generate_infinitetalk.
    """
    length = features.num_frames
    if stop < length:
        return drop_silence(features)
    return _Renumbered(
        features=features,
        num_rows=length + min(length, stop - length + 3),
        find=lambda rows: torch.where(rows < length, rows, 2 * length - 1 - rows),
    )


def null_windows(features: FeatureRows, chunk: Chunk) -> AudioWindows:
    """Make the windows that stand for no audio at all: zeros.

    Args:
        features: gives layers, width, dtype and device.
        chunk: gives the number of windows; starts inside the features.

    Returns:
        Zeros, shaped as ``take_windows`` returns them.

    Source: InfiniteTalk, wan/multitalk.py (the null audio of audio guidance).
    """
    row_1LD = features.rows(chunk.start, chunk.start + 1)
    num_later = count_latent_frames(chunk.num_frames) - 1
    return AudioWindows(
        first_KLD=row_1LD.new_zeros(FIRST_WINDOW, *row_1LD.shape[1:]),
        later_FKLD=row_1LD.new_zeros(num_later, LATER_WINDOW, *row_1LD.shape[1:]),
    )


def _window_indices(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Number the video frames of each window, before clamping: [5] and [F - 1, 8]."""
    first_K = chunk.start - WINDOW_RADIUS + torch.arange(FIRST_WINDOW)
    # The chunk's frame 1 is the first that the first later latent frame covers.
    later_starts_F = torch.arange(1, chunk.num_frames, TEMPORAL_STRIDE)
    later_FK = chunk.start + later_starts_F[:, None] - WINDOW_RADIUS + torch.arange(LATER_WINDOW)
    return first_K, later_FK
