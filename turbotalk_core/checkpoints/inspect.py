"""Kind, sizes and use of a model file, from its header alone.

Files have the key layout of the public checkpoints; ``checkpoints.tensors`` opens them in any
format. Sizes follow from the shapes. The metadata contain what shapes do not determine: ``config``
as ComfyUI reads it (``{"transformer": {"num_heads": …}}``), and ``turbotalk`` with the settings a
file ships with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..geometry import FIRST_WINDOW, LATENT_CHANNELS, MASK_CHANNELS
from ..models.audio_adapter import AudioAdapterConfig
from ..models.wan import WanConfig
from ..safe_io.json import parse_json
from ..safe_io.tensor_header import MAX_LAYERS
from .tensors import WeightHeader, read_header

HEAD_DIM = 128  # Wan 2.1, every size: used if the metadata do not contain the number of heads

DIT = "video transformer"
ADAPTER = "audio adapter"
VAE = "video VAE"
AUDIO_ENCODER = "audio encoder"
LORA = "LoRA"
TEXT_ENCODER = "text encoder"
IMAGE_ENCODER = "image encoder"
UNKNOWN = "unknown"

ADAPTER_MARK = "audio_proj.proj1.weight"
_MARKS = {  # keys, without prefix, that identify a kind
    "head.modulation": DIT,
    ADAPTER_MARK: ADAPTER,
    "decoder.middle.0.residual.0.gamma": VAE,
    "feature_projection.projection.weight": AUDIO_ENCODER,
    "wav2vec2.feature_projection.projection.weight": AUDIO_ENCODER,
    "encoder.block.0.layer.0.SelfAttention.q.weight": TEXT_ENCODER,
    "token_embedding.weight": TEXT_ENCODER,
    "vision_model.encoder.layers.0.mlp.fc1.weight": IMAGE_ENCODER,
    "visual.transformer.0.attn.to_qkv.weight": IMAGE_ENCODER,
}
_USES = {
    DIT: "ComfyUI: models/diffusion_models, Load Diffusion Model; command line: --dit",
    ADAPTER: "ComfyUI: models/model_patches, Load audio adapter; command line: --adapter",
    VAE: "ComfyUI: models/vae, Load VAE; command line: --vae",
    AUDIO_ENCODER: "ComfyUI: models/audio_encoders, Load audio encoder; command line: --encoder",
    LORA: "ComfyUI: models/loras, Load LoRA on the video transformer; command line: --lora",
    TEXT_ENCODER: (
        "ComfyUI: models/text_encoders, Load CLIP with type wan; command line: --text-encoder"
    ),
    IMAGE_ENCODER: ("ComfyUI: models/clip_vision, Load CLIP Vision; command line: --image-encoder"),
    UNKNOWN: "nothing here; TurboTalk reads Wan 2.1 transformers and VAEs, InfiniteTalk audio "
    "adapters and wav2vec2 encoders",
}
_LAYERS = {  # prefixes of the names of a kind's layers
    DIT: ("blocks.",),
    ADAPTER: ("blocks.",),
    AUDIO_ENCODER: ("encoder.layers.", "wav2vec2.encoder.layers."),
    TEXT_ENCODER: ("encoder.block.", "blocks."),
    IMAGE_ENCODER: ("vision_model.encoder.layers.", "visual.transformer."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """Description of a model file, from its header alone.

    Attributes:
        path: path of the file.
        kind: one of this module's kind names.
        sizes: named dimensions that follow from the shapes.
        num_parameters: number of all weights' elements, without scales of a quantised file.
        dtypes: number of tensors stored in each dtype, including scales.
        settings: settings that the file ships with (metadata ``turbotalk``).
        metadata: the rest of the file's metadata.
        uses: text about where the file can be used, and with what.
        num_files: number of files; more than one for a set of shards.
        num_bytes: size of all files.
        prefix: prefix of the tensors' names before their public names.
        quantization: fp8, fp8-scaled, quanto, packed (not supported here), or None for weights
            that are not quantised.
        speakers: number of voices that the audio modules were trained for, as text; None if the
            file has none.
        header: names, shapes and offsets of all tensors, by which the loaders read the weights.
    """

    path: Path
    kind: str
    sizes: dict[str, int]
    num_parameters: int
    dtypes: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    uses: str = ""
    num_files: int = 1
    num_bytes: int = 0
    prefix: str = ""
    quantization: str | None = None
    speakers: str | None = None
    header: WeightHeader = field(repr=False, compare=False)

    def lines(self) -> list[str]:
        """Return the description as lines of text, one fact per line."""
        lines = [f"{self.path.name}: {self.kind}, {self.num_parameters:,} parameters"]
        lines += [f"  {name}: {value}" for name, value in self.sizes.items()]
        stored = ", ".join(f"{count} x {name}" for name, count in self.dtypes.items())
        shards = f", in {self.num_files} files" * (self.num_files > 1)
        lines.append(f"  tensors: {stored}; {self.num_bytes / 1e9:.3f} GB{shards}")
        facts = {
            "quantised": self.quantization,
            "prefix of the names": self.prefix,
            "speakers": self.speakers,
        }
        lines += [f"  {name}: {value}" for name, value in facts.items() if value]
        lines += [f"  ships with {name}: {value}" for name, value in self.settings.items()]
        lines += [f"  metadata {name}: {value}" for name, value in self.metadata.items()]
        lines.append(f"  use: {self.uses}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the description as a JSON object."""
        return {
            "file": self.path.name,
            "kind": self.kind,
            "sizes": self.sizes,
            "num_parameters": self.num_parameters,
            "dtypes": self.dtypes,
            "settings": self.settings,
            "metadata": self.metadata,
            "uses": self.uses,
            "num_files": self.num_files,
            "num_bytes": self.num_bytes,
            "prefix": self.prefix,
            "quantization": self.quantization,
            "speakers": self.speakers,
        }


