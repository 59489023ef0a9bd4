"""Markdown page of the comparison, as a function of its report alone.

Separate from ``run``, so that the page can be tested and written again without measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from training.markdown import table
from turbotalk_core.geometry import FPS

_PARTS = ("encode", "adapter", "forward", "decode", "rest", "write", "chunk")
_WAYS = {
    "ComfyUI's own InfiniteTalk nodes": "host_native",
    "the core, in the reference's order": "reference_way",
    "our nodes": "our_nodes",
    "our nodes with torch's attention, as in the core": "our_nodes_pytorch",
    "the core": "core",
}
_NODE_PARTS = {
    "encode": "the VAE's encoder",
    "forward": "network calls",
    "decode": "the VAE's decoder",
    "rest": "the rest of the sampler; in the core also the mp4",
    "assemble": "Assemble video, after the sampler",
}
_HOST_GAIN = 1.5  # bound: frames per second of our nodes divided by those of ComfyUI's own
_WATCHED = (3, 10, 50, 100, 200)  # chunks whose memory is on the page
_OVERHEAD = 1.03  # bound: seconds of host and command line divided by the core's


def to_page(report: dict[str, Any]) -> str:
    """Return the page of a report.

    Args:
        report: report that ``run.main`` writes as JSON.

    Returns:
        Markdown.
    """
    machine, core, talk, scene = (report[name] for name in ("machine", "core", "talk", "scene"))
    return "\n".join(
        [
            "# Where the time goes",
            "",
            f"One run on {machine['cpu']}, threads: {machine['threads']}, float32; Python "
            f"{machine['python']}, torch {machine['torch']}, ComfyUI {machine['comfyui']}.",
            "No GPU was at hand, so nothing here is of the 14B model.",
            "",
            _list_claims(report),
            "",
            "## A chunk by part",
            "",
            f"The embedded student at {core['width']}x{core['height']}, chunks of "
            f"{core['num_frames']} frames, {core['num_tokens']:,} video tokens.",
            "Seconds of a steady chunk, medians of all but the first. *Write* is how long the",
            "caller waits for files that other threads write. A bare call is one of the network",
            "with nothing around it. The first chunk also encodes the reference image.",
            "",
            _list_parts(core["speeds"]),
            "",
            "## Side by side",
            "",
            f"The same video of {scene['num_chunks']} chunks, one call each, by the same weights",
            f"in one process, in turns; medians of {scene['rounds']} rounds, from loaded networks",
            "and a heard voice to the mp4. ComfyUI's node takes adapters of the released sizes",
            "alone, so these are random weights in a transformer near the student's size,",
            f"{scene['dim']} wide, {scene['num_layers']} layers. The VAE is the embedded one.",
            "",
            _list_arms(report["arms"]),
            "",
            *_list_overhead(report["arms"], scene["num_chunks"]),
            "## The command line, over a long video",
            "",
            f"`talk` makes {talk['num_chunks']} chunks, {talk['num_frames']} frames, of the",
            "shipped portrait with the embedded student.",
            "",
            _list_talk(talk),
            "",
            *_list_talk_overhead(report.get("talk_beside_core")),
            "    make bench",
            "",
        ]
    )


def _list_claims(report: dict[str, Any]) -> str:
    talk, arms, beside = report["talk"], report["arms"], report.get("talk_beside_core")
    (steady,) = (
        speed["steady_chunk"]["chunk"]
        for speed in report["core"]["speeds"]
        if speed["num_steps"] == 1
    )
    ours, native = arms["our_nodes"], arms["host_native"]
    least = {
        f"Our nodes make at least {_HOST_GAIN} times the frames per second of ComfyUI's own": (
            ours["frames_per_second"] / native["frames_per_second"],
            _HOST_GAIN,
        ),
        f"The command line makes at least {FPS} frames per second, from its start to the file": (
            talk["frames_per_second"],
            FPS,
        ),
    }
    most = {
        f"Our nodes take at most {_OVERHEAD} times the core's time": (
            ours["seconds"] / arms["core"]["seconds"]
        ),
        f"A steady chunk of the command line takes at most {_OVERHEAD} times the core's": (
            # Older reports have only the times of two videos with other inputs and lengths.
            beside["ratio"] if beside else talk["steady_chunk_seconds"] / steady
        ),
    }
    verdicts = [(text, value, value >= bound) for text, (value, bound) in least.items()]
    verdicts += [(text, value, value <= _OVERHEAD) for text, value in most.items()]
    grown = talk["bytes_per_chunk"] * 100 / 1e6
    claim = f"Its memory grows by at most 1 MB per 100 chunks after the first {talk['warm_chunks']}"
    verdicts.append((claim, grown, grown <= 1))
    rows = [
        [text, f"{value:.2f}", f"**{'holds' if holds else 'does not hold'}**"]
        for text, value, holds in verdicts
    ]
    return table(["claim", "measured", None], rows, is_tight=True)


def _list_parts(speeds: Sequence[dict[str, Any]]) -> str:
    rows = {
        "bare call": [f"{speed['bare_call_seconds']:.3f}" for speed in speeds],
        **{part: [f"{speed['steady_chunk'][part]:.3f}" for speed in speeds] for part in _PARTS},
        "**R**, a chunk in bare calls": [f"{s['chunk_in_bare_calls']:.2f}" for s in speeds],
        "first chunk": [f"{speed['first_chunk']['chunk']:.3f}" for speed in speeds],
        "frames per second": [f"{speed['frames_per_second']:.1f}" for speed in speeds],
        "the same in the reference's order": [
            f"{speed['reference_way']['frames_per_second']:.1f}" for speed in speeds
        ],
        "gain": [f"{speed['throughput_in_the_reference_ways']:.2f}" for speed in speeds],
        "frames that the VAE encodes": [
            str(speed["steady_chunk"]["num_encoded"]) for speed in speeds
        ],
        "the same in the reference's order ": [
            str(speed["reference_way"]["steady_chunk"]["num_encoded"]) for speed in speeds
        ],
    }
    head = ["network calls per chunk", *(speed["num_steps"] for speed in speeds)]
    lines = [[name.strip(), *cells] for name, cells in rows.items()]
    return table(head, lines, align=" " + "r" * len(speeds))


def _list_arms(arms: dict[str, Any]) -> str:
    native = arms["host_native"]["frames_per_second"]
    rows = []
    for label, name in _WAYS.items():
        if name not in arms:  # reports from before this arm
            continue
        seconds, rate = arms[name]["seconds"], arms[name]["frames_per_second"]
        rows.append([label, f"{seconds:.2f}", f"{rate:.1f}", f"{rate / native:.2f}"])
    head = ["way", "seconds", "frames per second", "times ComfyUI's"]
    return table(head, rows, align=" rrr")


def _list_overhead(arms: dict[str, Any], num_chunks: int) -> list[str]:
    core, nodes = (arms[name].get("parts") for name in ("core", "our_nodes"))
    if not (core and nodes):  # reports from before parts were measured
        return []
    rows = [
        [
            label,
            *(f"{1000 * value / num_chunks:.0f}" for value in (core[part], nodes[part])),
            f"{1000 * (nodes[part] - core[part]) / num_chunks:+.0f}",
        ]
        for part, label in _NODE_PARTS.items()
    ]
    return [
        "### Our nodes over the core, part by part",
        "",
        "Milliseconds per chunk. [Overhead](../performance.md) lists their causes.",
        "",
        table(["part", "the core", "our nodes", "difference"], rows, align=" rrr"),
        "",
    ]


def _list_talk(talk: dict[str, Any]) -> str:
    held = talk["least_bytes"]
    rows = {
        "from its start to the first chunk on the disk": f"{talk['first_chunk_seconds']:.1f} s",
        "a steady chunk": f"{talk['steady_chunk_seconds']:.3f} s",
        "from its start to the file": f"{talk['seconds']:.1f} s",
        "frames per second, all in all": f"{talk['frames_per_second']:.1f}",
        **{
            f"least memory while chunk {number} was made": f"{held[number - 1] / 1e6:.0f} MB"
            for number in _WATCHED
            if number <= len(held)
        },
    }
    return table([None, None], rows.items(), align=" r", is_tight=True)


def _list_talk_overhead(beside: dict[str, Any] | None) -> list[str]:
    if beside is None:  # reports from before this was measured
        return []
    rows = [
        [
            name,
            *(
                f"{1000 * median(beside[arm][f'steady_chunk_{kind}']):.0f}"
                for arm in ("core", "talk")
            ),
            f"{beside[ratio]:.2f}",
        ]
        for name, kind, ratio in (
            ("time", "seconds", "ratio"),
            ("CPU time", "cpu_seconds", "cpu_ratio"),
        )
    ]
    return [
        f"The core and `talk` make the same video of {beside['num_chunks']} chunks in one",
        f"process, in turns, {beside['rounds']} rounds: milliseconds of a steady chunk, and the",
        "median of `talk`'s divided by the core's. [Overhead](../performance.md) lists the parts.",
        "",
        table(["a steady chunk", "the core", "`talk`", "ratio"], rows, align=" rrr"),
        "",
    ]
