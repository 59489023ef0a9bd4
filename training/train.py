"""Command that runs a training recipe, or describes the run.

    python -m training.train RECIPE [key=value …] [--run FOLDER] [--dry-run]
    python -m training.train RECIPE [key=value …] --check-teacher MP4 --vae FILE
    deepspeed --module training.train RECIPE [key=value …]

All output goes to the run's folder, by default runs/RECIPE. The same command resumes a run that was
stopped. Exit codes: 0 done, 2 refused (with the reason in one line on stderr).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.data.reader import PreparedSet
from training.engine import distributed as ranks
from training.engine.engine import DTYPES, Engine, EngineSettings, PlainEngine, autocast
from training.engine.rng import Draws
from training.methods.adversarial import Adversarial
from training.methods.continuation import Continuation
from training.methods.dmd import Dmd
from training.methods.flow_matching import FlowMatching
from training.methods.method import Method, describe_latents, prepare_role
from training.models.networks import TalkingModel
from training.outputs import check_letters, hold, hold_files
from training.recipe import ClipShape, Count, Natural, Recipe, WeightSource, load_recipe, parse
from training.trainer.file_digests import digest_run
from training.trainer.hooks import Hook
from training.trainer.memory_estimate import describe_run
from training.trainer.progress import ProgressHook, TensorBoardHook
from training.trainer.roles import NetworkKind, RoleBuilder
from training.trainer.sizes import resolve_recipe, resolve_source
from training.trainer.time_estimate import TFLOPS, describe_time
from training.trainer.trainer import Batches, Trainer
from training.trainer.validation import ValidationHook, decode_clip, sample_teacher, write_clip
from turbotalk_core.checkpoints.networks import load_vae
from turbotalk_core.cli.arguments import REFUSED as REFUSED
from turbotalk_core.cli.arguments import Parser, parse_number, run
from turbotalk_core.cli.console import say
from turbotalk_core.errors import (
    MismatchError,
    MissingToolError,
    OutputError,
    RecipeError,
)
from turbotalk_core.models.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.models.wan import WanConfig, WanModel
from turbotalk_core.safe_io.atomic import make_folder

LOCK = ".run.lock"  # in the folder of a run
METHODS: Mapping[str, type[Any]] = {
    "flow_matching": FlowMatching,
    "dmd": Dmd,
    "adversarial": Adversarial,
    "continuation": Continuation,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    parser = Parser(
        prog="python -m training.train", description="Run a recipe of training/recipes."
    )
    parser.add_argument("recipe", help="name of a recipe, or path of a YAML file")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--run", type=Path, help="folder of the run; default: runs/RECIPE")
    parser.add_argument("--dry-run", action="store_true", help="say what it would be, and stop")
    parser.add_argument(
        "--tflops",
        type=parse_number,
        default=TFLOPS,
        help="speed of one device in 10^12 operations per second (--dry-run, %(default)s)",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on although the prepared set or the initial weights have changed",
    )
    parser.add_argument(
        "--check-teacher",
        type=Path,
        metavar="MP4",
        help="sample one prepared clip with the teacher, write it as a video, and stop",
    )
    parser.add_argument("--vae", type=Path, help="the VAE of the prepared set (--check-teacher)")
    parser.add_argument(
        "--steps", type=int, default=40, help="of the teacher (--check-teacher, %(default)s)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    arguments = parser.parse_intermixed_args(argv)  # changes may stand behind options
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s")
    folder = arguments.run or Path("runs") / Path(arguments.recipe).stem
    try:
        return run(lambda: _run(arguments, folder))
    finally:
        ranks.leave()


def _run(arguments: argparse.Namespace, folder: Path) -> None:
    recipe = resolve_recipe(load_recipe(arguments.recipe, arguments.changes))
    methods = make_methods(recipe)
    check_base(recipe)
    if not (arguments.tflops > 0 and arguments.steps > 0):
        raise RecipeError(
            f"got --tflops {arguments.tflops:g} and --steps {arguments.steps}; both must be above 0"
        )
    if arguments.dry_run:
        builder = RoleBuilder(recipe, methods, folder, network_kind(recipe))
        lines = [
            *describe_run(recipe, methods, builder),
            *describe_time(recipe, methods, builder, arguments.tflops),
        ]
        say("".join(f"{line}\n" for line in lines))
    elif arguments.check_teacher is not None:
        mp4, vae = arguments.check_teacher, arguments.vae
        with hold_files(mp4):
            say(f"{check_teacher(recipe, methods, mp4, vae, arguments.steps)}\n")
    else:
        train(recipe, folder, methods, accepts_files=arguments.accept_changes)


def make_methods(recipe: Recipe) -> list[Method]:
    """Make the method of each phase.

    Args:
        recipe: recipe with the phases' methods and settings.

    Returns:
        One method per phase.

    Raises:
        RecipeError: if there is no phase, a method is unknown or refuses its settings, an exported
            role is not a talking model that the phase trains, or an extrapolated role is not
            trained in full.
    """
    if not recipe.phases:
        raise RecipeError("got a recipe without phases; see training/recipes for some with")
    methods = []
    for name, phase in recipe.phases.items():
        if phase.method not in METHODS:
            raise RecipeError(
                f"phase {name}: got the method {phase.method}; there are {', '.join(METHODS)}"
            )
        where = f"settings of phase {name}"
        method = parse(METHODS[phase.method], dict(phase.settings), where)
        methods.append(method)
        roles = method.roles()
        for role, spec in roles.items():
            if 0 < phase.steps <= spec.starts_at:
                raise RecipeError(
                    f"phase {name} has {phase.steps} steps, and {role} is first updated after "
                    f"{spec.starts_at}; give the phase more steps or a shorter discriminator_warmup"
                )
        trained = [
            role
            for role, spec in roles.items()
            if spec.learning.trains != "frozen" and not spec.is_discriminator
        ]
        if phase.exports not in (None, *trained):
            raise RecipeError(
                f"phase {name} exports {phase.exports!r}; it must be a role that it trains and "
                f"that makes videos: {', '.join(trained)}, or null"
            )
        if phase.extrapolation > 1:
            trains = None if phase.exports is None else roles[phase.exports].learning.trains
            if trains != "full":
                raise RecipeError(
                    f"phase {name} extrapolates by {phase.extrapolation:g}, which is for a role "
                    f"that it exports and trains in full; got {phase.exports}, trained {trains}"
                )
    return methods


def network_kind(recipe: Recipe) -> NetworkKind:
    """Return the functions that load, sketch and prepare a recipe's networks.

    Args:
        recipe: recipe with precision and seed.

    Returns:
        The functions for talking models and discriminators.
    """
    return NetworkKind(
        load=partial(_load, dtype=DTYPES[recipe.engine.precision], seed=recipe.seed),
        sketch=_sketch,
        prepare=prepare_role,
    )


def train(
    recipe: Recipe, folder: Path, methods: Sequence[Method], *, accepts_files: bool = False
) -> None:
    """Run a recipe to its end, from the newest checkpoint in its folder on.

    Args:
        recipe: all settings.
        folder: folder of the run; created if it does not exist.
        methods: method of each phase.
        accepts_files: whether a run goes on with other data or initial weights than it began with.
    """
    make_engine, device = start_engine(recipe)
    batches = open_data(recipe)
    check_text(recipe, methods, batches)
    builder = RoleBuilder(recipe, methods, folder, network_kind(recipe))
    trainer = Trainer(
        recipe,
        folder,
        methods=methods,
        builder=builder,
        batches=batches,
        make_engine=make_engine,
        device=device,
        hooks=[ValidationHook(), ExportHook(), TensorBoardHook(), ProgressHook()],
        files=digest_run(recipe, batches),
        accepts_files=accepts_files,
    )
    with hold_run(folder, device):
        trainer.run()


@contextmanager
def hold_run(folder: Path, device: torch.device) -> Iterator[None]:
    """Hold the folder of a run, on all ranks or on none.

    Args:
        folder: folder of the run; created if it does not exist.
        device: device of this rank.

    Yields:
        Nothing.

    Raises:
        OutputError: if another process trains the run, or the folder cannot be written.
    """
    refused: OutputError | None = None
    with ExitStack() as stack:
        if ranks.rank() == 0:
            try:
                check_letters(folder)
                make_folder(folder)
                stack.enter_context(hold(folder / LOCK, f"trains the run {folder}"))
            except OutputError as error:
                refused = error
        # Every rank takes part, so that none waits for one that has left.
        (share,) = ranks.mean_over_ranks(torch.tensor([float(refused is not None)], device=device))
        if share:
            raise refused or OutputError(f"rank 0 cannot hold {folder}; its message says why")
        yield


def check_base(recipe: Recipe) -> None:
    """Check that no audio adapter is attached to a base that it was not trained with.

    Their tensors have equal names and shapes, so nothing else fails: a teacher that nobody trained
    would be distilled.

    Args:
        recipe: recipe with the weights.

    Raises:
        RecipeError: if InfiniteTalk's or MultiTalk's adapter is given with Wan's 720P base.
    """
    for name, source in recipe.weights.items():
        if source.dit is None or source.adapter is None:
            continue
        adapter = source.adapter.as_posix().lower()
        names = [part.lower() for part in source.dit.parts[-2:]]  # of the file and its folder
        is_theirs = "infinitetalk" in adapter or "multitalk" in adapter
        if is_theirs and any("720p" in part and "i2v" in part for part in names):
            raise RecipeError(
                f"weights.{name} has {source.dit.name} with {source.adapter.name}; InfiniteTalk's "
                "and MultiTalk's weights belong to Wan2.1-I2V-14B-480P, which makes videos of 720 "
                "rows too: name that file under dit"
            )


def check_text(recipe: Recipe, methods: Sequence[Method], batches: Sequence[Batches]) -> None:
    """Check that text guidance has an effect.

    Args:
        recipe: recipe with the phases.
        methods: method of each phase.
        batches: samples of each phase.

    Raises:
        RecipeError: if the teacher is guided from the null text to the same text.
    """
    for name, method, samples in zip(recipe.phases, methods, batches, strict=True):
        if not isinstance(method, Dmd) or method.guidance_scale == 1:
            continue
        if getattr(samples, "text_is_null", False):
            raise RecipeError(
                f"phase {name} has guidance_scale {method.guidance_scale:g}, and the text of every "
                "sample equals the null text, so a third of the teacher's calls would be for "
                "nothing; prepare the set with captions or with InfiniteTalk's negative prompt "
                "(the default), or set guidance_scale to 1"
            )


def check_teacher(
    recipe: Recipe, methods: Sequence[Method], mp4: Path, vae: Path | None, steps: int
) -> str:
    """Sample the first clip of the prepared set with the teacher, and write it as a video.

    Args:
        recipe: recipe with the teacher, the set, and a first phase with the teacher's settings.
        methods: method of each phase.
        mp4: file to write.
        vae: the VAE that the set was made with.
        steps: number of steps.

    Returns:
        A line for display.

    Raises:
        RecipeError: if the recipe has no teacher or no data, or there is no VAE.
    """
    if vae is None or "teacher" not in recipe.weights or mp4.suffix != ".mp4":
        raise RecipeError(
            "--check-teacher needs a file that ends in .mp4, --vae FILE, the VAE of the prepared "
            f"set, and a recipe with weights.teacher; got {mp4}, the VAE {vae} and "
            f"{', '.join(recipe.weights) or 'no weights'}"
        )
    decoder = load_vae(vae)  # before any work, as it may be refused
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples = open_data(recipe)[0]
    assert isinstance(samples, PreparedSet)
    model = network_kind(recipe).load(recipe.weights["teacher"]).to(device)
    (draw,) = samples.draw(recipe.seed, 0, rank=0, world_size=1, size=1)
    batch = samples.batch(recipe.seed, 0, rank=0, world_size=1, size=1).to(device)
    method, phase = methods[0], next(iter(recipe.phases.values()))
    shipped = phase.ships_with.get("audio_guidance_scale", 1.0)
    with autocast(device, recipe.engine.precision):
        made = sample_teacher(
            model,
            batch,
            Draws(recipe.seed, 0, 0).own("check of the teacher"),
            steps=steps,
            shift=getattr(method, "shift", 5.0),
            guidance_scale=getattr(method, "guidance_scale", 1.0),
            audio_guidance_scale=getattr(method, "audio_guidance_scale", shipped),
        )
    frames_THWC = decode_clip(decoder.to(device), made)
    write_clip(mp4, frames_THWC, samples.read_sound(draw))
    motions = [describe_latents("x", x)["x_motion"] for x in (made, batch.latents_BCFHW)]
    return (
        f"{mp4}: {len(frames_THWC)} frames of {draw.record['key']} by the teacher in {steps} "
        f"steps; it moves {float(motions[0] / motions[1]):.2f} times as much as the real clip. "
        "Lips that do not follow the voice, or blur, mean that base and adapter do not belong "
        "together"
    )


def start_engine(
    recipe: Recipe,
) -> tuple[Callable[[nn.Module, EngineSettings], Engine], torch.device]:
    """Start the recipe's kind of engine, and join the other ranks if there are any.

    Args:
        recipe: recipe with the kind of engine.

    Returns:
        A function that makes an engine of a network, and the device of this rank.

    Raises:
        MissingToolError: if the recipe requires DeepSpeed and it is not installed.
    """
    choice = recipe.engine
    if choice.kind == "plain":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return partial(PlainEngine, device=device), device
    if find_spec("deepspeed") is None:
        raise MissingToolError(
            "the recipe asks for DeepSpeed, which is not installed: pip install 'deepspeed>=0.19.6'"
            ", or take engine.kind=plain on one device"
        )
    from training.engine.deepspeed_engine import DeepSpeedEngine, ZeroSettings, start_ranks

    device = start_ranks(choice.timeout_seconds)
    zero = ZeroSettings(stage=choice.zero_stage, offload=choice.offload)
    return partial(DeepSpeedEngine, zero=zero, device=device), device


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOptions:
    """Selection from a prepared set, by the options of its reader.

    Attributes:
        num_frames: frames of the chunks, 4n + 1; null uses the length of the shortest clip.
        worst_tier: highest tier to select; null for all.
        num_voices: number of voices to select; null for all.
    """

    num_frames: Count | None = None
    worst_tier: Natural | None = None
    num_voices: Count | None = None


def open_data(recipe: Recipe) -> list[Batches]:
    """Open the prepared set of a recipe.

    Args:
        recipe: recipe with the folder of the set.

    Returns:
        The set for each phase, with the phase's clip length.

    Raises:
        RecipeError: if the recipe has no folder.
        RequestError: if the set has no usable samples.
    """
    source = recipe.data
    if source.folder is None:
        raise RecipeError(
            "the recipe names no data; prepare a set with python -m training.data and say "
            "data.folder=FOLDER"
        )
    lengths = [phase.num_frames for phase in recipe.phases.values()]
    chosen = parse(SetOptions, dict(source.options), "data.options")
    options = {name: value for name, value in asdict(chosen).items() if value is not None}
    sets = {
        length: PreparedSet(source.folder, **options | ({"num_frames": length} if length else {}))
        for length in set(lengths)
    }
    return [sets[length] for length in lengths]


class ExportHook(Hook):
    """Export of the model files of each phase that has ended, on rank 0."""

    def on_phase_end(self, trainer: Trainer) -> None:
        """Write the model files if the recipe exports a role of the phase."""
        if ranks.rank() == 0:
            export_phase(
                trainer.recipe,
                trainer.folder,
                trainer.methods,
                trainer.builder,
                trainer.state.phase,
            )


def export_phase(
    recipe: Recipe, folder: Path, methods: Sequence[Method], builder: RoleBuilder, number: int
) -> None:
    """Write the model files of a finished phase if the recipe exports one of its roles.

    Args:
        recipe: recipe with the exported role and the settings that ship with its files.
        folder: folder of the run; the files go into ``exports/PHASE``, laid out as a models folder.
        methods: method of each phase.
        builder: builder that loads the final weights of the phase.
        number: number of the phase.
    """
    name, phase = list(recipe.phases.items())[number]
    if phase.exports is None:
        return
    network = builder.load_end(number, phase.exports)
    assert isinstance(network, TalkingModel)
    models = folder / "exports" / name
    network.save(
        models / "diffusion_models" / f"{phase.exports}.safetensors",
        models / "model_patches" / f"{phase.exports}_adapter.safetensors",
        {**describe_student(recipe.clip_of(phase), methods[number]), **phase.ships_with},
    )


def describe_student(clip: ClipShape, method: Method) -> dict[str, Any]:
    """Return the sampling settings of a phase's model, which ship in its file's metadata.

    Args:
        clip: shape of one sample of the phase.
        method: method of the phase.

    Returns:
        Settings named as in a request, including those of a few-step sampler if the method has one.
    """
    settings: dict[str, Any] = {
        "height": clip.height,
        "width": clip.width,
        "chunk_frames": clip.num_frames,
        "num_motion_frames": 9,
    }
    if isinstance(method, Dmd | Adversarial | Continuation):
        settings |= {
            "kind": "student",
            "steps": method.num_steps,
            "schedule": "distilled",
            "shift": method.shift,
            "update": "renoise",
            "audio_guidance_scale": 1.0,
        }
    return settings


def _load(source: WeightSource, dtype: torch.dtype, seed: int) -> TalkingModel:
    sketch = _sketch(source)
    if source.dit is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            dit, projection = WanModel(sketch.dit.config), AudioProjection(sketch.projection.config)
            dit.initialize()
        return TalkingModel(dit, projection)
    model = TalkingModel.load(source.dit, source.adapter, dtype)
    for part, expected in ((model.dit, sketch.dit), (model.projection, sketch.projection)):
        if part.config != expected.config:
            raise MismatchError(
                f"{source.dit.name} holds {part.config}, the recipe says {expected.config}; take "
                "video and audio under weights out, and the sizes are read from the file"
            )
    return model


def _sketch(source: WeightSource) -> TalkingModel:
    source = resolve_source(source)
    video = parse(WanConfig, dict(source.video), "weights: video")
    audio = parse(AudioAdapterConfig, dict(source.audio), "weights: audio")
    with torch.device("meta"):
        return TalkingModel(WanModel(video), AudioProjection(audio))


if __name__ == "__main__":
    sys.exit(main())
