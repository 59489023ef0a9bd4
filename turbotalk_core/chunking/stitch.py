"""From the frames that a chunk made to those that go into the video, without a seam.

Axes: B batch, C channels, T video frames, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ChunkError
from ..types import Carry, Chunk, FrameChunk

# Long enough that no single step shows, and over before much has moved away from under it.
FADE_FRAMES = 8


def join_frames(frames_BCTHW: Tensor, motion_frames_BCTHW: Tensor) -> Tensor:
    """Let the new frames of a chunk go on from the last frame that was shown.

    A chunk makes its motion frames once more, and not quite as they were: the codec does not give
    back exactly what it was given. By how much the last of them came out different is known, so it
    is taken off the first new frames, less and less. Where it came out the same nothing changes,
    and as both are the same frame nothing that moves is seen twice.

    Args:
        frames_BCTHW: all frames that a later chunk made, in [-1, 1].
        motion_frames_BCTHW: the last frames before it as they were shown; fewer than it made.

    Returns:
        Its frames, those from the first new one on corrected.
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


def keep_frames(frames_BCTHW: Tensor, chunk: Chunk, carry: Carry | None = None) -> FrameChunk:
    """Drop the motion frames at the start of a chunk and what lies beyond the end of the video.

    Args:
        frames_BCTHW: all frames that the chunk made, in [-1, 1].
        chunk: where they belong.
        carry: what the next chunk begins with.

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
    return FrameChunk(chunk=chunk, frames_BCTHW=frames_BCTHW[:, :, start:stop], carry=carry)
