"""Stitched chunks equal the video, and each continues where the chunk before ended."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.chunking.plan import plan_chunks
from turbotalk_core.chunking.stitch import FADE_FRAMES, join_frames, keep_frames
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


def _draw(num_frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, num_frames, 2, 4, generator=generator) - 0.5


@given(num_frames=st.sampled_from([9, 13, 21, 41]), num_given=st.sampled_from([1, 5]))
def test_frames_that_came_out_as_they_were_stay_bit_for_bit(
    num_frames: int, num_given: int
) -> None:
    frames = _draw(num_frames)
    assert torch.equal(join_frames(frames, frames[:, :, :num_given]), frames)


@given(num_frames=st.sampled_from([9, 13, 21, 41]), num_given=st.sampled_from([1, 5]))
def test_a_seam_is_the_step_that_the_chunk_itself_made(num_frames: int, num_given: int) -> None:
    frames, shown = _draw(num_frames), _draw(num_given, seed=1)
    joined = join_frames(frames, shown)
    assert joined.shape == frames.shape
    # What a chunk was given is not shown again, so nothing is done to it.
    assert torch.equal(joined[:, :, :num_given], frames[:, :, :num_given])
    step = joined[:, :, num_given] - shown[:, :, -1]
    made = (shown[:, :, -1] + frames[:, :, num_given] - frames[:, :, num_given - 1]).clamp(-1, 1)
    torch.testing.assert_close(step, made - shown[:, :, -1])
    untouched = num_given + FADE_FRAMES
    assert torch.equal(joined[:, :, untouched:], frames[:, :, untouched:])


def test_what_is_missing_fades_evenly() -> None:
    joined = join_frames(torch.zeros(1, 3, 21, 2, 2), torch.full((1, 3, 5, 2, 2), 0.5))
    expected = 0.5 * (1 - torch.arange(FADE_FRAMES) / FADE_FRAMES)
    torch.testing.assert_close(joined[0, 0, 5 : 5 + FADE_FRAMES, 0, 0], expected)


def test_joined_frames_stay_in_range() -> None:
    joined = join_frames(torch.full((1, 3, 9, 2, 2), 0.9), torch.ones(1, 3, 1, 2, 2))
    assert joined.max() == 1
