"""Benchmark of a training step: its seconds, its memory, and its overhead over network calls.

    python -m training.benchmark [--json FILE] [--markdown FILE]
    python -m training.benchmark --width 14b --layers 4 --methods dmd --precisions bfloat16

Every method is measured on every engine, each in its own processes. After each round of steps, the
same network calls, recorded by hooks, are repeated alone (``calls``); the ratio of the two times is
the overhead. Weights and samples are random, as speed and memory do not depend on their values.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

from training.benchmark.calls import BareCalls, count_calls, record_calls
from training.benchmark.hardware import describe_device, read_memory
from training.benchmark.report import Case, EngineName, Measurement, Report, Row
from training.engine import distributed as ranks
from training.engine.engine import DTYPES, Precision, set_checkpointing
from training.models.batch import CONTEXT_LATENTS, Batch
from training.models.networks import TalkingModel
from training.outputs import hold_files
from training.recipe import (
    Activations,
    BatchShape,
    ClipShape,
    EngineChoice,
    Phase,
    Preset,
    Recipe,
    WeightSource,
    load_recipe,
)
from training.train import make_methods, network_kind, start_engine
from training.trainer.hooks import Hook
from training.trainer.roles import NetworkKind, RoleBuilder
from training.trainer.sizes import resolve_source
from training.trainer.trainer import Trainer
from turbotalk_core.cli.arguments import Parser, find_device, parse_count, parse_sides, run
from turbotalk_core.errors import RecipeError
from turbotalk_core.geometry import (
    FIRST_WINDOW,
    LATENT_CHANNELS,
    LATER_WINDOW,
    SPATIAL_STRIDE,
    check_size,
    count_latent_frames,
)
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.wan import WanModel
from turbotalk_core.safe_io.atomic import make_folder, write_text

logger = logging.getLogger(__name__)

ENGINES: tuple[EngineName, ...] = ("plain", "zero1", "zero2", "zero3")
STEPS_WITHOUT_WARMUP = {"num_steps": 1, "warmup_steps": 0, "penalty_floor_every": 0}
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "flow_matching": ("flow_matching", {}),
    "dmd": ("dmd", {}),
    "adversarial": ("adversarial", STEPS_WITHOUT_WARMUP),
    "adversarial_plain": ("adversarial", {**STEPS_WITHOUT_WARMUP, "memory_light": False}),
}
"""Methods to measure with their settings, by the name of the row."""

CHEAP_IN_PAIRS = ("flow_matching",)  # also measured in two processes on two cores
TINY_RANK = 16  # of LoRA layers, as in the recipe of the embedded family


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Sizes of the networks of one family, and of the samples to measure them with.

    Attributes:
        source: sizes of the networks.
        clip: shape of one sample.
        rank: rank of a discriminator's LoRA layers.
    """

    source: WeightSource
    clip: ClipShape
    rank: int = 64


CLIP_480P = ClipShape(num_frames=81, height=480, width=832)


def find_width(name: Preset) -> Width:
    """Return the sizes of a family.

    Args:
        name: one of ``WIDTHS``.

    Returns:
        Its sizes, for random weights.
    """
    source = resolve_source(WeightSource(preset=name))
    if name == "tiny":
        clip = replace(load_recipe("base_tiny").clip, num_frames=33)
        return Width(source=source, clip=clip, rank=TINY_RANK)
    return Width(source=source, clip=CLIP_480P)


WIDTHS: tuple[Preset, ...] = ("tiny", "1.3b", "14b")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    parser = Parser(
        prog="python -m training.benchmark",
        description="Measure seconds and memory of a step.",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES)[:2],
        help="default: float32, and mixed where the engine is plain",
    )
    parser.add_argument(
        "--ranks", type=parse_count, help="processes under ZeRO; default: 1, the cheapest also 2"
    )
    parser.add_argument("--width", choices=WIDTHS, default="tiny", help="of the networks")
    parser.add_argument("--layers", type=parse_count, help="of the transformer")
    parser.add_argument("--frames", type=parse_count, help="of a sample, 4n + 1")
    parser.add_argument("--size", type=parse_sides, help="of a sample, as in 832x480")
    parser.add_argument("--batch", type=parse_count, default=1, help="samples per process")
    parser.add_argument("--activations", choices=("keep", "recompute"), default="keep")
    parser.add_argument("--rounds", type=parse_count, default=3, help="of which medians are taken")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--markdown", type=Path, help="file for the page of the documentation")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run(lambda: _measure_and_write(arguments))


