"""Audio windows: the audio features around each latent frame of a chunk.

The audio adapter's input. Separate because it is pure index arithmetic, shared by training and
inference. Only the feature rows that a chunk needs are read.

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
    """Gather the audio windows of a chunk: the features of each latent frame and its neighbours.

    Video frames before the first row or after the last repeat that row. Later latent frame j covers
    the video frames 4j - 3 ... 4j of the chunk, so its window with 2 neighbours on each side is
    4j - 5 ... 4j + 2.

    Args:
        features: features of the whole clip, one row per video frame.
        chunk: the chunk.

    Returns:
        Windows of the same dtype and device as the features.

    Raises:
        ChunkError: if the chunk starts before the first row or after the last.

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
    # Where features are on a device, it waits for the two index tensors, per voice and chunk.
    return AudioWindows(first_KLD=rows_TLD[first_K - start], later_FKLD=rows_TLD[later_FK - start])


@dataclass(frozen=True, slots=True, kw_only=True)
class Renumbered:
    """Rows of features in another order; ``FeatureRows``.

    Attributes:
        features: features that contain the rows.
        num_rows: number of rows in the new order.
        find: function from row numbers in the new order to those of the features.
    """

    features: FeatureRows
    num_rows: int
    find: Callable[[Tensor], Tensor]

    @property
    def num_frames(self) -> int:
        """Video frames that the sound itself covers."""
        return self.features.num_frames

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows [start, stop) of the order; see ``FeatureRows``."""
        wanted = range(self.num_rows)[start:stop]
        found_T = self.find(torch.arange(wanted.start, wanted.stop))
        first = int(found_T.min())
        return self.features.rows(first, int(found_T.max()) + 1)[found_T - first]


def hold_last_row(features: FeatureRows, stop: int) -> FeatureRows:
    """Repeat the last row of a voice up to a length, such as that of another voice.

    Args:
        features: features of one speaker.
        stop: least number of rows.

    Returns:
        The features, with at least ``stop`` rows.
    """
    last = features.num_rows - 1
    if stop <= features.num_rows:
        return features
    return Renumbered(features=features, num_rows=stop, find=lambda rows: rows.clamp(max=last))


def null_windows(features: FeatureRows, chunk: Chunk) -> AudioWindows:
    """Return the windows of null audio: zeros.

    Args:
        features: features that determine layers, width, dtype and device.
        chunk: chunk that determines the number of windows; it starts inside the features.

    Returns:
        Zeros, in the shape of the result of ``take_windows``.

    Source: InfiniteTalk, wan/multitalk.py (the null audio of audio guidance).
    """
    row_1LD = features.rows(chunk.start, chunk.start + 1)
    num_later = count_latent_frames(chunk.num_frames) - 1
    return AudioWindows(
        first_KLD=row_1LD.new_zeros(FIRST_WINDOW, *row_1LD.shape[1:]),
        later_FKLD=row_1LD.new_zeros(num_later, LATER_WINDOW, *row_1LD.shape[1:]),
    )


def _window_indices(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Return the video frame numbers of each window, before clamping: [5] and [F - 1, 8]."""
    first_K = chunk.start - WINDOW_RADIUS + torch.arange(FIRST_WINDOW)
    # The first later latent frame covers the chunk's frames 1 to 4.
    later_starts_F = torch.arange(1, chunk.num_frames, TEMPORAL_STRIDE)
    later_FK = chunk.start + later_starts_F[:, None] - WINDOW_RADIUS + torch.arange(LATER_WINDOW)
    return first_K, later_FK