ModelFile = Path | CheckpointInfo  # a file's path, or its description if that was read before


def inspect(file: ModelFile) -> CheckpointInfo:
    """Return what a model file is, without loading its tensors.

    Args:
        file: path of a file or of a set of shards, as for ``tensors.read_header``; or the
            description of one, which is returned as it is.

    Returns:
        Its kind, sizes, dtypes and settings.

    Raises:
        CheckpointError: if the file is missing or cannot be read.
    """
    return file if isinstance(file, CheckpointInfo) else _describe(read_header(file))


def _describe(header: WeightHeader) -> CheckpointInfo:
    """Return what a model file is; refuse metadata or shapes that no model can have."""
    shapes, path = header.shapes, header.path
    metadata = dict(header.metadata)
    settings = _parse_json(metadata.pop("turbotalk", "{}"), path)
    kind = next((kind for mark, kind in _MARKS.items() if mark in shapes), UNKNOWN)
    if kind == UNKNOWN and any(
        ".lora_" in key or key.endswith((".diff", ".diff_b")) for key in shapes
    ):
        kind = LORA
    sizes: dict[str, int] = {}
    if kind == DIT:
        config = infer_dit(shapes, metadata, path)
        sizes = {
            "width": config.dim,
            "layers": config.num_layers,
            "heads": config.num_heads,
            "input channels": config.in_channels,
            "text width": config.text_dim,
            "image width": config.image_dim or 0,
        }
        if ADAPTER_MARK in shapes:
            sizes |= _size_audio(shapes, metadata, path, heads="audio heads")
    elif kind == ADAPTER:
        width = _shape(shapes, "blocks.0.audio_cross_attn.proj.weight", path, 2)[0]
        sizes = {"video width": width, "layers": _count_layers(shapes, kind, path)}
        sizes |= _size_audio(shapes, metadata, path, heads="heads")
    elif kind == VAE:
        sizes = {"width": _shape(shapes, "decoder.head.0.gamma", path, 4)[0]}
    elif kind == AUDIO_ENCODER:
        key = next(key for key in shapes if key.endswith("feature_projection.projection.weight"))
        width = _shape(shapes, key, path, 2)[0]
        sizes = {"width": width, "layers": _count_layers(shapes, kind, path)}
    elif kind == TEXT_ENCODER:
        key = "shared.weight" if "shared.weight" in shapes else "token_embedding.weight"
        vocabulary, width = _shape(shapes, key, path, 2)
        num_layers = _count_layers(shapes, kind, path)
        sizes = {"width": width, "layers": num_layers, "vocabulary": vocabulary}
    elif kind == IMAGE_ENCODER:
        key = next(key for key in shapes if key.endswith(("fc1.weight", "to_qkv.weight")))
        width = _shape(shapes, key, path, 2)[1]
        sizes = {"width": width, "layers": _count_layers(shapes, kind, path)}
    elif kind == LORA:
        downs = (".lora_down.weight", ".lora_A.weight")
        ranks = [shape[0] for key, shape in shapes.items() if key.endswith(downs) and shape]
        sizes = {"rank": max(ranks), "layers": len(ranks)} if ranks else {}
    return CheckpointInfo(
        path=path,
        kind=kind,
        sizes=sizes,
        num_parameters=sum(stored.numel for stored in header.tensors.values()),
        dtypes=header.dtypes,
        settings=settings,
        metadata=metadata,
        uses=_find_uses(kind, sizes, header),
        num_files=len(header.files),
        num_bytes=header.num_bytes,
        prefix=header.prefix,
        quantization=header.quantization,
        speakers=_find_speakers(shapes, metadata, path) if ADAPTER_MARK in shapes else None,
        header=header,
    )