def _measure_and_write(arguments: argparse.Namespace) -> None:
    with hold_files(arguments.json, arguments.markdown):
        _measure_all(arguments)


def _measure_all(arguments: argparse.Namespace) -> None:
    width = find_width(arguments.width)
    if arguments.layers is not None:
        video = {**width.source.video, "num_layers": arguments.layers}
        width = replace(width, source=replace(width.source, video=video))
    if arguments.frames is not None:
        width = replace(width, clip=replace(width.clip, num_frames=arguments.frames))
    if arguments.size is not None:
        columns, rows = arguments.size
        width = replace(width, clip=replace(width.clip, width=columns, height=rows))
    check_size(width.clip.height, width.clip.width)
    count_latent_frames(width.clip.num_frames)  # refuses any but 4n + 1
    cases = list_cases(arguments.methods, arguments.engines, arguments.precisions, arguments.ranks)
    if not cases:
        raise RecipeError(
            f"got the engines {', '.join(arguments.engines)} and the precisions "
            f"{', '.join(arguments.precisions)}, of which none go together; zero1 to zero3 need "
            "DeepSpeed and float32 or bfloat16: add plain, or one of these"
        )
    rows = []
    for number, case in enumerate(cases, 1):
        started = time.monotonic()
        recipe = make_recipe(case, width, arguments.batch, arguments.activations)
        row = Row(case=case, measurement=measure(recipe, case.num_ranks, arguments.rounds))
        rows.append(row)
        logger.info(
            "%d of %d: %s: %.3f s, overhead %.2f, in %.0f s",
            number,
            len(cases),
            case.name,
            row.measurement.seconds,
            row.measurement.overhead,
            time.monotonic() - started,
        )
    report = Report(
        device=describe_device(find_device()),
        torch=torch.__version__,
        num_threads=torch.get_num_threads(),
        networks=f"Networks of width {arguments.width} with random weights"
        + (f", {arguments.layers} layers" if arguments.layers else ""),
        clip=width.clip,
        size=arguments.batch,
        activations=arguments.activations,
        rows=tuple(rows),
    )
    sys.stdout.writelines(f"{line}\n" for line in report.lines())
    if arguments.json is not None:
        _write(arguments.json, json.dumps(report.to_json(), indent=1) + "\n")
    if arguments.markdown is not None:
        _write(arguments.markdown, report.to_markdown())


def _write(path: Path, text: str) -> None:
    make_folder(path.parent)
    write_text(path, text)


def list_cases(
    methods: Sequence[str],
    engines: Sequence[EngineName],
    precisions: Sequence[Precision],
    num_ranks: int | None,
) -> list[Case]:
    """List the cases to measure; combinations that are impossible are left out.

    Args:
        methods: keys of ``METHODS``.
        engines: some of ``ENGINES``.
        precisions: precisions; only the plain engine supports mixed.
        num_ranks: number of processes under ZeRO; None means one, and also two for methods that
            are cheap enough.

    Returns:
        The cases, grouped by method.
    """
    cases = []
    for method, engine, precision in itertools.product(methods, engines, precisions):
        counts = [1]
        if engine != "plain":
            if precision == "mixed" or find_spec("deepspeed") is None:
                continue
            pairs = [2] if method in CHEAP_IN_PAIRS and not torch.cuda.is_available() else []
            counts = [1, *pairs] if num_ranks is None else [num_ranks]
        cases += [
            Case(method=method, engine=engine, precision=precision, num_ranks=count)
            for count in counts
        ]
    return cases


