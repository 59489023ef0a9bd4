"""The page of the comparison: its figures, its claims, and the page in the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.benchmark.page import to_page

PARTS = ("encode", "adapter", "forward", "decode", "rest", "write")


def _speed(num_steps: int, chunk: float) -> dict[str, Any]:
    parts: dict[str, float] = dict.fromkeys(PARTS, chunk / 6) | {"chunk": chunk}
    return {
        "num_steps": num_steps,
        "bare_call_seconds": 0.5,
        "chunk_in_bare_calls": chunk / 0.5,
        "first_chunk": parts | {"chunk": 3.25},
        "steady_chunk": parts | {"num_encoded": 9},
        "frames_per_second": 72 / chunk,
        "reference_way": {
            "steady_chunk": parts | {"num_encoded": 90},
            "frames_per_second": 18 / chunk,
        },
        "throughput_in_the_reference_ways": 4.0,
    }


def _arm(seconds: float) -> dict[str, float]:
    return {"seconds": seconds, "frames_per_second": 441 / seconds}


def _report(native: float, ours: float, talk: float, growth: float = 9_000.0) -> dict[str, Any]:
    return {
        "machine": {
            "cpu": "a processor",
            "threads": 2,
            "python": "3.11",
            "torch": "2",
            "comfyui": "0",
        },
        "core": {
            "width": 128,
            "height": 96,
            "num_frames": 81,
            "num_tokens": 1344,
            "speeds": [_speed(1, 2.0), _speed(4, 3.0)],
        },
        "talk": {
            "num_chunks": 100,
            "num_frames": 7209,
            "first_chunk_seconds": 8.0,
            "steady_chunk_seconds": talk,
            "seconds": 100 * talk,
            "frames_per_second": 72.09 / talk,
            "least_bytes": [600_000_000] * 99 + [701_000_000],
            "warm_chunks": 50,
            "bytes_per_chunk": growth,
        },
        "scene": {"num_chunks": 6, "rounds": 3, "dim": 200, "num_layers": 6},
        "arms": {
            "host_native": _arm(native),
            "our_nodes": _arm(ours),
            "core": _arm(10.0),
            "reference_way": _arm(40.0),
        },
    }


def test_it_has_what_was_measured() -> None:
    page = to_page(_report(30.0, 10.2, 2.0))
    for row in (
        "| network calls per chunk | 1 | 4 |",
        "| **R**, a chunk in bare calls | 4.00 | 6.00 |",
        "| first chunk | 3.250 | 3.250 |",
        "| frames that the VAE encodes | 9 | 9 |",
        "| the same in the reference's order | 90 | 90 |",
        "| ComfyUI's own InfiniteTalk nodes | 30.00 | 14.7 | 1.00 |",
        "| our nodes | 10.20 | 43.2 | 2.94 |",
        "| least memory while chunk 100 was made | 701 MB |",
    ):
        assert f"\n{row}\n" in page


def test_overhead_is_listed_by_part_where_it_was_measured() -> None:
    report = _report(30.0, 10.2, 2.0)
    assert "part by part" not in to_page(report)
    core = {"encode": 1.0, "forward": 2.0, "decode": 6.0, "rest": 1.0, "assemble": 0.0}
    report["arms"]["core"]["parts"] = core
    report["arms"]["our_nodes"]["parts"] = core | {"forward": 2.6, "assemble": 0.3}
    page = to_page(report)
    assert "\n| network calls | 333 | 433 | +100 |\n" in page
    assert "\n| Assemble video, after the sampler | 0 | 50 | +50 |\n" in page


def test_the_command_line_is_judged_beside_the_core_where_that_was_measured() -> None:
    report = _report(30.0, 10.2, 2.1)
    assert "does not hold" in to_page(report)
    report["talk_beside_core"] = {
        "num_chunks": 16,
        "rounds": 3,
        "talk": {"steady_chunk_seconds": [0.9, 1.0], "steady_chunk_cpu_seconds": [1.5, 1.5]},
        "core": {"steady_chunk_seconds": [0.9, 0.9], "steady_chunk_cpu_seconds": [1.4, 1.5]},
        "ratio": 1.01,
        "cpu_ratio": 1.035,
    }
    page = to_page(report)
    assert "does not hold" not in page
    assert "\n| time | 900 | 950 | 1.01 |\n" in page


@pytest.mark.parametrize(
    ("report", "failing"),
    [
        (_report(30.0, 10.2, 2.0), []),
        (_report(15.0, 10.2, 2.0), ["ComfyUI's own"]),
        (_report(30.0, 10.4, 2.0), ["Our nodes take"]),
        (_report(30.0, 10.2, 2.1), ["A steady chunk"]),
        (_report(30.0, 10.2, 3.0), ["at least 25 frames", "A steady chunk"]),
        (
            _report(30.0, 10.2, 2.0, 11_000.0),
            ["Its memory grows by at most 1 MB per 100 chunks after the first 50"],
        ),
    ],
)
def test_what_does_not_hold_is_said(report: dict[str, Any], failing: list[str]) -> None:
    verdicts = [line for line in to_page(report).splitlines() if "hold" in line]
    assert len(verdicts) == 5
    fallen = [line for line in verdicts if "**does not hold**" in line]
    assert len(fallen) == len(failing)
    for line, words in zip(fallen, failing, strict=True):
        assert words in line


def test_the_page_in_the_documentation_is_that_of_its_report() -> None:
    results = Path(__file__).parents[3] / "docs" / "results"
    report = json.loads((results / "performance.json").read_text(encoding="utf-8"))
    assert to_page(report) == (results / "performance.md").read_text(encoding="utf-8")
