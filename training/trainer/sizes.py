"""Sizes of the networks that a recipe starts from: read from their files, else from a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from training.recipe import Preset, Recipe, WeightSource
from turbotalk_core.checkpoints.inspect import DIT, inspect
from turbotalk_core.checkpoints.tensors import read_header
from turbotalk_core.models.audio_adapter import AudioAdapterConfig
from turbotalk_core.models.wan import WanConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes that differ from the 14B model's, which are the defaults of both configurations.

    Attributes:
        video: fields of ``WanConfig``.
        audio: fields of ``AudioAdapterConfig``.
    """

    video: Mapping[str, Any] = field(default_factory=dict)
    audio: Mapping[str, Any] = field(default_factory=dict)


PRESETS: Mapping[Preset, Sizes] = {
    "14b": Sizes(),
    "1.3b": Sizes(
        video={"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "audio_heads": 12}
    ),
    "tiny": Sizes(
        video={
            "dim": 192,
            "ffn_dim": 512,
            "num_heads": 6,
            "num_layers": 6,
            "text_dim": 32,
            "image_dim": None,
            "audio_heads": 6,
            "audio_token_dim": 64,
        },
        audio={"frame_width": 384, "hidden_dim": 128, "num_tokens": 4, "token_dim": 64},
    ),
}
"""Wan 2.1 14B and 1.3B with InfiniteTalk's adapter, and the embedded family."""


def resolve_recipe(recipe: Recipe) -> Recipe:
    """Write the sizes of all networks into a recipe, so that it needs neither files nor presets.

    Args:
        recipe: as loaded.

    Returns:
        The recipe with ``video`` and ``audio`` of each source of weights.

    Raises:
        CheckpointError: a file that is there and cannot be read.
    """
    weights = {name: resolve_source(source) for name, source in recipe.weights.items()}
    return replace(recipe, weights=weights)


def resolve_source(source: WeightSource) -> WeightSource:
    """Write the sizes of a network where the recipe names them.

    Args:
        source: sizes that it states itself win, so that a file with others is refused at loading.

    Returns:
        The source; its ``video`` and ``audio`` say all sizes that differ from the 14B model's.

    Raises:
        CheckpointError: a file that is there and cannot be read.
    """
    known = PRESETS[source.preset]
    if source.dit is not None and source.dit.exists():
        known = _read_sizes(source.dit, source.adapter, known)
    return replace(
        source,
        preset="14b",
        video={**known.video, **source.video},
        audio={**known.audio, **source.audio},
    )


def _read_sizes(dit: Path, adapter: Path | None, preset: Sizes) -> Sizes:
    """Read the sizes in the headers of both files; of what is not there, those of the preset."""
    info, shapes = inspect(dit), read_header(dit).shapes
    if info.kind != DIT:
        return preset  # loading says what the file is
    video: dict[str, Any] = {
        "dim": info.sizes["width"],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_heads": info.sizes["heads"],
        "num_layers": info.sizes["layers"],
        "in_channels": info.sizes["input channels"],
        "text_dim": info.sizes["text width"],
        "frequency_dim": shapes["time_embedding.0.weight"][1],
        "image_dim": info.sizes["image width"] or None,
    }
    heads = info.sizes.get("audio heads")
    if adapter is not None and adapter.exists():
        info, shapes = inspect(adapter), read_header(adapter).shapes
        heads = info.sizes.get("heads")
    if heads is None or "token width" not in info.sizes:
        names = ("audio_heads", "audio_token_dim")
        video |= {name: preset.video[name] for name in names if name in preset.video}
        return Sizes(video=_differing(WanConfig, video), audio=preset.audio)
    video |= {"audio_heads": heads, "audio_token_dim": info.sizes["token width"]}
    audio = {
        "frame_width": info.sizes["audio values per frame"],
        "hidden_dim": shapes["audio_proj.proj1.weight"][0],
        "num_tokens": info.sizes["tokens per latent frame"],
        "token_dim": info.sizes["token width"],
    }
    return Sizes(video=_differing(WanConfig, video), audio=_differing(AudioAdapterConfig, audio))


def _differing(kind: type[Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {known.name: known.default for known in fields(kind)}
    return {name: value for name, value in sizes.items() if value != defaults[name]}
