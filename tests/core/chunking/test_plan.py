"""Chunks tile the video, have codec lengths and overlap by the motion frames."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.chunking.plan import plan_chunks
from turbotalk_core.errors import ChunkError, RequestError


@given(
    num_frames=st.integers(1, 2000),
    num_motion_latents=st.integers(1, 6),
    num_new_latents=st.integers(1, 30),
)
def test_a_plan_covers_each_frame_once(
    num_frames: int, num_motion_latents: int, num_new_latents: int
) -> None:
    num_motion_frames = 4 * num_motion_latents - 3
    chunk_frames = num_motion_frames + 4 * num_new_latents
    plan = plan_chunks(num_frames, chunk_frames, num_motion_frames)

    kept = [t for chunk in plan.chunks for t in range(chunk.keep_start, chunk.keep_stop)]
    assert kept == list(range(num_frames))
    assert [chunk.index for chunk in plan.chunks] == list(range(len(plan.chunks)))
    for chunk in plan.chunks:
        assert chunk.num_frames == chunk_frames
    for before, after in pairwise(plan.chunks):
        assert after.start == before.stop - num_motion_frames
        assert after.num_motion_frames == num_motion_frames
        assert before.keep_stop == before.stop
    assert plan.chunks[0].start == 0
    assert plan.chunks[0].num_motion_frames == 0


def test_the_reference_lengths() -> None:
    plan = plan_chunks(200)
    spans = [(c.start, c.stop, c.keep_start, c.keep_stop) for c in plan.chunks]
    assert spans == [(0, 81, 0, 81), (72, 153, 81, 153), (144, 225, 153, 200)]


@pytest.mark.parametrize(("num_frames", "num_chunks"), [(1, 1), (81, 1), (82, 2), (153, 2)])
def test_a_chunk_more_only_when_a_frame_needs_it(num_frames: int, num_chunks: int) -> None:
    assert len(plan_chunks(num_frames).chunks) == num_chunks


def test_nothing_to_make_is_refused() -> None:
    with pytest.raises(ChunkError, match="got 0 frames"):
        plan_chunks(0)


@pytest.mark.parametrize("lengths", [(80, 9), (81, 8), (9, 9), (9, 13)])
def test_lengths_that_cannot_tile_are_refused(lengths: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="got"):
        plan_chunks(100, *lengths)
