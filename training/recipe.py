"""Recipes: all settings of a training run, as YAML files that derive from each other.

A recipe is YAML. ``base: NAME`` starts from another recipe: mappings are merged key by key, other
values are replaced, and null removes a phase or a named entry. ``key.key=value`` from the command
line is applied last. An unknown key is an error, whose message contains the nearest known key. The
resolved recipe is stored with the run.
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
from annotated_types import Ge, Gt, Le
from pydantic import TypeAdapter, ValidationError

from training.engine.divergence import GuardSettings
from training.engine.engine import EngineSettings, Precision
from training.texts import read_text
from turbotalk_core.errors import RecipeError
from turbotalk_core.geometry import IMAGE_TOKENS, TEXT_LENGTH
from turbotalk_core.safe_io.atomic import make_folder, write_text

LARGEST_NUMBER = 2**63 - 1  # of 64 bits
LEARNING = ("learning_rate", "betas", "weight_decay")  # of a role; they may change in a run
MAX_VALUES = 100_000  # values of a recipe or a study, with aliases expanded
FOLDER = Path(__file__).parent / "recipes"
RECIPE = "recipe.yaml"  # in the folder of a run

Preset = Literal["14b", "1.3b", "tiny"]
Activations = Literal["keep", "recompute", "offload"]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """Source of networks that no earlier phase has trained.

    Attributes:
        dit: file of the video transformer; None initialises random weights.
        adapter: file of the audio adapter; None uses the one in the transformer's file.
        preset: sizes of random weights and, in a dry run, of files that do not exist yet. The sizes
            of an existing file are read from it; see ``training.trainer.sizes``.
        video: fields of ``WanConfig`` that differ from these, to train other sizes from scratch.
        audio: the same for ``AudioAdapterConfig``.
    """

    dit: Path | None = None
    adapter: Path | None = None
    preset: Preset = "14b"
    video: Mapping[str, Any] = field(default_factory=dict)
    audio: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Training data.

    Attributes:
        folder: folder of a set that ``training.data`` prepared.
        options: options of its reader.
    """

    folder: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipShape:
    """Shape of one sample; a dry run computes with it.

    Attributes:
        num_frames: video frames, 4n + 1.
        height: height in pixels.
        width: width in pixels.
        num_text_tokens: text tokens; 0 without a prompt.
        num_image_tokens: CLIP tokens; 0 for a model without the image branch.
    """

    num_frames: Count = 81
    height: Count = 720
    width: Count = 1280
    num_text_tokens: Natural = TEXT_LENGTH
    num_image_tokens: Natural = IMAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """Batch of one update.

    Attributes:
        size: samples in one micro-batch.
        count: micro-batches of an update, divided evenly among the ranks. A rank with several
            accumulates gradients, so the result does not depend on the number of ranks.
    """

    size: Count = 1
    count: Count = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """Engine that trains the networks.

    Attributes:
        kind: plain for one device, deepspeed for any number.
        num_ranks: number of GPUs that a dry run plans for; a run uses all that it was started with.
        zero_stage: what DeepSpeed divides: 1 optimiser states, 2 also gradients, 3 also weights.
        offload: what DeepSpeed keeps in the CPU's memory: none, optimizer, weights (and optimizer).
        precision: precision of weights and gradients; mixed is float32 with network calls in
            bfloat16, except those of a discriminator (plain only).
        activations: what is kept for the backward pass: keep (everything), recompute (the inputs of
            blocks, whose insides are recomputed), or offload (those inputs, in the CPU's memory).
        optimizer: adamw, or muon for the matrices of blocks (plain only).
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
    """Learning rate over the steps of each phase.

    Attributes:
        kind: constant, or cosine down to one fiftieth.
        num_warmup_steps: steps of linear growth at the start.
        without_warmup: roles that begin with the peak rate. A discriminator starts with an output
            of zero and must be ahead of the student.
    """

    kind: Literal["constant", "cosine"] = "constant"
    num_warmup_steps: Natural = 0
    without_warmup: tuple[str, ...] = ("discriminator",)


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageChoice:
    """Running average of weights (EMA); a phase ends with the average, not the last weights.

    Attributes:
        roles: roles that keep an average.
        decay: fraction of the average that remains per update.
        start: steps of a phase before the averages begin, whatever the number of updates in them.
    """

    roles: tuple[str, ...] = ("student", "teacher")
    decay: Annotated[float, Ge(0), Le(1)] = 0.99
    start: Natural = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointChoice:
    """Times at which checkpoints are written.

    Attributes:
        every: steps between two checkpoints.
        keep: number of newest checkpoints to keep.
    """

    every: Count = 100
    keep: Count = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationChoice:
    """Validation while the run trains; see ``training.trainer.validation``.

    Attributes:
        folder: prepared set of clips that are not trained on.
        every: steps between two validations; the end of a phase is one, too.
        clips: number of clips, the same ones each time.
        vae: the VAE of the set, to write samples as videos; null measures the loss alone.
        steps: steps of a teacher's samples; a student has its own number.
    """

    folder: Path
    every: Count = 100
    clips: Count = 2
    vae: Path | None = None
    steps: Count = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GapSeenAndClosed:
    """End of an adversarial phase: the discriminator has found a difference, the student closed it.

    The logit gap, real minus student, is averaged over the last ``window`` steps.

    Attributes:
        seen: the average must have been above this value,
        closed: and be at most this value afterwards.
        window: number of steps of the average.
    """

    seen: Annotated[float, Gt(0)] = 0.05
    closed: float = 0.02
    window: Count = 20

    def __post_init__(self) -> None:
        if self.closed >= self.seen:
            raise RecipeError(
                f"got a phase that ends at a logit gap of {self.closed:g} after one above "
                f"{self.seen:g}; closed must be smaller than seen"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Part of a run; its networks continue from the end of the phase before.

    Attributes:
        method: name of the method.
        steps: steps of the training loop; a step makes one update or several.
        num_frames: video frames per sample; null uses the recipe's. Longer clips of the set are
            cut.
        batch: batch of an update; null uses the recipe's.
        settings: settings of the method, by the names of its fields.
        exports: role whose model files are written at the end of the phase; null writes none.
        extrapolation: position of that role's final weights on the straight line from its start
            (0) through its average (1). Values above 1 go beyond the average: with few samples per
            update its direction is good, but its distance from the start too short.
            Source: ExPO, arXiv 2404.16792 [inferred: there between two stages of alignment].
        ships_with: settings for the metadata of these files, named as in a request.
        ends: condition that ends the phase before its last step; null for none.
    """

    method: str
    steps: Natural
    num_frames: Count | None = None
    batch: BatchShape | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    exports: str | None = None
    extrapolation: Annotated[float, Ge(1)] = 1.0
    ships_with: Mapping[str, Any] = field(default_factory=dict)
    ends: GapSeenAndClosed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All settings of a training run.

    Attributes:
        seed: seed of all random draws.
        weights: initial weights, by the name that roles refer to.
        data: training data.
        clip: shape of one sample.
        batch: batch of an update.
        engine: engine that trains the networks.
        rate: learning rate over a phase.
        average: running average of weights.
        checkpoints: when checkpoints are written.
        guard: limits of the divergence check.
        phases: phases by name, in order.
        salt: change it in a run that meets a term that is not finite again and again: noise, noise
            levels and random decisions are other ones from the resumed step on. The order of the
            samples stays.
        validate: validation on held-out clips; null for none.
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
    salt: Natural = 0
    validate: ValidationChoice | None = None

    @property
    def num_steps(self) -> int:
        """Number of steps of all phases."""
        return sum(phase.steps for phase in self.phases.values())

    def fingerprint(self, phase: int) -> str:
        """Compute a digest of the settings that decided the weights so far.

        A run can resume from a checkpoint only if the digests are equal. The digest leaves out
        files, whose content is compared instead, the distribution over ranks, the numbers of
        steps, checkpoint and divergence settings, later phases, settings that take effect when the
        current phase ends, and those of ``list_changeable``.

        Args:
            phase: number of the run's current phase.

        Returns:
            The digest.
        """
        plain = to_plain(self)
        plain["phases"] = dict(list(plain["phases"].items())[: phase + 1])
        for key in ("checkpoints", "guard", "data", "rate", "salt", "validate"):
            del plain[key]
        del plain["engine"]["clip_norm"]
        plain["average"] = {"roles": plain["average"]["roles"]}
        for settings in plain["phases"].values():
            settings["settings"] = _without_learning(settings["settings"])
        return _digest(plain, phase)

    def list_fingerprints(self, phase: int) -> set[str]:
        """Return ``fingerprint`` and the one of checkpoints from before rates could change."""
        plain = to_plain(self)
        plain["phases"] = dict(list(plain["phases"].items())[: phase + 1])
        for key in ("checkpoints", "guard", "data", "salt", "validate"):
            del plain[key]
        del plain["rate"]["without_warmup"]
        return {self.fingerprint(phase), _digest(plain, phase)}

    def list_changeable(self, phase: int) -> dict[str, Any]:
        """List the settings that act on the weights and may change when a run resumes.

        Args:
            phase: number of the run's current phase.

        Returns:
            Plain values by the path of their key.
        """
        plain = to_plain(self)
        name, current = list(plain["phases"].items())[phase]
        found = {"salt": plain["salt"], "engine.clip_norm": plain["engine"]["clip_norm"]}
        for section, keys in (("average", ("decay", "start")), ("rate", plain["rate"])):
            found |= {f"{section}.{key}": plain[section][key] for key in keys}
        for role, settings in current["settings"].items():
            if isinstance(settings, Mapping):
                place = f"phases.{name}.settings.{role}"
                found |= {f"{place}.{k}": v for k, v in settings.items() if k in LEARNING}
        return found

    def clip_of(self, phase: Phase) -> ClipShape:
        """Return the shape of one sample of a phase."""
        num_frames = phase.num_frames or self.clip.num_frames
        return dataclasses.replace(self.clip, num_frames=num_frames)

    def batch_of(self, phase: Phase) -> BatchShape:
        """Return the batch shape of a phase's updates."""
        return phase.batch or self.batch

    def settings_of(
        self, role: str, learning: Any, *, starts_at: int = 0, every: int = 1
    ) -> EngineSettings:
        """Return the engine's settings for a role.

        Args:
            role: name of the role.
            learning: ``Learning`` of its ``RoleSpec``.
            starts_at: steps of the phase before the role's first update.
            every: steps per update from there on.

        Returns:
            Settings with learning rates from the method and everything else from the recipe.
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
            ema_start=max(0, self.average.start - starts_at) // every,
            uses_checkpointing=self.engine.activations != "keep",
        )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and all recipes that it derives from.

    Args:
        name: name of a recipe in ``training/recipes``, or path of a YAML file.
        overrides: ``key.key=value``, with values in YAML.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: if there is no such recipe, its bases form a circle, a key is unknown, or a
            value is out of range.
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
    """Write a recipe as one YAML file without a base; ``load_recipe`` reads it back unchanged.

    Args:
        recipe: resolved recipe.
        path: YAML file; its folder is created if it does not exist.

    Raises:
        OutputError: if the file cannot be written.
    """
    text = yaml.safe_dump(to_plain(recipe), sort_keys=False, allow_unicode=True)
    make_folder(path.parent)
    write_text(path, text)


def to_plain(value: Any) -> Any:
    """Convert a dataclass to plain values of JSON and YAML."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def parse(kind: type[T], data: Any, where: str) -> T:
    """Build a dataclass from the values of a YAML file, and reject unknown keys.

    Args:
        kind: the dataclass; its fields may be dataclasses, and mappings of them.
        data: mappings, lists and plain values.
        where: name of the file or section, for messages.

    Returns:
        An instance of ``kind``.

    Raises:
        RecipeError: if a key is unknown or missing, or a value has the wrong type or range.
    """
    _check_keys(kind, data, where, ())
    try:
        value = TypeAdapter(kind).validate_python(data)
        _check_numbers(value, where, ())
        return value
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"{where}: {place or 'it'} is {first['input']!r}: {first['msg']}; change it there"
        ) from error


