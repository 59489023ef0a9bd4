"""Joining and stitching: from the frames of a chunk to those that the video keeps, without a seam.

Axes: B batch, C channels, T video frames, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ChunkError
from ..types import Chunk, ChunkState, FrameChunk

# Long enough that no step between two frames is visible, and short enough that the picture moves
# little while the correction fades.
FADE_FRAMES = 8


def join_frames(frames_BCTHW: Tensor, motion_frames_BCTHW: Tensor) -> Tensor:
    """Correct the first new frames of a chunk so that they continue the frames before it.

    A chunk makes its motion frames again, but not exactly, as the VAE is lossy. The difference
    between the last motion frame before and after is known. It is added to the first new frames,
    with a weight that falls linearly over ``FADE_FRAMES``. Where there is no difference nothing
    changes. As both are the same moment, nothing that moves appears twice, as it would in a
    cross-fade of different frames.

    Args:
        frames_BCTHW: all frames of a later chunk, in [-1, 1].
        motion_frames_BCTHW: its motion frames as they are in the video, from the chunk before;
            fewer than the chunk's frames.

    Returns:
        The frames of the chunk, with the first new ones corrected, in the same shape.
    """
    num_given = motion_frames_BCTHW.shape[2]
    new_BCTHW = frames_BCTHW[:, :, num_given:]
    missing_BCTHW = motion_frames_BCTHW[:, :, -1:] - frames_BCTHW[:, :, num_given - 1 : num_given]
    length = min(FADE_FRAMES, new_BCTHW.shape[2])
    share_T = 1 - torch.arange(length).to(frames_BCTHW) / FADE_FRAMES
    begin_BCTHW = new_BCTHW[:, :, :length] + share_T.view(-1, 1, 1) * missing_BCTHW
    return torch.cat(
        (frames_BCTHW[:, :, :num_given], begin_BCTHW.clamp(-1, 1), new_BCTHW[:, :, length:]), 2
    )


def keep_frames(
    frames_BCTHW: Tensor, chunk: Chunk, chunk_state: ChunkState | None = None
) -> FrameChunk:
    """Drop a chunk's motion frames and the frames beyond the end of the video.

    Args:
        frames_BCTHW: all frames of the chunk, in [-1, 1].
        chunk: span of the chunk.
        chunk_state: chunk state with which the next chunk begins.

    Returns:
        The kept frames, a view of ``frames_BCTHW``.

    Raises:
        ChunkError: if the number of frames is not that of the chunk.
    """
    if frames_BCTHW.shape[2] != chunk.num_frames:
        raise ChunkError(
            f"chunk {chunk.index} makes {chunk.num_frames} frames, got {frames_BCTHW.shape[2]}; "
            "decode the latents of the whole chunk"
        )
    start = chunk.keep_start - chunk.start
    stop = chunk.keep_stop - chunk.start
    return FrameChunk(
        chunk=chunk, frames_BCTHW=frames_BCTHW[:, :, start:stop], chunk_state=chunk_state
    )
