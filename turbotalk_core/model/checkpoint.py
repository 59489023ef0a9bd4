"""Model files: what they are, and networks out of and into them.

Files come in the key layout of the public checkpoints; ``weights`` opens them, whatever their
format. Sizes are read off the shapes; what shapes cannot tell stands in the file's metadata:
``config`` as ComfyUI reads it (``{"transformer": {"num_heads": …}}``), and ``turbotalk`` with the
settings a file ships with. What is written is safetensors, in float16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import CheckpointError, MismatchError, OutputError, TurboTalkError
from ..geometry import LATENT_CHANNELS
from ..trust import MAX_LAYERS, parse_json, read_small
from .audio_adapter import FIRST_WINDOW, AudioAdapterConfig, AudioProjection
from .image_encoder import ImageEncoder, build_image_encoder
from .lora import merge_lora
from .text_encoder import TOKENIZER, TextEncoder, Tokenizer, build_text_encoder, build_tokenizer
from .vae import WanVAE
from .wan import WanConfig, WanModel
from .weights import WeightHeader, read_header, read_weights

HEAD_DIM = 128  # Wan 2.1, every size: where a file does not name its heads
PROJECTION_PREFIX = "audio_proj."

DIT = "video transformer"
ADAPTER = "audio adapter"
VAE = "video VAE"
AUDIO_ENCODER = "audio encoder"
LORA = "LoRA"
TEXT_ENCODER = "text encoder"
IMAGE_ENCODER = "image encoder"
UNKNOWN = "unknown"

_ADAPTER_MARK = "audio_proj.proj1.weight"
_MARKS = {  # a key, without prefix, that only this kind has
    "head.modulation": DIT,
    _ADAPTER_MARK: ADAPTER,
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
_LAYERS = {  # what the names of a kind's layers begin with
    DIT: ("blocks.",),
    ADAPTER: ("blocks.",),
    AUDIO_ENCODER: ("encoder.layers.", "wav2vec2.encoder.layers."),
    TEXT_ENCODER: ("encoder.block.", "blocks."),
    IMAGE_ENCODER: ("vision_model.encoder.layers.", "visual.transformer."),
}
_Module = TypeVar("_Module", bound=nn.Module)
_REFERENCE_CHANNELS = 20  # Wan 2.1 image-to-video: 4 of mask, 16 of reference latents


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a model file is, from its header alone.

    Attributes:
        path: of the file.
        kind: one of this module's kind names.
        sizes: named dimensions that the shapes tell.
        num_parameters: values of all weights; scales of a quantised file are not counted.
        dtypes: number of tensors stored in each dtype, scales included.
        settings: what the file ships with (metadata ``turbotalk``).
        metadata: the rest of the file's metadata.
        uses: where the file can be used, and with what.
        num_files: more than one for a set of shards.
        num_bytes: of all files.
        prefix: what the tensors' names begin with besides their public names.
        quantization: fp8, fp8-scaled, quanto, packed (not read here), or None for weights stored
            as they are.
        speakers: how many voices audio modules were trained for; None where there are none.
        header: names, shapes and places of all tensors; the loaders read the weights by it.
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
        """Describe the file for people, a fact a line."""
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
            "num_files": self.num_files,
            "num_bytes": self.num_bytes,
            "prefix": self.prefix,
            "quantization": self.quantization,
            "speakers": self.speakers,
        }


ModelFile = Path | CheckpointInfo  # a file's path, or its header where that was read before


def inspect(path: Path) -> CheckpointInfo:
    """Say what a model file is without loading its tensors.

    Args:
        path: what ``weights.read_header`` reads: a file, or something that stands for a set of
            shards.

    Returns:
        Its kind, sizes, dtypes and settings.

    Raises:
        CheckpointError: no such file, or none that can be read.
    """
    return _describe(read_header(path))


def _describe(header: WeightHeader) -> CheckpointInfo:
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
        config = _infer_dit(shapes, metadata, path)
        sizes = {
            "width": config.dim,
            "layers": config.num_layers,
            "heads": config.num_heads,
            "input channels": config.in_channels,
            "text width": config.text_dim,
            "image width": config.image_dim or 0,
        }
        if _ADAPTER_MARK in shapes:
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
        speakers=_find_speakers(shapes, metadata, path) if _ADAPTER_MARK in shapes else None,
        header=header,
    )


def _size_audio(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], path: Path, heads: str
) -> dict[str, int]:
    config = _infer_projection(shapes, path)
    width = _shape(shapes, "blocks.0.audio_cross_attn.proj.weight", path, 2)[0]
    return {
        heads: _adapter_heads(width, metadata, path),
        "audio values per frame": config.frame_width,
        "tokens per latent frame": config.num_tokens,
        "token width": config.token_dim,
    }


def _find_speakers(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], path: Path
) -> str:
    """Tell for how many speakers audio modules were trained.

    The released files for one and for several speakers have the same names and shapes, so only
    what they are called tells them apart: InfiniteTalk's own by their folder.
    """
    width = _shape(shapes, "blocks.0.audio_cross_attn.proj.weight", path, 2)[0]
    if width // _adapter_heads(width, metadata, path) % 2:
        return "one: several need audio heads of an even width, to rotate voices apart"
    called = f"{path.absolute().parent.name}/{path.name}".lower()
    for word, meaning in (("multi", "several"), ("single", "one")):
        if word in called:
            return f'{meaning}, going by the word "{word}" in its name'
    return "one, perhaps several: neither tensors nor name tell"


def _find_uses(kind: str, sizes: Mapping[str, int], header: WeightHeader) -> str:
    if header.quantization == "packed" and kind != UNKNOWN:
        return "ComfyUI alone, as far as it knows this quantisation; the command line does not"
    uses = _USES[kind]
    if kind == DIT:
        channels = LATENT_CHANNELS + _REFERENCE_CHANNELS
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


def load_dit(
    file: ModelFile,
    adapter: ModelFile | None = None,
    dtype: torch.dtype = torch.float32,
    loras: Sequence[tuple[ModelFile, float]] = (),
) -> tuple[WanModel, AudioProjection | None]:
    """Build the video transformer, with its audio attention where there is an adapter.

    Args:
        file: of the transformer; merged with an audio adapter or not.
        adapter: file of the audio adapter; its tensors win over those of a merged file, as in the
            reference. None, or the merged file once more, takes what is in that file.
        dtype: of the weights in memory, whatever they are stored in. The network computes in it,
            so that one file's mix of dtypes becomes one.
        loras: LoRA files to merge into the weights, each with its strength.

    Returns:
        The transformer, and the adapter's projection from audio windows to tokens.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another kind.
        MismatchError: an adapter or a LoRA made for another transformer.
    """
    header = _read_kind(file, DIT)
    path = header.path
    config = _infer_dit(header.shapes, header.metadata, path)
    audio_header, source = header, path.name
    is_merged = _ADAPTER_MARK in header.shapes
    if adapter is not None and not (is_merged and _locate(adapter) == path):
        audio_header = _read_kind(adapter, ADAPTER)
        _check_fit(header, config, audio_header)
        source = f"{path.name} with {audio_header.path.name}"
    weights = read_weights(header, dtype)
    if audio_header is not header:
        weights |= read_weights(audio_header, dtype)
    projection = None
    if _ADAPTER_MARK in audio_header.shapes:
        projection_config = _infer_projection(audio_header.shapes, audio_header.path)
        config = replace(
            config,
            audio_heads=_adapter_heads(config.dim, audio_header.metadata, audio_header.path),
            audio_token_dim=projection_config.token_dim,
        )
        projection = _build(lambda: AudioProjection(projection_config), audio_header.path.name)
        names = [name for name in weights if name.startswith(PROJECTION_PREFIX)]
        _assign(
            projection,
            {name.removeprefix(PROJECTION_PREFIX): weights.pop(name) for name in names},
            audio_header.path.name,
        )
    for lora, strength in loras:
        merge_lora(weights, read_weights(_read_kind(lora, LORA), torch.float32), strength)
    model = _build(lambda: WanModel(config), source)
    _assign(model, weights, source)
    return model, projection


def load_vae(file: ModelFile, dtype: torch.dtype = torch.float32) -> WanVAE:
    """Build the video VAE of a file.

    Args:
        file: in the layout of the public Wan 2.1 VAE, safetensors or .pth.
        dtype: of the weights in memory.

    Returns:
        The VAE.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another kind.
    """
    header = _read_kind(file, VAE)
    weights = read_weights(header, dtype)
    width = _shape(header.shapes, "decoder.head.0.gamma", header.path, 4)[0]
    # First without memory: a file may claim a width whose other weights it does not have.
    _check_fits(_build(lambda: WanVAE(width), header.path.name), weights, header.path.name)
    vae = WanVAE(width)
    _assign(vae, weights, header.path.name)
    return vae


def load_text_encoder(
    file: ModelFile, tokenizer_path: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[TextEncoder, Tokenizer]:
    """Build the text encoder of a file, and the tokenizer that belongs to it.

    Args:
        file: in the layout of Wan 2.1's own umT5 or of ComfyUI's.
        tokenizer_path: a ``spiece.model``; None takes the one inside of ComfyUI's files.
        dtype: of the weights in memory.

    Returns:
        The encoder and the tokenizer.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another kind, or no
            tokenizer.
        MismatchError: a tokenizer of more tokens than the encoder has.
    """
    header = _read_kind(file, TEXT_ENCODER)
    if tokenizer_path is None and TOKENIZER not in header.tensors:
        raise CheckpointError(
            f"{header.path.name} has no tokenizer inside; give the spiece.model of google/umt5-xxl "
            "too, or one of ComfyUI's umt5_xxl files, which have it inside"
        )
    weights = read_weights(header, dtype)
    if tokenizer_path is None:
        # Bytes are whole numbers up to 255, which every floating-point type holds exactly.
        model = bytes(weights[TOKENIZER].to(torch.uint8).numpy())
    else:
        model = _read_bytes(tokenizer_path)
    encoder, tokenizer = build_text_encoder(weights), build_tokenizer(model)
    vocabulary = encoder.model.config.vocab_size
    if tokenizer.num_pieces > vocabulary:
        raise MismatchError(
            f"the tokenizer knows {tokenizer.num_pieces} tokens, {header.path.name} has "
            f"{vocabulary}; give the tokenizer that belongs to it"
        )
    return encoder, tokenizer


def load_image_encoder(file: ModelFile) -> ImageEncoder:
    """Build the CLIP image encoder of a file, in float32.

    Args:
        file: in the layout of Wan 2.1's own CLIP or of ComfyUI's clip_vision_h.

    Returns:
        The image encoder.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another kind.
    """
    return build_image_encoder(read_weights(_read_kind(file, IMAGE_ENCODER), torch.float32))


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


def _read_bytes(path: Path) -> bytes:
    try:
        return read_small(Path(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}); name another") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no tokenizer: {error}; name another") from error


def _locate(file: ModelFile) -> Path:
    return file.path if isinstance(file, CheckpointInfo) else Path(file)


def _read_kind(file: ModelFile, kind: str) -> WeightHeader:
    info = file if isinstance(file, CheckpointInfo) else inspect(file)
    if info.kind != kind:
        raise CheckpointError(
            f"{info.path.name} is: {info.kind}; needed here: {kind}. "
            f"What this file is for: {info.uses}"
        )
    return info.header


def _check_fit(header: WeightHeader, config: WanConfig, adapter: WeightHeader) -> None:
    width = _shape(adapter.shapes, "blocks.0.audio_cross_attn.proj.weight", adapter.path, 2)[0]
    num_layers = _count_layers(adapter.shapes, ADAPTER, adapter.path)
    if (width, num_layers) != (config.dim, config.num_layers):
        raise MismatchError(
            f"{adapter.path.name} is for a transformer of width {width} and {num_layers} layers, "
            f"{header.path.name} has width {config.dim} and {config.num_layers} layers; load the "
            "adapter of the same family"
        )


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


def _infer_dit(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], path: Path
) -> WanConfig:
    dim = _shape(shapes, "head.modulation", path, 3)[2]
    told = _parse_json(metadata.get("config", "{}"), path).get("transformer", {})
    if not isinstance(told, dict):
        raise CheckpointError(
            f"the metadata of {Path(path).name} describes the transformer as {told!r}; it must be "
            "a JSON object"
        )
    image = "img_emb.proj.0.bias"
    return WanConfig(
        dim=dim,
        ffn_dim=_shape(shapes, "blocks.0.ffn.0.weight", path, 2)[0],
        num_heads=_read_heads(told, "num_heads", dim, path),
        num_layers=_count_layers(shapes, DIT, path),
        in_channels=_shape(shapes, "patch_embedding.weight", path, 5)[1],
        text_dim=_shape(shapes, "text_embedding.0.weight", path, 2)[1],
        frequency_dim=_shape(shapes, "time_embedding.0.weight", path, 2)[1],
        image_dim=_shape(shapes, image, path, 1)[0] if image in shapes else None,
        audio_heads=None,
    )


def _infer_projection(shapes: Mapping[str, tuple[int, ...]], path: Path) -> AudioAdapterConfig:
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
        value = parse_json(text)
    except ValueError as error:
        raise CheckpointError(
            f"the metadata of {Path(path).name} is not JSON ({error}); save the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"the metadata of {Path(path).name} is not a JSON object")
    return value


def _build(make: Callable[[], _Module], source: str) -> _Module:
    """Make a network without memory for its weights, which are the file's."""
    try:
        with torch.device("meta"):
            return make()
    except TurboTalkError:
        raise
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{source} describes no network that can be built ({error}); the file is damaged or of "
            "a model that TurboTalk does not know"
        ) from error


def _check_fits(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Complain of tensors that are missing, left over or of another shape than a module's."""
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


def _assign(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give a module its weights, all of them."""
    _check_fits(module, tensors, source)
    module.load_state_dict(tensors, assign=True)
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
