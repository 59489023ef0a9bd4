"""Stitched chunks are the video itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.chunking.plan import plan_chunks
from turbotalk_core.chunking.stitch import keep_frames
from turbotalk_core.errors import ChunkError


@given(num_frames=st.integers(1, 300), num_motion_frames=st.sampled_from([1, 5, 9]))
def test_frames_that_show_their_number_come_out_in_order(
    num_frames: int, num_motion_frames: int
) -> None:
    plan = plan_chunks(num_frames, 21, num_motion_frames)
    numbers = torch.arange(plan.chunks[-1].stop, dtype=torch.float32)
    video_BCTHW = numbers.view(1, 1, -1, 1, 1).expand(1, 3, -1, 2, 2)
    kept = [
        keep_frames(video_BCTHW[:, :, chunk.start : chunk.stop], chunk).frames_BCTHW
        for chunk in plan.chunks
    ]
    assert torch.equal(torch.cat(kept, 2), video_BCTHW[:, :, :num_frames])


def test_part_of_a_chunk_is_refused() -> None:
    chunk = plan_chunks(30, 21, 5).chunks[0]
    with pytest.raises(ChunkError, match="makes 21 frames, got 17"):
        keep_frames(torch.zeros(1, 3, 17, 2, 2), chunk)