def infer_dit(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], path: Path
) -> WanConfig:
    """Infer the geometry of a video transformer, without its audio modules.

    Args:
        shapes: shapes of its weights, by public name.
        metadata: metadata of its file; ``config`` may contain the number of heads.
        path: path of the file, for errors.

    Returns:
        The geometry.

    Raises:
        CheckpointError: if a tensor is missing or has the wrong number of axes, or the metadata do
            not fit.
    """
    dim = _shape(shapes, "head.modulation", path, 3)[2]
    config = _parse_json(metadata.get("config", "{}"), path).get("transformer", {})
    if not isinstance(config, dict):
        raise CheckpointError(
            f"the metadata of {Path(path).name} describes the transformer as {config!r}; it must "
            "be a JSON object"
        )
    image = "img_emb.proj.0.bias"
    return WanConfig(
        dim=dim,
        ffn_dim=_shape(shapes, "blocks.0.ffn.0.weight", path, 2)[0],
        num_heads=_read_heads(config, "num_heads", dim, path),
        num_layers=_count_layers(shapes, DIT, path),
        in_channels=_shape(shapes, "patch_embedding.weight", path, 5)[1],
        text_dim=_shape(shapes, "text_embedding.0.weight", path, 2)[1],
        frequency_dim=_shape(shapes, "time_embedding.0.weight", path, 2)[1],
        image_dim=_shape(shapes, image, path, 1)[0] if image in shapes else None,
        audio_heads=None,
    )


def infer_projection(shapes: Mapping[str, tuple[int, ...]], path: Path) -> AudioAdapterConfig:
    """Infer the geometry of the projection from audio windows to tokens.

    Args:
        shapes: shapes of the weights, by public name.
        path: path of the file, for errors.

    Returns:
        The geometry.

    Raises:
        CheckpointError: if a tensor is missing or has the wrong number of axes, or sizes do not
            divide.
    """
    hidden, first = _shape(shapes, "audio_proj.proj1.weight", path, 2)
    token_dim = _shape(shapes, "audio_proj.norm.weight", path, 1)[0]
    last = _shape(shapes, "audio_proj.proj3.weight", path, 2)[0]
    if first % FIRST_WINDOW or last % token_dim:
        raise CheckpointError(
            f"{Path(path).name} projects {first} values to {last}; the first must be a multiple of "
            f"{FIRST_WINDOW} frames, the second of {token_dim}-wide tokens: the file is damaged"
        )
    return AudioAdapterConfig(
        frame_width=first // FIRST_WINDOW,
        hidden_dim=hidden,
        num_tokens=last // token_dim,
        token_dim=token_dim,
    )


def infer_adapter_heads(width: int, metadata: Mapping[str, str], path: Path) -> int:
    """Return the number of heads of the audio attention.

    Args:
        width: width of the video transformer.
        metadata: metadata of the adapter's file; ``config`` may contain the number.
        path: path of the file, for errors.

    Returns:
        The number in the metadata; without one, heads are ``HEAD_DIM`` wide.

    Raises:
        CheckpointError: if the number does not divide the width, or the metadata are not JSON.
    """
    config = _parse_json(metadata.get("config", "{}"), path)
    return _read_heads(config, "audio_heads", width, path)


