"""Recipes: everything that decides a run, as a file that derives from another.

A recipe is YAML. ``base: NAME`` takes all of another recipe first; mappings are merged key by key,
anything else is replaced, and null takes a phase or a name out again. ``key.key=value`` on the
command line comes last. A key that nobody knows is refused, with the nearest one that is known.
What a run was started with is stored with it, resolved.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from annotated_types import Ge, Gt
from pydantic import TypeAdapter, ValidationError

from training.engine import EngineSettings, Precision
from training.guard import GuardSettings
from turbotalk_core.errors import RecipeError

MAX_VALUES = 100_000  # of a recipe or a study, aliases written out
FOLDER = Path(__file__).parent / "recipes"
RECIPE = "recipe.yaml"  # in the folder of a run

Preset = Literal["14b", "1.3b", "tiny"]
Activations = Literal["keep", "recompute", "offload"]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """Where networks that no phase has made come from.

    Attributes:
        dit: file of the video transformer; None draws weights at random.
        adapter: file of the audio adapter; None takes the one in the transformer's file.
        preset: sizes of random weights, and of files that are not there yet, in a dry run. Those
            of a file that is there are read from it; see ``training.sizes``.
        video: fields of ``WanConfig`` that differ from these, to train other sizes from scratch.
        audio: the same of ``AudioAdapterConfig``.
    """

    dit: Path | None = None
    adapter: Path | None = None
    preset: Preset = "14b"
    video: Mapping[str, Any] = field(default_factory=dict)
    audio: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """What to learn from.

    Attributes:
        folder: a set that ``training.data`` prepared.
        options: passed on to its reader.
    """

    folder: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipShape:
    """What one sample is; a dry run computes with it.

    Attributes:
        num_frames: video frames, 4n + 1.
        height: pixels.
        width: pixels.
        num_text_tokens: 0 where there is no prompt.
        num_image_tokens: of CLIP; 0 for a model without the branch.
    """

    num_frames: Count = 81
    height: Count = 720
    width: Count = 1280
    num_text_tokens: Natural = 512
    num_image_tokens: Natural = 257


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """What an update is made of.

    Attributes:
        size: samples in one micro-batch.
        count: micro-batches of an update, shared out evenly among ranks; what is more than one
            per rank is accumulated. A run is the same for every number of ranks.
    """

    size: Count = 1
    count: Count = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """What steps the networks.

    Attributes:
        kind: plain for one device, deepspeed for any number.
        num_ranks: that a dry run reckons with; a run takes those it is given.
        zero_stage: what DeepSpeed divides: 1 optimiser states, 2 also gradients, 3 also weights.
        offload: what DeepSpeed keeps in the CPU's memory: none, optimizer, weights (and optimizer).
        precision: of weights and gradients; mixed is float32 with network calls in bfloat16 (plain
            alone).
        activations: what is kept for the backward pass: keep all of it, recompute the insides of
            blocks from their inputs, or offload, which also moves these to the CPU's memory.
        optimizer: adamw, or muon for the matrices of blocks (plain alone).
        clip_norm: largest norm of a role's gradient.
        timeout_seconds: how long ranks wait for one that has died.
    """

    kind: Literal["plain", "deepspeed"] = "plain"
    num_ranks: Count = 1
    zero_stage: Literal[1, 2, 3] = 3
    offload: Literal["none", "optimizer", "weights"] = "none"
    precision: Precision = "float32"
    activations: Activations = "keep"
    optimizer: Literal["adamw", "muon"] = "adamw"
    clip_norm: Annotated[float, Gt(0)] = 10.0
    timeout_seconds: Annotated[float, Gt(0)] = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSchedule:
    """The learning rate over the steps of each phase.

    Attributes:
        kind: constant, or cosine down to a fiftieth.
        num_warmup_steps: of linear growth.
    """

    kind: Literal["constant", "cosine"] = "constant"
    num_warmup_steps: Natural = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageChoice:
    """The running average of weights, which is what a phase ends with.

    Attributes:
        roles: that keep one.
        decay: share that stays per update.
        start: updates of a role before it begins.
    """

    roles: tuple[str, ...] = ("student", "teacher")
    decay: Annotated[float, Ge(0)] = 0.99
    start: Natural = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointChoice:
    """When checkpoints are written.

    Attributes:
        every: steps.
        keep: newest ones that stay.
    """

    every: Count = 100
    keep: Count = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the run; its networks begin where those of the phase before ended.

    Attributes:
        method: by name.
        steps: of the loop; a step makes one update or several.
        num_frames: of its clips; null takes the recipe's. Longer ones of the set are cut.
        batch: what its updates are made of; null takes the recipe's.
        settings: of the method, by its own names.
        exports: role whose model files are written when the phase ends; null writes none.
        extrapolation: where that role ends, on the straight line from what it began with (0) to its
            average (1). With little data per update the average points the right way, but short.
            Source: ExPO, arXiv 2404.16792 [inferred: there between two stages of alignment].
        ships_with: settings kept in the metadata of these files, named as in a request.
    """

    method: str
    steps: Natural
    num_frames: Count | None = None
    batch: BatchShape | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    exports: str | None = None
    extrapolation: Annotated[float, Ge(1)] = 1.0
    ships_with: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides a run.

    Attributes:
        seed: of all draws.
        weights: by the name that roles begin with.
        data: what to learn from.
        clip: what one sample is.
        batch: what an update is made of.
        engine: what steps the networks.
        rate: the learning rate over a phase.
        average: the running average of weights.
        checkpoints: when they are written.
        guard: what stops the run.
        phases: by name, in order.
    """

    seed: Natural = 0
    weights: Mapping[str, WeightSource] = field(default_factory=dict)
    data: DataSource = field(default_factory=DataSource)
    clip: ClipShape = field(default_factory=ClipShape)
    batch: BatchShape = field(default_factory=BatchShape)
    engine: EngineChoice = field(default_factory=EngineChoice)
    rate: RateSchedule = field(default_factory=RateSchedule)
    average: AverageChoice = field(default_factory=AverageChoice)
    checkpoints: CheckpointChoice = field(default_factory=CheckpointChoice)
    guard: GuardSettings = field(default_factory=GuardSettings)
    phases: Mapping[str, Phase] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases.values())

    def fingerprint(self, phase: int) -> str:
        """Tell apart recipes whose runs cannot go on with each other's checkpoints.

        How a run is spread, how long it is, and when it writes is not part of it, nor are phases
        that have not begun, nor what is done when the phase ends.

        Args:
            phase: number of the one that a run is in.

        Returns:
            Of what has decided the weights until then.
        """
        plain = to_plain(self)
        plain["phases"] = dict(list(plain["phases"].items())[: phase + 1])
        for key in ("checkpoints", "guard", "data"):
            del plain[key]
        for key in ("num_ranks", "zero_stage", "offload", "activations", "timeout_seconds"):
            del plain["engine"][key]
        for number, settings in enumerate(plain["phases"].values()):
            for key in ("exports", "ships_with", "steps"):
                del settings[key]
            # Of the phase that goes on it decides nothing before the end; 1 leaves all as it is.
            if number == phase or settings["extrapolation"] == 1:
                del settings["extrapolation"]
        for name, source in plain["weights"].items():
            plain["weights"][name] = {key: source[key] for key in ("video", "audio")}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

    def clip_of(self, phase: Phase) -> ClipShape:
        """Say what one sample of a phase is."""
        num_frames = phase.num_frames or self.clip.num_frames
        return dataclasses.replace(self.clip, num_frames=num_frames)

    def batch_of(self, phase: Phase) -> BatchShape:
        """Say what the updates of a phase are made of."""
        return phase.batch or self.batch

    def settings_of(self, role: str, learning: Any) -> EngineSettings:
        """Give the engine's settings of a role.

        Args:
            role: its name.
            learning: ``Learning`` of its ``RoleSpec``.

        Returns:
            Rates from the method, everything else from the recipe.
        """
        averages = role in self.average.roles
        return EngineSettings(
            learning_rate=learning.learning_rate,
            betas=learning.betas,
            weight_decay=learning.weight_decay,
            clip_norm=self.engine.clip_norm,
            optimizer=self.engine.optimizer,
            precision=self.engine.precision,
            ema_decay=self.average.decay if averages else None,
            ema_start=self.average.start,
            uses_checkpointing=self.engine.activations != "keep",
        )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with everything that it derives from.

    Args:
        name: of a recipe in ``training/recipes``, or the path of a YAML file.
        overrides: ``key.key=value``, the value in YAML.

    Returns:
        The recipe, checked.

    Raises:
        RecipeError: no such recipe, a circle of bases, an unknown key, or a value out of range.
    """
    merged = _read_derived(name, ())
    for override in overrides:
        path, sign, value = override.partition("=")
        if not sign:
            raise RecipeError(
                f"got {override!r} after the recipe; changes have the form key.key=value, for "
                "example checkpoints.every=50"
            )
        change: Any = parse_yaml(value, override)
        for key in reversed(path.split(".")):
            change = {key: change}
        merged = _merge(merged, change)
    return parse(Recipe, merged, f"recipe {name}")


