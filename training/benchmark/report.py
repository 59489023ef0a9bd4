"""Report of the benchmark of a training step: its table and its page of the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training.engine.engine import Precision
from training.markdown import table
from training.recipe import Activations, ClipShape, to_plain
from turbotalk_core.geometry import count_video_tokens

EngineName = Literal["plain", "zero1", "zero2", "zero3"]
BOUNDS = {"dmd": 1.15, "adversarial": 1.25, "adversarial_plain": 1.25}
"""The most that a step may cost, as a multiple of its bare network calls."""

KINDS = ("forward", "weights", "inputs")  # of network calls; see ``calls.Call``
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Settings of one measurement.

    Attributes:
        method: method and its settings, by a key of ``step.METHODS``.
        engine: engine that updates the networks.
        precision: precision of weights and calls.
        num_ranks: number of processes; each has its own micro-batch.
    """

    method: str
    engine: EngineName
    precision: Precision
    num_ranks: int

    @property
    def name(self) -> str:
        """Settings in words, for messages."""
        processes = f", {self.num_ranks} processes" if self.num_ranks > 1 else ""
        return f"{self.method}, {self.engine}, {self.precision}{processes}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Time and memory of one case.

    Attributes:
        num_steps: steps of a round, after which each role has been updated.
        calls: number of network calls of a round, by network and kind.
        step_seconds: seconds per step, of each round.
        bare_seconds: seconds per step of the same calls alone, of each round.
        start_bytes: memory of a process before it has networks.
        peak_bytes: peak memory of a process during training.
    """

    num_steps: int
    calls: Mapping[str, Mapping[str, int]]
    step_seconds: tuple[float, ...]
    bare_seconds: tuple[float, ...]
    start_bytes: int
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Seconds of a step, the median of all rounds."""
        return statistics.median(self.step_seconds)

    @property
    def overhead(self) -> float:
        """Seconds of a step divided by those of its bare calls, by medians."""
        return self.seconds / statistics.median(self.bare_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Case and its measurement."""

    case: Case
    measurement: Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Cost of steps on one machine.

    Attributes:
        device: name of the processor or GPU.
        torch: version of torch.
        num_threads: CPU threads of a single process; two processes share them.
        networks: sizes of the networks, in words.
        clip: shape of one sample.
        size: number of samples of a micro-batch.
        activations: activations kept for the backward pass.
        rows: rows of the table.
    """

    device: str
    torch: str
    num_threads: int
    networks: str
    clip: ClipShape
    size: int
    activations: Activations
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        """Video tokens of one sample."""
        return count_video_tokens(self.clip.num_frames, self.clip.height, self.clip.width)

    def tokens_per_second(self, row: Row) -> tuple[float, float]:
        """Return the video tokens per second of a step, and of its bare calls."""
        num_tokens = self.num_tokens * self.size * row.case.num_ranks
        seconds = row.measurement.seconds
        return num_tokens / seconds, num_tokens / seconds * row.measurement.overhead

    def cells(self) -> list[list[str]]:
        """Return the cells of the table, its head first."""
        head = ["method", "engine", "precision", "processes", "s / step", "overhead", "tokens / s"]
        cells = [[*head, "bare tokens / s", "peak MiB", "of them before"]]
        for row in self.rows:
            case, measured = row.case, row.measurement
            step, bare = self.tokens_per_second(row)
            cells.append(
                [
                    case.method,
                    case.engine,
                    case.precision,
                    f"{case.num_ranks}",
                    f"{measured.seconds:.3f}",
                    f"{measured.overhead:.2f}",
                    f"{step:,.0f}",
                    f"{bare:,.0f}",
                    f"{measured.peak_bytes / MIB:,.0f}",
                    f"{measured.start_bytes / MIB:,.0f}",
                ]
            )
        return cells

    def setup(self) -> str:
        """Describe networks, samples and machine in one paragraph."""
        clip = self.clip
        return (
            f"{self.networks}; {self.size} sample per process, {clip.num_frames} frames of "
            f"{clip.width}x{clip.height}, {self.num_tokens:,} video tokens; activations: "
            f"{self.activations}. {self.device}, threads: {self.num_threads}, torch {self.torch}."
        )

    def lines(self) -> Iterator[str]:
        """Yield the report as lines of text."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        yield self.setup()
        for line in cells:
            padded = [
                cell.ljust(width) if number < 3 else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            yield "  ".join(padded)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object: all fields, and a summary per row."""
        plain = to_plain(self)
        for row, written in zip(self.rows, plain["rows"], strict=True):
            step, bare = self.tokens_per_second(row)
            written["summary"] = {
                "seconds": row.measurement.seconds,
                "overhead": row.measurement.overhead,
                "tokens_per_second": step,
                "bare_tokens_per_second": bare,
            }
        return plain

    def to_markdown(self) -> str:
        """Return the page of the documentation."""
        head, *rows = self.cells()
        bounds = ", ".join(f"{bound} for `{method}`" for method, bound in BOUNDS.items())
        calls = {row.case.method: row.measurement for row in self.rows}
        listed = [
            [method, f"{measured.num_steps}", name, *(f"{counts.get(k, 0)}" for k in KINDS)]
            for method, measured in calls.items()
            for name, counts in measured.calls.items()
        ]
        return PAGE.format(
            setup=self.setup(),
            table=table(head, rows),
            bounds=bounds,
            calls=table(["method", "steps", "network", *KINDS], listed),
        )


PAGE = """# What a training step costs

`make bench-training` measures this and writes the page. {setup}

{table}

- **s / step**: median over rounds; a round of `dmd` is the five steps in which its student learns
  once. `adversarial` is the phase of one step in its memory-light form, `adversarial_plain` the
  same without it.
- **overhead**: a step divided by its **bare** network calls, medians of rounds that take turns in
  one process. The calls of a step are counted by hooks: which network, how often, and whether
  forward only, with a backward pass to its weights, or to its inputs alone. They are made again on
  networks of the same sizes, LoRA layers included, in the same precision, without engine, losses,
  optimiser, average, draws and log. The calls that the memory-light form makes twice count as
  calls: what that form costs is the difference of two rows. Bounds: {bounds}.
- **tokens / s**: video tokens of the samples that are learnt from, by the step and by its bare
  calls.
- **peak MiB**: of one process of its own, the largest where there are two, in the first rounds,
  before the bare calls have networks. On a CPU by the system's count, of which Python and libraries
  take what is there **before**; on a GPU by torch's.

The calls that were made in one round:

{calls}

On CUDA the command takes the GPU by itself: `--width 1.3b` or `--width 14b` with `--layers N` for
networks as wide as these with random weights, as deep as the memory allows, `--ranks N` for as many
GPUs. No GPU was at hand when this was written, so that way has not been run.
"""