def _check_numbers(value: Any, where: str, path: tuple[str, ...]) -> None:
    """Check that all numbers are finite, and whole ones no larger than a tensor can hold."""
    if dataclasses.is_dataclass(value):
        parts: Any = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    elif isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        parts = ()
    for name, part in parts:
        _check_numbers(part, where, (*path, str(name)))
    # A float that is not finite compares as false, too.
    if isinstance(value, int | float) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
        raise RecipeError(
            f"{where}: {'.'.join(path) or 'it'} is {value}; give a finite number of at most "
            f"{LARGEST_NUMBER}"
        )


def _digest(plain: dict[str, Any], phase: int) -> str:
    """Compute the digest of a plain recipe without what never decides the weights."""
    for key in ("num_ranks", "zero_stage", "offload", "activations", "timeout_seconds"):
        del plain["engine"][key]
    for number, settings in enumerate(plain["phases"].values()):
        for key in ("exports", "ships_with", "steps", "ends"):
            del settings[key]
        # In the current phase it has no effect before the end; 1 never has one.
        if number == phase or settings["extrapolation"] == 1:
            del settings["extrapolation"]
    for name, source in plain["weights"].items():
        plain["weights"][name] = {key: source[key] for key in ("video", "audio")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _without_learning(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the learning settings out of a method's settings, and roles that have no other."""
    kept = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            value = {key: inner for key, inner in value.items() if key not in LEARNING}
            if not value:
                continue
        kept[name] = value
    return kept


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
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"cannot read the recipe {path}: {reason}") from error
    data = parse_yaml(text, name)
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {name} is no mapping of keys to values; write key: value")
    base = data.pop("base", None)
    if base is None:
        return data
    beside = path.parent / f"{base}.yaml"
    return _merge(_read_derived(str(beside) if beside.is_file() else base, (*seen, path)), data)


def parse_yaml(text: str, where: str) -> Any:
    """Parse plain YAML, which cannot create Python objects.

    Args:
        text: text of a recipe or a study.
        where: name of the file, for messages.

    Returns:
        Mappings, lists and plain values.

    Raises:
        RecipeError: if the text is not YAML, or has more than ``MAX_VALUES`` values. A few lines of
            nested aliases can expand to any number.
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
    """Count values with aliases expanded; the count of an alias inside itself is infinite."""
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
