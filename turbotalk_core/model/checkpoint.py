"""Model files: what they are, and networks out of and into them.

Every file is safetensors in the key layout of the public checkpoints. Sizes are read off the
shapes; what shapes cannot tell stands in the file's metadata: ``config`` as ComfyUI reads it
(``{"transformer": {"num_heads": …}}``), and ``turbotalk`` with the settings a file ships with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import CheckpointError, MismatchError, OutputError
from .audio_adapter import FIRST_WINDOW, AudioAdapterConfig, AudioProjection
from .lora import merge_lora
from .vae import WanVAE
from .wan import WanConfig, WanModel

HEAD_DIM = 128  # Wan 2.1, every size: where a file does not name its heads
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
PROJECTION_PREFIX = "audio_proj."

DIT = "video transformer"
ADAPTER = "audio adapter"
VAE = "video VAE"
AUDIO_ENCODER = "audio encoder"
LORA = "LoRA"
UNKNOWN = "unknown"

_MARKS = {  # a key, without prefix, that only this kind has
    "head.modulation": DIT,
    "audio_proj.proj1.weight": ADAPTER,
    "decoder.middle.0.residual.0.gamma": VAE,
    "feature_projection.projection.weight": AUDIO_ENCODER,
}
_USES = {
    DIT: "ComfyUI: models/diffusion_models, Load Diffusion Model; command line: --dit",
    ADAPTER: "ComfyUI: models/model_patches, Load audio adapter; command line: --adapter",
    VAE: "ComfyUI: models/vae, Load VAE; command line: --vae",
    AUDIO_ENCODER: "ComfyUI: models/audio_encoders, Load audio encoder; command line: --encoder",
    LORA: "ComfyUI: models/loras, Load LoRA on the video transformer",
    UNKNOWN: "nothing here; TurboTalk reads Wan 2.1 transformers and VAEs, InfiniteTalk audio "
    "adapters and wav2vec2 encoders",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a model file is, from its header alone.

    Attributes:
        path: of the file.
        kind: one of this module's kind names.
        sizes: named dimensions that the shapes tell.
        num_parameters: stored values in all.
        dtypes: number of tensors stored in each dtype.
        settings: what the file ships with (metadata ``turbotalk``).
        metadata: the rest of the file's metadata.
        uses: where the file can be used.
    """

    path: Path
    kind: str
    sizes: dict[str, int]
    num_parameters: int
    dtypes: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    uses: str = ""

    def lines(self) -> list[str]:
        """Describe the file for people, a fact a line."""
        lines = [f"{self.path.name}: {self.kind}, {self.num_parameters:,} parameters"]
        lines += [f"  {name}: {value}" for name, value in self.sizes.items()]
        stored = ", ".join(f"{count} x {name}" for name, count in self.dtypes.items())
        lines.append(f"  tensors: {stored}")
        lines += [f"  ships with {name}: {value}" for name, value in self.settings.items()]
        lines += [f"  metadata {name}: {value}" for name, value in self.metadata.items()]
        lines.append(f"  use: {self.uses}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Describe the file for programs."""
        return {
            "file": self.path.name,
            "kind": self.kind,
            "sizes": self.sizes,
            "num_parameters": self.num_parameters,
            "dtypes": self.dtypes,
            "settings": self.settings,
            "metadata": self.metadata,
            "uses": self.uses,
        }


def inspect(path: Path) -> CheckpointInfo:
    """Say what a model file is without loading its tensors.

    Args:
        path: a safetensors file.

    Returns:
        Its kind, sizes, dtypes and settings.

    Raises:
        CheckpointError: no such file, or not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, int] = {}
    with _open(path) as file:
        metadata = dict(file.metadata() or {})
        for key in file.keys():  # noqa: SIM118 (the reader is no mapping)
            part = file.get_slice(key)
            shapes[key] = tuple(part.get_shape())
            dtypes[part.get_dtype()] = dtypes.get(part.get_dtype(), 0) + 1
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    shapes = _strip_prefixes(shapes)
    kind = next((kind for mark, kind in _MARKS.items() if _has(shapes, mark)), UNKNOWN)
    if kind == UNKNOWN and any(
        ".lora_" in key or key.endswith((".diff", ".diff_b")) for key in shapes
    ):
        kind = LORA
    settings = _parse_json(metadata.pop("turbotalk", "{}"), path)
    sizes: dict[str, int] = {}
    if kind == DIT:
        config = _infer_dit(shapes, metadata, path)
        sizes = {
            "width": config.dim,
            "layers": config.num_layers,
            "heads": config.num_heads,
            "input channels": config.in_channels,
            "text width": config.text_dim,
            "image width": config.image_dim or 0,
        }
    elif kind == ADAPTER:
        config = _infer_projection(shapes, path)
        width = _shape(shapes, "blocks.0.audio_cross_attn.proj.weight", path)[0]
        sizes = {
            "video width": width,
            "layers": _count_blocks(shapes),
            "heads": _adapter_heads(width, metadata, path),
            "audio values per frame": config.frame_width,
            "tokens per latent frame": config.num_tokens,
            "token width": config.token_dim,
        }
    elif kind == VAE:
        sizes = {"width": _shape(shapes, "decoder.head.0.gamma", path)[0]}
    elif kind == AUDIO_ENCODER:
        key = next(key for key in shapes if key.endswith("feature_projection.projection.weight"))
        sizes = {
            "width": shapes[key][0],
            "layers": len(
                {k.split(".layers.")[1].split(".")[0] for k in shapes if ".layers." in k}
            ),
        }
    return CheckpointInfo(
        path=Path(path),
        kind=kind,
        sizes=sizes,
        num_parameters=num_parameters,
        dtypes=dtypes,
        settings=settings,
        metadata=metadata,
        uses=_USES[kind],
    )


def load_dit(
    path: Path,
    adapter_path: Path | None = None,
    dtype: torch.dtype = torch.float32,
    loras: Sequence[tuple[Path, float]] = (),
) -> tuple[WanModel, AudioProjection | None]:
    """Build the video transformer, with its audio attention where an adapter is given.

    Args:
        path: file of the transformer.
        adapter_path: file of the audio adapter.
        dtype: of the weights in memory.
        loras: LoRA files to merge into the weights, each with its strength.

    Returns:
        The transformer, and the adapter's projection from audio windows to tokens.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another kind.
        MismatchError: an adapter or a LoRA made for another transformer.
    """
    tensors, metadata = _read(path, DIT)
    config = _infer_dit({k: tuple(t.shape) for k, t in tensors.items()}, metadata, path)
    projection, source = None, path.name
    audio: dict[str, Any] = {"audio_heads": None}
    if adapter_path is not None:
        extra, extra_metadata = _read(adapter_path, ADAPTER)
        shapes = {key: tuple(tensor.shape) for key, tensor in extra.items()}
        width = _shape(shapes, "blocks.0.audio_cross_attn.proj.weight", adapter_path)[0]
        if (width, _count_blocks(shapes)) != (config.dim, config.num_layers):
            raise MismatchError(
                f"{adapter_path.name} is for a transformer of width {width} and "
                f"{_count_blocks(shapes)} layers, {path.name} has width {config.dim} and "
                f"{config.num_layers} layers; load the adapter of the same family"
            )
        projection_config = _infer_projection(shapes, adapter_path)
        audio = {
            "audio_heads": _adapter_heads(width, extra_metadata, adapter_path),
            "audio_token_dim": projection_config.token_dim,
        }
        with torch.device("meta"):
            projection = AudioProjection(projection_config)
        _assign(
            projection,
            {
                key.removeprefix(PROJECTION_PREFIX): tensor
                for key, tensor in extra.items()
                if key.startswith(PROJECTION_PREFIX)
            },
            adapter_path.name,
            dtype,
        )
        source = f"{path.name} with {adapter_path.name}"
        tensors |= {k: t for k, t in extra.items() if not k.startswith(PROJECTION_PREFIX)}
    if loras:  # changes smaller than a stored weight's last digit count together
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    for lora_path, strength in loras:
        lora, _ = _read(lora_path, LORA)
        merge_lora(tensors, lora, strength)
    with torch.device("meta"):
        model = WanModel(_with_audio(config, audio))
    _assign(model, tensors, source, dtype)
    return model, projection


def load_vae(path: Path, dtype: torch.dtype = torch.float32) -> WanVAE:
    """Build the video VAE of a file.

    Args:
        path: safetensors file in the layout of the public Wan 2.1 VAE.
        dtype: of the weights in memory.

    Returns:
        The VAE.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another kind.
    """
    tensors, _ = _read(path, VAE)
    vae = WanVAE(tensors["decoder.head.0.gamma"].shape[0])
    _assign(vae, tensors, path.name, dtype)
    return vae


def save_dit(path: Path, model: WanModel, settings: Mapping[str, Any]) -> None:
    """Write the transformer without its audio modules, in float16.

    Args:
        path: file to write.
        model: the transformer.
        settings: what it ships with, kept in the metadata.

    Raises:
        OutputError: the file cannot be written.
    """
    transformer = {"num_heads": model.config.num_heads, "text_dim": model.config.text_dim}
    metadata = {
        "config": json.dumps({"transformer": transformer}),
        "turbotalk": json.dumps(dict(settings)),
    }
    tensors = {key: t for key, t in model.state_dict().items() if not _is_audio(key)}
    _write(path, tensors, metadata)


def save_adapter(
    path: Path, model: WanModel, projection: AudioProjection, settings: Mapping[str, Any]
) -> None:
    """Write the audio modules of a transformer and their projection, in float16.

    Args:
        path: file to write.
        model: a transformer with audio attention.
        projection: from audio windows to tokens.
        settings: kept in the metadata.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors = {PROJECTION_PREFIX + key: t for key, t in projection.state_dict().items()}
    tensors |= {key: t for key, t in model.state_dict().items() if _is_audio(key)}
    metadata = {
        "config": json.dumps({"audio_heads": model.config.audio_heads}),
        "turbotalk": json.dumps(dict(settings)),
    }
    _write(path, tensors, metadata)


def save_vae(path: Path, vae: WanVAE, note: Mapping[str, Any]) -> None:
    """Write a VAE in float16.

    Args:
        path: file to write.
        vae: the VAE.
        note: kept in the metadata.

    Raises:
        OutputError: the file cannot be written.
    """
    _write(path, vae.state_dict(), {"turbotalk": json.dumps(dict(note))})


def _is_audio(key: str) -> bool:
    return ".audio_cross_attn." in key or ".norm_x." in key


def _open(path: Path) -> Any:  # noqa: ANN401 (safetensors has no type for its reader)
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no model file {path}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} is not a readable safetensors file ({error}); download it again"
        ) from error


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    info = inspect(path)
    if info.kind != kind:
        raise CheckpointError(
            f"{info.path.name} is: {info.kind}; needed here: {kind}. "
            f"What this file is for: {info.uses}"
        )
    with _open(path) as file:
        metadata = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return _strip_prefixes(tensors), metadata


