"""The command line beside the core: both make the same video, and only steady chunks count."""

from __future__ import annotations

import pytest

from tools.benchmark.command_line import compare_talk


@pytest.mark.long
@pytest.mark.weights
def test_talk_and_the_core_are_timed_in_turns() -> None:
    found = compare_talk(3, 2, chunk_frames=33)
    ratios = []
    for arm in ("talk", "core"):
        for kind in ("seconds", "cpu_seconds"):
            assert len(found[arm][f"steady_chunk_{kind}"]) == 2
            assert min(found[arm][f"steady_chunk_{kind}"]) > 0
    for talk, core in zip(
        *(found[a]["steady_chunk_seconds"] for a in ("talk", "core")), strict=True
    ):
        ratios.append(talk / core)
    assert min(ratios) <= found["ratio"] <= max(ratios)
