"""The wav2vec2 audio encoder read from one safetensors file, and written to one.

Files have Hugging Face's key layout. The metadata entry ``config`` contains what the shapes do not
determine, as JSON with the fields of ``EncoderConfig``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..audio.wav2vec2 import BASE_CONV_STRIDE, EncoderConfig, Wav2Vec2Encoder, make_model
from ..errors import CheckpointError, MissingToolError
from ..safe_io.atomic import write_bytes
from ..safe_io.json import parse_json
from ..safe_io.paths import is_file
from ..safe_io.tensor_header import read_tensor_header

HEAD_WIDTH = 64  # every published wav2vec2 model: 768 / 12, 1024 / 16
CONFIG_KEY = "config"  # safetensors metadata: JSON of EncoderConfig fields

_PUBLIC_PREFIX = "wav2vec2."  # models saved with a task head nest the encoder under it
_PARTS = ("feature_extractor.", "feature_projection.", "encoder.")
_WEIGHT_NORM_SPELLINGS = {
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}


def load_audio_encoder(path: str | Path) -> Wav2Vec2Encoder:
    """Read an encoder from one safetensors file in Hugging Face key layout.

    Keys may have the prefix ``wav2vec2.`` and either spelling of weight norm. Tensors outside of
    the encoder (quantizer, projections, task heads, the mask embedding) are not read. The geometry
    follows from the shapes. What shapes do not determine is read from the metadata entry
    ``config``, or else is that of the published models: base strides, 64-wide heads, pre-norm
    layers exactly where every convolution is normalised. Weights are converted to float32.

    Args:
        path: path of the file.

    Returns:
        The encoder, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: if the file is missing, damaged or no wav2vec2, its geometry cannot be
            inferred, or tensors are missing, superfluous or of the wrong shape.
        MissingToolError: if transformers is not installed.
    """
    weights, overrides = _read(Path(path))
    if not any(key.startswith("feature_extractor.") for key in weights):
        raise CheckpointError(
            f"{path} is not a wav2vec2 audio encoder: it has no feature_extractor.* tensors; give "
            "a file in Hugging Face key layout, such as chinese-wav2vec2-base"
        )
    try:
        config = _infer_config(weights, overrides)
        with torch.device("meta"):  # weights that are not read have no data, not random values
            model = make_model(config)
    except MissingToolError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the tensor {error}; get a complete file") from error
    except (IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path} describes no wav2vec2 that can be built: {error}") from error
    _check_tensors(path, {key: value.shape for key, value in model.state_dict().items()}, weights)
    model.load_state_dict(weights, assign=True)
    return Wav2Vec2Encoder(model.requires_grad_(False).eval(), config)


def save_audio_encoder(
    encoder: Wav2Vec2Encoder, path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write an encoder and its geometry to one safetensors file, whole or not at all.

    Args:
        encoder: the encoder.
        path: path of the file; replaced if it exists.
        metadata: further safetensors metadata; ``config`` is set here.

    Raises:
        OutputError: if the file cannot be written.
    """
    tensors = {
        key: value.detach().cpu().contiguous() for key, value in encoder.model.state_dict().items()
    }
    all_metadata = {**(metadata or {}), CONFIG_KEY: json.dumps(asdict(encoder.config))}
    # Not save_file, whose files can be read by their owner only.
    write_bytes(Path(path), save(tensors, all_metadata))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not is_file(path):
        raise CheckpointError(
            f"there is no audio encoder file at {path}; give the path of a wav2vec2 .safetensors"
        )
    try:
        _, metadata = read_tensor_header(path)
        with safe_open(path, framework="pt") as file:
            weights = {}
            for name in file.keys():  # noqa: SIM118  (the handle is no mapping)
                key = name.removeprefix(_PUBLIC_PREFIX)
                if not key.startswith(_PARTS):
                    continue
                for old, new in _WEIGHT_NORM_SPELLINGS.items():
                    if key.endswith(old):
                        key = key.removesuffix(old) + new
                weights[key] = file.get_tensor(name).float()
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}; download it again"
        ) from error
    try:
        overrides = parse_json(metadata.get(CONFIG_KEY, "{}"))
    except ValueError as error:
        raise CheckpointError(
            f"the metadata entry {CONFIG_KEY!r} of {path} is no JSON: {error}"
        ) from error
    if not isinstance(overrides, dict):
        raise CheckpointError(f"the metadata entry {CONFIG_KEY!r} of {path} is no JSON object")
    # The entry may be the whole config.json of a published model; the rest is for training only.
    return weights, {
        field.name: _as_tuple(overrides[field.name])
        for field in fields(EncoderConfig)
        if field.name in overrides
    }


