"""Chunk plan of a video: pure arithmetic on video frame numbers."""

from __future__ import annotations

from ..errors import ChunkError
from ..geometry import MAX_FRAMES
from ..request import CHUNK_FRAMES, NUM_MOTION_FRAMES, check_chunk_lengths
from ..types import Chunk, ChunkPlan


def plan_chunks(
    num_frames: int,
    chunk_frames: int = CHUNK_FRAMES,
    num_motion_frames: int = NUM_MOTION_FRAMES,
) -> ChunkPlan:
    """Plan overlapping chunks for a video; each later one begins with the end of the one before.

    Every chunk has full length, even the last or only one, because the model was trained at that
    length. Frames beyond the end of the video are made from the silence after the voice and
    dropped.

    Args:
        num_frames: frames of the finished video, 1 to ``MAX_FRAMES``.
        chunk_frames: frames made by one sampling run, 4n + 1.
        num_motion_frames: frames at the start of a later chunk that are given, 4m + 1, fewer than
            chunk_frames.

    Returns:
        Chunks whose kept frames tile [0, num_frames).

    Raises:
        ChunkError: if num_frames is outside its range.
        RequestError: if the chunk or motion length is not allowed.

    Source: InfiniteTalk, wan/multitalk.py, the chunk loop of generate_infinitetalk.
    """
    if not 1 <= num_frames <= MAX_FRAMES:
        raise ChunkError(
            f"got {num_frames} frames to make; at least one (40 ms) is needed, and at most "
            f"{MAX_FRAMES} are made"
        )
    check_chunk_lengths(chunk_frames, num_motion_frames)
    chunks: list[Chunk] = []
    kept = 0
    while kept < num_frames:
        start = kept - num_motion_frames if chunks else 0
        stop = start + chunk_frames
        keep_stop = min(stop, num_frames)
        chunks.append(
            Chunk(index=len(chunks), start=start, stop=stop, keep_start=kept, keep_stop=keep_stop)
        )
        kept = keep_stop
    return ChunkPlan(num_frames=num_frames, chunks=tuple(chunks))