def make_recipe(case: Case, width: Width, size: int, activations: Activations) -> Recipe:
    """Make the recipe of a case: one phase, with the defaults of recipes for all other settings.

    Args:
        case: case to measure.
        width: sizes of the networks.
        size: number of samples of a micro-batch.
        activations: activations kept for the backward pass.

    Returns:
        The recipe.
    """
    method, settings = METHODS[case.method]
    if method == "adversarial":
        learning = {"trains": "lora", "learning_rate": 2e-5, "rank": width.rank}
        settings = {**settings, "discriminator": {**learning, "alpha": float(width.rank)}}
    return Recipe(
        weights={"teacher": width.source, "student": width.source},
        clip=width.clip,
        batch=BatchShape(size=size, count=case.num_ranks),
        engine=EngineChoice(
            kind="plain" if case.engine == "plain" else "deepspeed",
            num_ranks=case.num_ranks,
            zero_stage=3 if case.engine == "plain" else int(case.engine[-1]),  # pyright: ignore[reportArgumentType]
            precision=case.precision,
            activations=activations,
        ),
        phases={"bench": Phase(method=method, steps=1, settings=settings)},
    )


def measure(recipe: Recipe, num_ranks: int, num_rounds: int) -> Measurement:
    """Measure a recipe's first phase in new processes.

    Args:
        recipe: result of ``make_recipe``.
        num_ranks: number of processes.
        num_rounds: rounds of steps, and of their bare calls.

    Returns:
        Times of the first process, memory of the process with the largest peak.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run_rank, (num_ranks, recipe, num_rounds, port, Path(folder)), nprocs=num_ranks)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))]
    peak = max(found, key=lambda measured: measured["peak_bytes"])
    first = found[0] | {key: peak[key] for key in ("start_bytes", "peak_bytes")}
    first |= {key: tuple(first[key]) for key in ("step_seconds", "bare_seconds")}
    return Measurement(**first)


def _run_rank(
    rank: int, num_ranks: int, recipe: Recipe, num_rounds: int, port: int, folder: Path
) -> None:
    """Measure in this process, which does nothing else."""
    os.dup2(2, 1)  # output of libraries is not part of the report
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    make_engine, device = start_engine(recipe)
    methods = make_methods(recipe)
    kind = replace(network_kind(recipe), load=partial(_draw_network, network_kind(recipe), device))
    builder = RoleBuilder(recipe, methods, folder, kind)
    measuring = MeasuringHook(num_rounds, read_memory(device)[0])
    trainer = Trainer(
        recipe,
        folder,
        methods=methods,
        builder=builder,
        batches=[_SameBatch(recipe)],
        make_engine=make_engine,
        device=device,
        hooks=[measuring],
    )
    trainer.run()
    assert measuring.measurement is not None
    (folder / f"rank{rank:03d}.json").write_text(json.dumps(asdict(measuring.measurement)))
    ranks.barrier()
    ranks.leave()


class MeasuringHook(Hook):
    """Hook that measures a phase instead of training it: it times rounds of equal steps.

    Every round repeats the same step numbers, and so the same random draws and the same calls. Then
    the run is stopped; it writes neither a checkpoint nor weights.

    Args:
        num_rounds: rounds of steps, and of their bare calls.
        start_bytes: memory of the process before it has networks.

    Attributes:
        measurement: measurement of the phase that was started last.
    """

    def __init__(self, num_rounds: int, start_bytes: int) -> None:
        self.measurement: Measurement | None = None
        self._num_rounds = num_rounds
        self._start_bytes = start_bytes

    def on_phase_start(self, trainer: Trainer) -> None:
        """Measure the phase and stop the run."""
        method = trainer.methods[trainer.state.phase]
        num_steps = getattr(method, "student_every", 1)
        networks = {role: engine.module for role, engine in trainer.engines.items()}
        calls = []
        for step in range(num_steps):  # also pays for what is set up once
            with record_calls(networks) as found:
                trainer.advance(step)
            calls.append(found)
        run_steps = partial(
            _run_each, [partial(trainer.advance, step) for step in range(num_steps)]
        )
        steps = [_time(run_steps, trainer.device)]
        _, peak = read_memory(trainer.device)
        bare = _build_bare(trainer)
        run_bare = partial(_run_each, [partial(bare.make, of_step) for of_step in calls])
        run_bare()
        bares = [_time(run_bare, trainer.device)]
        for _ in range(1, self._num_rounds):
            steps.append(_time(run_steps, trainer.device))
            bares.append(_time(run_bare, trainer.device))
        self.measurement = Measurement(
            num_steps=num_steps,
            calls=count_calls(itertools.chain.from_iterable(calls)),
            step_seconds=tuple(seconds / num_steps for seconds in steps),
            bare_seconds=tuple(seconds / num_steps for seconds in bares),
            start_bytes=self._start_bytes,
            peak_bytes=peak,
        )
        trainer.stop()


def _build_bare(trainer: Trainer) -> BareCalls:
    """Build the networks a second time, as those of an engine may be sharded or have hooks."""
    engine, number = trainer.recipe.engine, trainer.state.phase
    networks: dict[str, nn.Module] = {}
    for role in trainer.engines:
        network = trainer.builder.build(number, role).to(trainer.device, DTYPES[engine.precision])
        set_checkpointing(network, uses=engine.activations != "keep")
        networks[role] = network
    batch = draw_batch(trainer.recipe, trainer.recipe.batch.size).to(trainer.device)
    return BareCalls(networks, batch, precision=engine.precision)


def _time(work: Callable[[], None], device: torch.device) -> float:
    ranks.barrier()
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _run_each(works: Sequence[Callable[[], object]]) -> None:
    for work in works:
        work()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _SameBatch:
    """Source of one random batch for all steps."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def stream(
        self, seed: int, first_step: int, *, rank: int, world_size: int, size: int
    ) -> Iterator[Batch]:
        """Return an endless iterator of the batch."""
        return itertools.repeat(draw_batch(self._recipe, size))