def _strip_prefixes(entries: dict[str, Any]) -> dict[str, Any]:
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in entries):
            return {key.removeprefix(prefix): value for key, value in entries.items()}
    return entries


def _has(shapes: Mapping[str, Any], mark: str) -> bool:
    return mark in shapes or f"wav2vec2.{mark}" in shapes


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str, path: Path) -> tuple[int, ...]:
    if key not in shapes:
        raise CheckpointError(f"{Path(path).name} lacks {key}; the file is incomplete")
    return shapes[key]


def _count_blocks(shapes: Mapping[str, Any]) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})


def _infer_dit(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], path: Path
) -> WanConfig:
    dim = _shape(shapes, "head.modulation", path)[-1]
    told = _parse_json(metadata.get("config", "{}"), path).get("transformer", {})
    if not isinstance(told, dict):
        raise CheckpointError(
            f"the metadata of {Path(path).name} describes the transformer as {told!r}; it must be "
            "a JSON object"
        )
    image = shapes.get("img_emb.proj.0.bias")
    return WanConfig(
        dim=dim,
        ffn_dim=_shape(shapes, "blocks.0.ffn.0.weight", path)[0],
        num_heads=_read_heads(told, "num_heads", dim, path),
        num_layers=_count_blocks(shapes),
        in_channels=_shape(shapes, "patch_embedding.weight", path)[1],
        text_dim=_shape(shapes, "text_embedding.0.weight", path)[1],
        frequency_dim=_shape(shapes, "time_embedding.0.weight", path)[1],
        image_dim=image[0] if image else None,
        audio_heads=None,
    )


