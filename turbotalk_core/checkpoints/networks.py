"""Networks built from model files, and written to them as safetensors in float16."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import CheckpointError, MismatchError, TurboTalkError
from ..models.audio_adapter import AudioProjection
from ..models.image_encoder import ImageEncoder, build_image_encoder
from ..models.text_encoder import (
    TOKENIZER,
    TextEncoder,
    Tokenizer,
    build_text_encoder,
    build_tokenizer,
)
from ..models.vae import WanVAE
from ..models.wan import WanConfig, WanModel
from ..safe_io.atomic import make_folder, write_bytes
from ..safe_io.json import read_small
from .inspect import (
    ADAPTER,
    ADAPTER_MARK,
    DIT,
    IMAGE_ENCODER,
    LORA,
    TEXT_ENCODER,
    VAE,
    CheckpointInfo,
    ModelFile,
    infer_adapter_heads,
    infer_dit,
    infer_projection,
    inspect,
)
from .lora import merge_lora
from .tensors import read_weights

PROJECTION_PREFIX = "audio_proj."

_Module = TypeVar("_Module", bound=nn.Module)


def load_dit(
    file: ModelFile,
    adapter: ModelFile | None = None,
    dtype: torch.dtype = torch.float32,
    loras: Sequence[tuple[ModelFile, float]] = (),
) -> tuple[WanModel, AudioProjection | None]:
    """Load the video transformer, with its audio attention if there is an adapter.

    Args:
        file: file of the transformer, merged with an audio adapter or not.
        adapter: file of the audio adapter; its tensors replace those of a merged file, as in the
            reference. None, or the merged file again, uses those in that file.
        dtype: dtype of all weights in memory, whatever they are stored in. The network computes in
            it, so that a file with several dtypes becomes uniform.
        loras: LoRA files to merge into the weights, each with its strength.

    Returns:
        The transformer, and the projection from audio windows to tokens; None without an adapter.

    Raises:
        CheckpointError: if a file is missing, damaged, incomplete or of another kind.
        MismatchError: if an adapter or a LoRA was made for another transformer.
    """
    header = _read_kind(file, DIT).header
    path = header.path
    config = infer_dit(header.shapes, header.metadata, path)
    audio_header, source = header, path.name
    is_merged = ADAPTER_MARK in header.shapes
    if adapter is not None and not (is_merged and _locate(adapter) == path):
        adapter_info = _read_kind(adapter, ADAPTER)
        audio_header = adapter_info.header
        _check_fit(adapter_info, config, path)
        source = f"{path.name} with {audio_header.path.name}"
    weights = read_weights(header, dtype)
    if audio_header is not header:
        weights |= read_weights(audio_header, dtype)
    projection = None
    if ADAPTER_MARK in audio_header.shapes:
        projection_config = infer_projection(audio_header.shapes, audio_header.path)
        config = replace(
            config,
            audio_heads=infer_adapter_heads(config.dim, audio_header.metadata, audio_header.path),
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
        lora_header = _read_kind(lora, LORA).header
        merge_lora(weights, read_weights(lora_header, torch.float32), strength)
    model = _build(lambda: WanModel(config), source)
    _assign(model, weights, source)
    return model, projection


def load_vae(file: ModelFile, dtype: torch.dtype = torch.float32) -> WanVAE:
    """Load the video VAE of a file.

    Args:
        file: file in the layout of the public Wan 2.1 VAE, safetensors or .pth.
        dtype: dtype of the weights in memory.

    Returns:
        The VAE.

    Raises:
        CheckpointError: if the file is missing, damaged, incomplete or of another kind.
    """
    info = _read_kind(file, VAE)
    header = info.header
    weights = read_weights(header, dtype)
    width = info.sizes["width"]
    # First on the meta device, without memory: a damaged file may imply a width that its other
    # weights do not have.
    _check_fits(_build(lambda: WanVAE(width), header.path.name), weights, header.path.name)
    vae = WanVAE(width)
    _assign(vae, weights, header.path.name)
    return vae


def load_text_encoder(
    file: ModelFile, tokenizer_path: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[TextEncoder, Tokenizer]:
    """Load the text encoder of a file and its tokenizer.

    Args:
        file: file in the layout of Wan 2.1's own umT5 or of ComfyUI's.
        tokenizer_path: a ``spiece.model`` file; None uses the one inside ComfyUI's files.
        dtype: dtype of the weights in memory.

    Returns:
        The encoder and the tokenizer.

    Raises:
        CheckpointError: if a file is missing, damaged, incomplete or of another kind, or there is
            no tokenizer.
        MismatchError: if the tokenizer has more tokens than the encoder.
    """
    header = _read_kind(file, TEXT_ENCODER).header
    if tokenizer_path is None and TOKENIZER not in header.tensors:
        raise CheckpointError(
            f"{header.path.name} has no tokenizer inside; give the spiece.model of google/umt5-xxl "
            "too, or one of ComfyUI's umt5_xxl files, which have it inside"
        )
    weights = read_weights(header, dtype)
    if tokenizer_path is None:
        # Bytes are integers up to 255, which float32, float16 and bfloat16 all represent exactly.
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
    """Load the CLIP image encoder of a file, in float32.

    Args:
        file: file in the layout of Wan 2.1's own CLIP or of ComfyUI's clip_vision_h.

    Returns:
        The image encoder.

    Raises:
        CheckpointError: if the file is missing, damaged, incomplete or of another kind.
    """
    header = _read_kind(file, IMAGE_ENCODER).header
    return build_image_encoder(read_weights(header, torch.float32))


def save_dit(path: Path, model: WanModel, settings: Mapping[str, Any]) -> None:
    """Write the transformer without its audio modules, in float16.

    Args:
        path: file to write.
        model: the transformer.
        settings: settings that the file ships with, stored in the metadata.

    Raises:
        OutputError: if the file cannot be written.
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
        projection: the projection from audio windows to tokens.
        settings: settings that the file ships with, stored in the metadata.

    Raises:
        OutputError: if the file cannot be written.
    """
    tensors = {PROJECTION_PREFIX + key: t for key, t in projection.state_dict().items()}
    tensors |= {key: t for key, t in model.state_dict().items() if _is_audio(key)}
    metadata = {
        "config": json.dumps({"audio_heads": model.config.audio_heads}),
        "turbotalk": json.dumps(dict(settings)),
    }
    _write(path, tensors, metadata)


def save_vae(path: Path, vae: WanVAE, settings: Mapping[str, Any]) -> None:
    """Write a VAE in float16.

    Args:
        path: file to write.
        vae: the VAE.
        settings: settings that the file ships with, stored in the metadata.

    Raises:
        OutputError: if the file cannot be written.
    """
    _write(path, vae.state_dict(), {"turbotalk": json.dumps(dict(settings))})


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


def _read_kind(file: ModelFile, kind: str) -> CheckpointInfo:
    info = inspect(file)
    if info.kind != kind:
        raise CheckpointError(
            f"{info.path.name} is: {info.kind}; needed here: {kind}. "
            f"What this file is for: {info.uses}"
        )
    return info


def _check_fit(adapter: CheckpointInfo, config: WanConfig, path: Path) -> None:
    """Refuse an audio adapter that was made for another size of transformer."""
    width, num_layers = adapter.sizes["video width"], adapter.sizes["layers"]
    if (width, num_layers) != (config.dim, config.num_layers):
        raise MismatchError(
            f"{adapter.path.name} is for a transformer of width {width} and {num_layers} layers, "
            f"{path.name} has width {config.dim} and {config.num_layers} layers; load the "
            "adapter of the same family"
        )


def _build(make: Callable[[], _Module], source: str) -> _Module:
    """Build a network without memory for its weights, which come from the file."""
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
    """Refuse tensors that are missing, left over or of another shape than the module's."""
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
    """Load all weights of a module, and set it to evaluation mode."""
    _check_fits(module, tensors, source)
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False).eval()


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    path = Path(path)
    halved = {key: t.detach().half().contiguous() for key, t in tensors.items()}
    make_folder(path.parent)
    write_bytes(path, save(halved, metadata))