def draw_batch(recipe: Recipe, size: int) -> Batch:
    """Draw samples and conditions that fit the networks of a recipe.

    Args:
        recipe: gives the sizes of the networks and of a sample.
        size: number of samples; every second one continues context frames.

    Returns:
        The batch.
    """
    clip = recipe.clip
    sketch = network_kind(recipe).sketch(next(iter(recipe.weights.values())))
    assert isinstance(sketch, TalkingModel)
    config, frame_width = sketch.dit.config, sketch.projection.config.frame_width
    generator = torch.Generator().manual_seed(recipe.seed)
    draw = partial(torch.randn, generator=generator)
    frames = count_latent_frames(clip.num_frames)
    sides = (clip.height // SPATIAL_STRIDE, clip.width // SPATIAL_STRIDE)
    num_pinned = torch.tensor([1, CONTEXT_LATENTS])[torch.arange(size) % 2]
    text = image = None
    if clip.num_text_tokens:
        text = draw(size, clip.num_text_tokens, config.text_dim)
    if clip.num_image_tokens and config.image_dim is not None:
        image = draw(size, clip.num_image_tokens, config.image_dim)
    return Batch(
        latents_BCFHW=draw(size, LATENT_CHANNELS, frames, *sides),
        reference_BCFHW=draw(size, config.in_channels - LATENT_CHANNELS, frames, *sides),
        first_BPKLD=draw(size, 1, FIRST_WINDOW, 1, frame_width),
        later_BPFKLD=draw(size, 1, frames - 1, LATER_WINDOW, 1, frame_width),
        pinned_BF=torch.arange(frames) < num_pinned[:, None],
        text_BND=text,
        image_embeds_BND=image,
    )


def _draw_network(kind: NetworkKind, device: torch.device, source: WeightSource) -> TalkingModel:
    """Build networks on a device with torch's default initial weights, which are not zero."""
    sketch = kind.sketch(source)
    assert isinstance(sketch, TalkingModel)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return TalkingModel(WanModel(sketch.dit.config), AudioProjection(sketch.projection.config))


if __name__ == "__main__":
    sys.exit(main())
