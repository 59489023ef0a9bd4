"""The reference's order of work: other amounts of work for the same frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.core.benchmark.test_report import CPU
from tests.core.benchmark.test_timing import CONVERSATION, NUM_FRAMES, PICTURE, TWO_STEPS, models
from tools.benchmark.reference_way import add_reference_way, time_reference
from turbotalk_core.benchmark.timing import time_video
from turbotalk_core.pipeline import Models

__all__ = ["models"]  # a fixture


def test_the_reference_encodes_the_picture_for_each_chunk(models: Models) -> None:
    timing = time_reference(models, TWO_STEPS, CONVERSATION, PICTURE, CPU)
    assert [chunk.num_encoded for chunk in timing.chunks] == [9 + 1, 9 + 5, 9 + 5]
    assert [chunk.num_calls for chunk in timing.chunks] == [2, 2, 2]
    assert timing.num_frames == NUM_FRAMES


def test_both_ways_make_the_same_frames(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    def keep(_path: object, frames: object, _waveform: object) -> int:
        made.append(torch.cat(list(frames)))  # pyright: ignore[reportArgumentType]
        return len(made[-1])

    monkeypatch.setattr("turbotalk_core.benchmark.timing.assemble", keep)
    monkeypatch.setattr("tools.benchmark.reference_way.assemble", keep)
    for way in (time_video, time_reference):
        assert way(models, TWO_STEPS, CONVERSATION, PICTURE, CPU).num_frames == NUM_FRAMES
    ours, reference = made
    assert torch.equal(ours, reference)
    assert ours.float().std() > 0


@pytest.mark.long
@pytest.mark.weights
def test_it_is_added_to_the_records_of_bench() -> None:
    speeds: list[dict[str, Any]] = [{"num_steps": 1, "frames_per_second": 50.0}]
    add_reference_way(speeds)
    (speed,) = speeds
    way = speed["reference_way"]
    assert (way["steady_chunk"]["num_encoded"], way["steady_chunk"]["num_calls"]) == (90, 1)
    assert way["steady_chunk"]["chunk"] > way["steady_chunk"]["forward"] > 0
    assert speed["throughput_in_the_reference_ways"] == 50 / way["frames_per_second"]