def _size_audio(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], path: Path, heads: str
) -> dict[str, int]:
    config = infer_projection(shapes, path)
    width = _shape(shapes, "blocks.0.audio_cross_attn.proj.weight", path, 2)[0]
    return {
        heads: infer_adapter_heads(width, metadata, path),
        "audio values per frame": config.frame_width,
        "tokens per latent frame": config.num_tokens,
        "token width": config.token_dim,
    }


def _find_speakers(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], path: Path
) -> str:
    """Return for how many speakers audio modules were trained, as text.

    The released files for one and for several speakers have the same tensor names and shapes, so
    only the names of file and folder differ: for InfiniteTalk's own files, that of the folder.
    """
    width = _shape(shapes, "blocks.0.audio_cross_attn.proj.weight", path, 2)[0]
    if width // infer_adapter_heads(width, metadata, path) % 2:
        return "one: several need audio heads of an even width, to rotate voices apart"
    location = f"{path.absolute().parent.name}/{path.name}".lower()
    for word, meaning in (("multi", "several"), ("single", "one")):
        if word in location:
            return f'{meaning}, going by the word "{word}" in its name'
    return "one, perhaps several: neither tensors nor name tell"


def _find_uses(kind: str, sizes: Mapping[str, int], header: WeightHeader) -> str:
    if header.quantization == "packed" and kind != UNKNOWN:
        return "ComfyUI alone, as far as it knows this quantisation; the command line does not"
    uses = _USES[kind]
    if kind == DIT:
        # Noisy latents, then the mask and the latents of the reference image.
        channels = LATENT_CHANNELS + MASK_CHANNELS + LATENT_CHANNELS
        if sizes["input channels"] != channels:
            return (
                f"nothing here: TurboTalk drives image-to-video Wan 2.1, which has {channels} "
                f"input channels, this one has {sizes['input channels']}"
            )
        if len(header.files) > 1 or header.quantization == "quanto":
            uses = "command line: --dit (ComfyUI wants one file, and does not read quanto's)"
        if "audio heads" in sizes:
            return f"{uses}; its audio adapter is inside"
        return f"{uses}; with an audio adapter for {sizes['layers']} layers of {sizes['width']}"
    if kind == ADAPTER:
        if header.scales:
            uses = "command line: --adapter (in ComfyUI, adapters must be stored without scales)"
        return (
            f"{uses}; with a transformer of {sizes['layers']} layers of {sizes['video width']} and "
            f"an audio encoder of {sizes['audio values per frame']} values per frame"
        )
    if kind == AUDIO_ENCODER:
        return f"{uses}; with an adapter of {sizes['layers'] * sizes['width']} values per frame"
    return uses


def _shape(
    shapes: Mapping[str, tuple[int, ...]], key: str, path: Path, num_axes: int
) -> tuple[int, ...]:
    if key not in shapes:
        raise CheckpointError(f"{Path(path).name} lacks {key}; the file is incomplete")
    if len(shapes[key]) != num_axes:
        raise CheckpointError(
            f"{Path(path).name} has {key} of shape {shapes[key]}, which must have {num_axes} axes; "
            "the file is damaged or of a model that TurboTalk does not know"
        )
    return shapes[key]


def _count_layers(shapes: Mapping[str, Any], kind: str, path: Path) -> int:
    indices = {
        key.removeprefix(prefix).split(".")[0]
        for prefix in _LAYERS[kind]
        for key in shapes
        if key.startswith(prefix)
    }
    if len(indices) > MAX_LAYERS:
        raise CheckpointError(
            f"{Path(path).name} has {len(indices)} layers, at most {MAX_LAYERS} are read; the file "
            "is damaged or of a model that TurboTalk does not know"
        )
    return len(indices)


def _read_heads(config: Mapping[str, Any], name: str, width: int, path: Path) -> int:
    heads = config.get(name, max(1, width // HEAD_DIM))
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise CheckpointError(
            f"{Path(path).name} has {heads!r} attention heads for a width of {width}; they must "
            f"divide it, so save the file again with the right {name} in its metadata"
        )
    return heads


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise CheckpointError(
            f"the metadata of {Path(path).name} is not JSON ({error}); save the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"the metadata of {Path(path).name} is not a JSON object")
    return value