def _with_audio(config: WanConfig, audio: Mapping[str, Any]) -> WanConfig:
    values = {name: getattr(config, name) for name in WanConfig.__dataclass_fields__}
    return WanConfig(**(values | dict(audio)))


def _infer_projection(shapes: Mapping[str, tuple[int, ...]], path: Path) -> AudioAdapterConfig:
    hidden, first = _shape(shapes, "audio_proj.proj1.weight", path)
    token_dim = _shape(shapes, "audio_proj.norm.weight", path)[0]
    return AudioAdapterConfig(
        frame_width=first // FIRST_WINDOW,
        hidden_dim=hidden,
        num_tokens=_shape(shapes, "audio_proj.proj3.weight", path)[0] // token_dim,
        token_dim=token_dim,
    )


def _adapter_heads(width: int, metadata: Mapping[str, str], path: Path) -> int:
    told = _parse_json(metadata.get("config", "{}"), path)
    return _read_heads(told, "audio_heads", width, path)


def _read_heads(told: Mapping[str, Any], name: str, width: int, path: Path) -> int:
    heads = told.get(name, max(1, width // HEAD_DIM))
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise CheckpointError(
            f"{Path(path).name} has {heads!r} attention heads for a width of {width}; they must "
            f"divide it, so save the file again with the right {name} in its metadata"
        )
    return heads


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"the metadata of {Path(path).name} is not JSON ({error}); save the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"the metadata of {Path(path).name} is not a JSON object")
    return value


def _assign(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str, dtype: torch.dtype
) -> None:
    """Give a module its weights, all of them, and complain of any that are left or wrong."""
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in tensors]
    extra = [key for key in tensors if key not in wanted]
    wrong = [k for k in wanted if k in tensors and wanted[k].shape != tensors[k].shape]
    if missing or extra or wrong:
        raise CheckpointError(
            f"{source} does not fit: {len(missing)} tensors are missing, {len(extra)} "
            f"unknown, {len(wrong)} of another shape (first: {(missing + extra + wrong)[0]}); "
            "the file is damaged or of a model that TurboTalk does not know"
        )
    module.load_state_dict({key: tensors[key].to(dtype) for key in wanted}, assign=True)
    module.requires_grad_(False).eval()


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    halved = {key: t.detach().half().contiguous() for key, t in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(save(halved, metadata))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error}); free space or choose another") from error