def store_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe so that ``load_recipe`` reads the same one without any other.

    Args:
        recipe: resolved.
        path: a YAML file; its folder is made where it does not exist.
    """
    text = yaml.safe_dump(to_plain(recipe), sort_keys=False, allow_unicode=True)
    partial = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def to_plain(value: Any) -> Any:
    """Turn a dataclass into what JSON and YAML can say."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def parse(kind: type[T], data: Any, where: str) -> T:
    """Make a dataclass of what YAML says, and refuse what it does not know.

    Args:
        kind: the dataclass; its fields may be dataclasses, and mappings of them.
        data: mappings, lists and plain values.
        where: what this is, for messages.

    Returns:
        The value.

    Raises:
        RecipeError: an unknown or missing key, or a value that does not fit.
    """
    _check_keys(kind, data, where, ())
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"{where}: {place or 'it'} is {first['input']!r}: {first['msg']}; change it there"
        ) from error


def _check_keys(kind: Any, data: Any, where: str, path: tuple[str, ...]) -> None:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        kind = options[0] if len(options) == 1 else None
    if not isinstance(data, Mapping):
        return
    arguments = typing.get_args(kind)
    if arguments and dataclasses.is_dataclass(arguments[-1]):  # a mapping of dataclasses
        for key, value in data.items():
            _check_keys(arguments[-1], value, where, (*path, str(key)))
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for key, value in data.items():
        if key not in known:
            place = ".".join((*path, str(key)))
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise RecipeError(
                f"{where}: {place} is unknown; the nearest key is "
                f"{'.'.join((*path, *nearest))}, and all of them here are "
                f"{', '.join(sorted(known))}"
            )
        _check_keys(hints[key], value, where, (*path, str(key)))


