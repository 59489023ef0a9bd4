"""Speed: the timed calls are the calls of a real run, counted on very small networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.core.benchmark.test_report import CPU, REQUEST, SIZES
from tests.family import make_conversation, make_speech
from turbotalk_core.benchmark.report import build_random_models
from turbotalk_core.benchmark.timing import (
    NUM_BARE,
    ChunkTiming,
    Speed,
    VideoTiming,
    time_call,
    time_video,
)
from turbotalk_core.models.denoiser import WanDenoiser
from turbotalk_core.pipeline import Models

TWO_STEPS = replace(REQUEST, num_inference_steps=2, num_motion_frames=5)  # chunks of 9 frames
NUM_FRAMES = 9 + 4 + 4
PICTURE = torch.full((32, 48, 3), 0.5)
FEATURES_TLD = torch.randn(NUM_FRAMES, 1, SIZES.projection.frame_width)
CONVERSATION = make_conversation(make_speech(FEATURES_TLD))


@pytest.fixture(scope="module")
def models() -> Models:
    return build_random_models(SIZES, torch.float32, CPU)


def test_a_video_encodes_the_picture_once_and_the_motion_frames_of_each_chunk(
    models: Models,
) -> None:
    timing = time_video(models, TWO_STEPS, CONVERSATION, PICTURE, CPU)
    assert [chunk.num_encoded for chunk in timing.chunks] == [9 + 1, 5, 5]
    assert [chunk.num_calls for chunk in timing.chunks] == [2, 2, 2]
    assert timing.num_frames == NUM_FRAMES


def test_parts_add_up_to_the_whole(models: Models) -> None:
    timing = time_video(models, TWO_STEPS, CONVERSATION, PICTURE, CPU)
    for chunk in timing.chunks:
        parts = (chunk.encode, chunk.adapter, chunk.forward, chunk.decode, chunk.rest, chunk.write)
        assert min(parts) > 0
        assert chunk.chunk == sum(parts)
    assert sum(chunk.chunk for chunk in timing.chunks) <= timing.seconds


def test_a_bare_call_is_nothing_but_a_call(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    call = WanDenoiser.__call__

    def watch(self: WanDenoiser, *arguments: torch.Tensor) -> torch.Tensor:
        velocity = call(self, *arguments)  # pyright: ignore[reportArgumentType]
        assert velocity.isfinite().all()
        shapes.append(tuple(velocity.shape))
        return velocity

    monkeypatch.setattr(WanDenoiser, "__call__", watch)
    assert time_call(models, TWO_STEPS, CONVERSATION, CPU) > 0
    assert shapes == [(1, 16, 3, 4, 6)] * (1 + NUM_BARE)


def _chunk(scale: float, **changes: float) -> ChunkTiming:
    parts = {"encode": 1.0, "adapter": 2.0, "forward": 3.0, "decode": 4.0, "rest": 5.0, "write": 6}
    seconds = {name: scale * value for name, value in parts.items()}
    return ChunkTiming(**(seconds | changes), num_encoded=9, num_calls=1)  # pyright: ignore[reportArgumentType]


def test_a_steady_chunk_is_the_median_of_all_but_the_first() -> None:
    chunks = (_chunk(100), _chunk(1), _chunk(3), _chunk(2))
    timing = VideoTiming(chunks=chunks, seconds=200.0, num_frames=300)
    assert timing.steady == _chunk(2)
    assert timing.steady.chunk == 42
    assert timing.throughput == 1.5


def test_a_steady_chunk_in_bare_calls() -> None:
    video = VideoTiming(chunks=(_chunk(9), _chunk(1)), seconds=30.0, num_frames=60)
    assert Speed(num_steps=1, bare=3.0, video=video).ratio == 7