def _as_tuple(value: Any) -> Any:  # noqa: ANN401
    return tuple(value) if isinstance(value, list) else value


def _infer_config(weights: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> EncoderConfig:
    num_convs = _count(weights, "feature_extractor.conv_layers.")
    convs = [weights[f"feature_extractor.conv_layers.{i}.conv.weight"] for i in range(num_convs)]
    positional = weights["encoder.pos_conv_embed.conv.parametrizations.weight.original1"]
    hidden_size = weights["encoder.layer_norm.weight"].shape[0]
    norms_each_conv = "feature_extractor.conv_layers.1.layer_norm.weight" in weights
    inferred = {
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(weights, "encoder.layers."),
        "intermediate_size": weights[
            "encoder.layers.0.feed_forward.intermediate_dense.weight"
        ].shape[0],
        "conv_dim": tuple(conv.shape[0] for conv in convs),
        "conv_kernel": tuple(conv.shape[2] for conv in convs),
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in weights,
        "feat_extract_norm": "layer" if norms_each_conv else "group",
        "num_conv_pos_embeddings": positional.shape[2],
        "num_conv_pos_embedding_groups": hidden_size // positional.shape[1],
        "do_stable_layer_norm": norms_each_conv,
    }
    if hidden_size % HEAD_WIDTH == 0:
        inferred["num_attention_heads"] = hidden_size // HEAD_WIDTH
    elif "num_attention_heads" not in overrides:
        raise ValueError(
            f"the number of heads of a {hidden_size} wide encoder cannot be told from its shapes; "
            f'add num_attention_heads to its metadata entry "{CONFIG_KEY}"'
        )
    if num_convs != len(BASE_CONV_STRIDE) and "conv_stride" not in overrides:
        raise ValueError(
            f"the strides of {num_convs} convolutions cannot be told from their shapes; add "
            f'conv_stride to the metadata entry "{CONFIG_KEY}"'
        )
    config = EncoderConfig(**{**inferred, **overrides})
    layers = config.num_hidden_layers, len(config.conv_dim)
    if layers != (inferred["num_hidden_layers"], num_convs):
        raise ValueError(
            f'its metadata entry "{CONFIG_KEY}" tells of {layers[0]} layers and {layers[1]} '
            f"convolutions, there are {inferred['num_hidden_layers']} and {num_convs}"
        )
    return config


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    indices = {key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)}
    return len(indices)


def _check_tensors(
    path: str | Path, wanted: Mapping[str, torch.Size], weights: Mapping[str, Tensor]
) -> None:
    missing = sorted(wanted.keys() - weights.keys())
    unknown = sorted(weights.keys() - wanted.keys())
    wrong = [
        f"{key} is {tuple(weights[key].shape)} instead of {tuple(shape)}"
        for key, shape in wanted.items()
        if key in weights and weights[key].shape != shape
    ]
    problems = [
        f"{label}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" * (len(names) > 8))
        for label, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} is no complete wav2vec2 encoder ({'; '.join(problems)}); get a complete file "
            f'or correct its metadata entry "{CONFIG_KEY}"'
        )