def _read_derived(name: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
    path = path.resolve()
    if not path.is_file():
        present = ", ".join(sorted(other.stem for other in FOLDER.glob("*.yaml")))
        raise RecipeError(
            f"there is no recipe {name}; there are {present}, or give the path of a .yaml file"
        )
    if path in seen:
        raise RecipeError(f"recipe {name} derives from itself; take its base out")
    data = parse_yaml(path.read_text(encoding="utf-8"), name)
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {name} is no mapping of keys to values; write key: value")
    base = data.pop("base", None)
    if base is None:
        return data
    beside = path.parent / f"{base}.yaml"
    return _merge(_read_derived(str(beside) if beside.is_file() else base, (*seen, path)), data)


def parse_yaml(text: str, where: str) -> Any:
    """Read plain YAML, which makes no objects.

    Args:
        text: of a recipe or a study.
        where: what this is, for messages.

    Returns:
        Mappings, lists and plain values.

    Raises:
        RecipeError: no YAML, or one of more than ``MAX_VALUES`` values: by aliases of aliases a few
            lines can mean any number.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        num_values = _count_values(node, {})
        data = yaml.safe_load(text) if num_values <= MAX_VALUES else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where} is no YAML ({error}); see training/recipes") from error
    if num_values > MAX_VALUES:
        raise RecipeError(
            f"{where} means {num_values} values, at most {MAX_VALUES} are read; write it without "
            "aliases (*name)"
        )
    return data


def _count_values(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Count what is left when each alias is written out; those that hold themselves never end."""
    if node is None:
        return 0
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else [item])]
        known[id(node)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(node)]


def _merge(under: Any, over: Any) -> Any:
    if not (isinstance(under, Mapping) and isinstance(over, Mapping)):
        return over
    merged = dict(under)
    for key, value in over.items():
        if value is None and isinstance(under.get(key), Mapping):
            merged.pop(key)
        else:
            merged[key] = _merge(under.get(key), value)
    return merged
