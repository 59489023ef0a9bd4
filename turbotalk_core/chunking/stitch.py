"""From the frames that a chunk made to those that go into the video.

Axes: B batch, C channels, T video frames, H height, W width.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import ChunkError
from ..types import Chunk, FrameChunk


def keep_frames(frames_BCTHW: Tensor, chunk: Chunk) -> FrameChunk:
    """Drop the motion frames at the start of a chunk and what lies beyond the end of the video.

    Args:
        frames_BCTHW: all frames that the chunk made, in [-1, 1].
        chunk: where they belong.

    Returns:
        The frames to keep, a view of those given.

    Raises:
        ChunkError: not as many frames as the chunk makes.
    """
    if frames_BCTHW.shape[2] != chunk.num_frames:
        raise ChunkError(
            f"chunk {chunk.index} makes {chunk.num_frames} frames, got {frames_BCTHW.shape[2]}; "
            "decode the latents of the whole chunk"
        )
    start = chunk.keep_start - chunk.start
    stop = chunk.keep_stop - chunk.start
    return FrameChunk(chunk=chunk, frames_BCTHW=frames_BCTHW[:, :, start:stop])
