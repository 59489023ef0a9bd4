"""Sizes of the initial networks of a recipe, from their files or else from a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from training.recipe import Preset, Recipe, WeightSource
from turbotalk_core.checkpoints.inspect import (
    ADAPTER,
    ADAPTER_MARK,
    DIT,
    infer_adapter_heads,
    infer_dit,
    infer_projection,
    inspect,
)
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
    """Add the sizes of all networks to a recipe, so that it needs neither files nor presets.

    Args:
        recipe: recipe as loaded.

    Returns:
        The recipe with ``video`` and ``audio`` of each source of weights.

    Raises:
        CheckpointError: if a file exists and cannot be read.
    """
    weights = {name: resolve_source(source) for name, source in recipe.weights.items()}
    return replace(recipe, weights=weights)


def resolve_source(source: WeightSource) -> WeightSource:
    """Add the sizes of a network to its source of weights.

    Args:
        source: source of weights. Sizes that it contains take precedence, so that a file with other
            sizes is refused when it is loaded.

    Returns:
        The source; its ``video`` and ``audio`` contain all sizes that differ from the 14B model's.

    Raises:
        CheckpointError: if a file exists and cannot be read.
    """
    sizes = PRESETS[source.preset]
    if source.dit is not None and source.dit.exists():
        sizes = _read_sizes(source.dit, source.adapter, sizes)
    return replace(
        source,
        preset="14b",
        video={**sizes.video, **source.video},
        audio={**sizes.audio, **source.audio},
    )


def _read_sizes(dit: Path, adapter: Path | None, preset: Sizes) -> Sizes:
    """Read the sizes from the headers of both files; those of a missing adapter from the preset."""
    info = inspect(dit)
    if info.kind != DIT:
        return preset  # loading refuses the file, with the reason
    video = asdict(infer_dit(info.header.shapes, info.header.metadata, dit))
    del video["audio_heads"], video["audio_token_dim"]  # in the adapter's file
    kind = DIT
    if adapter is not None and adapter.exists():
        info, kind = inspect(adapter), ADAPTER
    shapes, path = info.header.shapes, info.path
    if info.kind != kind or ADAPTER_MARK not in shapes:
        names = ("audio_heads", "audio_token_dim")
        video |= {name: preset.video[name] for name in names if name in preset.video}
        return Sizes(video=_select_differing(WanConfig, video), audio=preset.audio)
    projection = infer_projection(shapes, path)
    width = shapes["blocks.0.audio_cross_attn.proj.weight"][0]
    video["audio_heads"] = infer_adapter_heads(width, info.header.metadata, path)
    video["audio_token_dim"] = projection.token_dim
    return Sizes(
        video=_select_differing(WanConfig, video),
        audio=_select_differing(AudioAdapterConfig, asdict(projection)),
    )


def _select_differing(kind: type[Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {entry.name: entry.default for entry in fields(kind)}
    return {name: value for name, value in sizes.items() if value != defaults[name]}
