"""The wav2vec2 audio encoder: read from one file, run at the video's frame rate, saved again.

Goes in: a safetensors file in Hugging Face key layout, and 16 kHz mono samples. Comes out: hidden
states, one row per video frame. Separate because it needs transformers.

Axes: B batch, S audio samples, T video frames (or the encoder's own 50 Hz steps), L encoder
layers, D feature width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import CheckpointError, MismatchError, OutputError
from ..geometry import SAMPLE_RATE
from ..identity import fingerprint
from ..trust import MAX_LAYERS, is_file, is_number, parse_json, read_tensor_header
from ..types import SoundMoments
from .moments import find_first_kernel, normalized_by

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model

BASE_CONV_STRIDE = (5, 2, 2, 2, 2, 2, 2)  # wav2vec 2.0, section 4.2: 320 samples per step
HEAD_WIDTH = 64  # every published wav2vec2 model: 768 / 12, 1024 / 16
CONFIG_KEY = "config"  # safetensors metadata: JSON of EncoderConfig fields

_PUBLIC_PREFIX = "wav2vec2."  # models saved with a task head nest the encoder under it
_PARTS = ("feature_extractor.", "feature_projection.", "encoder.")
_WEIGHT_NORM_SPELLINGS = {
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The geometry of a wav2vec2 encoder; names and defaults are those of Hugging Face.

    Attributes:
        hidden_size: width of the transformer, D.
        num_hidden_layers: transformer layers, L.
        num_attention_heads: must divide hidden_size.
        intermediate_size: width of the feed-forward layers.
        conv_dim: channels of each convolution over the waveform.
        conv_kernel: width of each, in samples of its input.
        conv_stride: stride of each.
        conv_bias: whether these convolutions have a bias.
        feat_extract_norm: "group" normalises over time after the first convolution only, "layer"
            over channels after each.
        num_conv_pos_embeddings: width of the positional convolution, in steps.
        num_conv_pos_embedding_groups: its groups.
        do_stable_layer_norm: whether layers normalise their input instead of their output.
        layer_norm_eps: as in the checkpoint's training.

    Raises:
        MismatchError: a value of another type, numbers that are not above 0, parts that do not fit
            each other, a kind of norm that is unknown, more than ``MAX_LAYERS`` layers, or
            convolutions that need more than a second for one step.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    conv_dim: tuple[int, ...]
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = BASE_CONV_STRIDE
    conv_bias: bool = False
    feat_extract_norm: str = "group"
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        self._check_kinds()
        if self.hidden_size % self.num_attention_heads:
            raise MismatchError(
                f"{self.num_attention_heads} heads do not divide the width {self.hidden_size}"
            )
        convs = (self.conv_dim, self.conv_kernel, self.conv_stride)
        if len({len(sizes) for sizes in convs}) > 1:
            raise MismatchError(
                "conv_dim, conv_kernel and conv_stride must name equally many convolutions, got "
                f"{convs}"
            )
        if self.feat_extract_norm not in ("group", "layer"):
            raise MismatchError(
                f'got feat_extract_norm {self.feat_extract_norm!r}; it is "group" or "layer"'
            )
        if max(self.num_hidden_layers, len(self.conv_dim)) > MAX_LAYERS:
            raise MismatchError(
                f"got {self.num_hidden_layers} layers and {len(self.conv_dim)} convolutions; there "
                f"may be {MAX_LAYERS} of each"
            )
        if self.receptive_field > SAMPLE_RATE:
            raise MismatchError(
                f"convolutions of widths {self.conv_kernel} and strides {self.conv_stride} see "
                f"{self.receptive_field} samples at once; more than {SAMPLE_RATE}, a second, is "
                "no speech"
            )

    @property
    def receptive_field(self) -> int:
        """Samples that the convolutions need for one step."""
        samples = 1
        for kernel, stride in zip(
            reversed(self.conv_kernel), reversed(self.conv_stride), strict=True
        ):
            samples = (samples - 1) * stride + kernel
        return samples

    def _check_kinds(self) -> None:
        """Refuse values of another type, as a stranger's metadata may have them."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                fits = _is_count(value)
            elif field.type == "tuple[int, ...]":
                fits = isinstance(value, tuple) and bool(value) and all(map(_is_count, value))
            elif field.type == "float":
                fits = is_number(value) and value > 0
            else:
                fits = isinstance(value, {"bool": bool, "str": str}[str(field.type)])
            if not fits:
                raise MismatchError(
                    f"got {field.name} {value!r}; it must be of type {field.type}, and numbers "
                    "above 0"
                )


class Wav2Vec2Encoder:
    """A wav2vec2 model that hears at any rate of rows; satisfies ``ports.AudioEncoder``.

    Attributes:
        model: the network, float32.
        config: its geometry.
    """

    def __init__(self, model: Wav2Vec2Model, config: EncoderConfig) -> None:
        """Wrap a network; ``load_audio_encoder`` and ``build_audio_encoder`` make one."""
        self.model = model
        self.config = config

    @property
    def width(self) -> int:
        """Feature width, D."""
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        """Transformer layers, L: what ``encode`` returns per row."""
        return self.config.num_hidden_layers

    @property
    def first_kernel(self) -> tuple[int, int] | None:
        """What it normalises over time; see ``ports.AudioEncoder``."""
        return find_first_kernel(self._first_layer)

    def fingerprint(self) -> str:
        """Tell its weights apart; see ``ports.AudioEncoder``."""
        return fingerprint(self.model.state_dict().items())

    def hidden_states(self, waveforms_BS: Tensor, num_frames: int | None) -> list[Tensor]:
        """Run the network and keep what every layer says; differentiable.

        The convolutions' output is resampled linearly before the transformer, so the transformer
        itself runs at the video's frame rate.

        Args:
            waveforms_BS: 16 kHz mono samples; shorter than the convolutions' receptive field
                (400 samples) they are followed by silence.
            num_frames: rows wanted, or None for the encoder's own 50 Hz steps.

        Returns:
            num_layers + 1 tensors [B, T, D], the transformer's input first.

        Source: InfiniteTalk, src/audio_analysis/wav2vec2.py (linear interpolation, aligned
        corners, before the feature projection).
        """
        missing = self.config.receptive_field - waveforms_BS.shape[1]
        if missing > 0:
            waveforms_BS = F.pad(waveforms_BS, (0, missing))
        weight = next(self.model.parameters())

        def resample(_module: nn.Module, _inputs: tuple[Tensor], features_BDT: Tensor) -> Tensor:
            if num_frames is None:
                return features_BDT
            return resample_steps(features_BDT, num_frames)

        hook = self.model.feature_extractor.register_forward_hook(resample)
        try:
            output = self.model(waveforms_BS.to(weight), output_hidden_states=True)
        finally:
            hook.remove()
        # With do_stable_layer_norm the final norm is only in last_hidden_state; else they agree.
        return [*output.hidden_states[:-1], output.last_hidden_state]

    @torch.no_grad()
    def encode(
        self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
    ) -> Tensor:
        """Turn 16 kHz mono samples into one row of hidden states per video frame.

        Args:
            waveform_S: samples, any length from 1 on.
            num_frames: rows wanted, T.
            moments: of the whole sound, where the samples are a part of it.

        Returns:
            [T, L, D], float32, on the network's device; the transformer's input is left out.

        Raises:
            MismatchError: the waveform is not one non-empty row, or no frame is asked for.
        """
        if waveform_S.ndim != 1 or waveform_S.numel() == 0 or num_frames < 1:
            raise MismatchError(
                f"got samples of shape {tuple(waveform_S.shape)} and {num_frames} frames; the "
                "encoder takes mono samples [S], at least one, and makes at least one frame"
            )
        with normalized_by(self._first_layer, moments):
            states = self.hidden_states(waveform_S[None], num_frames)
        return torch.stack([state_BTD[0] for state_BTD in states[1:]], dim=1)

    @property
    def _first_layer(self) -> nn.Module:
        return self.model.feature_extractor.conv_layers[0]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def resample_steps(features_BDT: Tensor, num_frames: int) -> Tensor:
    """Resample a sequence linearly so that first and last step stay first and last.

    Args:
        features_BDT: channels before time.
        num_frames: steps wanted.

    Returns:
        [B, D, num_frames].
    """
    return F.interpolate(features_BDT, size=num_frames, mode="linear", align_corners=True)


def load_audio_encoder(path: str | Path) -> Wav2Vec2Encoder:
    """Read an encoder from one safetensors file in Hugging Face key layout.

    Keys may carry the prefix ``wav2vec2.`` and either spelling of weight norm. What is not the
    encoder (quantizer, projections, task heads, the mask embedding) is not read. The geometry comes
    from the shapes; what they cannot tell comes from the metadata entry ``config``, or else is that
    of the published models: base strides, 64-wide heads, pre-norm layers exactly where every
    convolution is normalised. Weights are computed with in float32 whatever the file holds.

    Args:
        path: the file.

    Returns:
        The encoder, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged or no wav2vec2, its geometry cannot be told,
            or tensors are missing, superfluous or of the wrong shape.
    """
    weights, overrides = _read(Path(path))
    if not any(key.startswith("feature_extractor.") for key in weights):
        raise CheckpointError(
            f"{path} is not a wav2vec2 audio encoder: it has no feature_extractor.* tensors; give "
            "a file in Hugging Face key layout, such as chinese-wav2vec2-base"
        )
    try:
        config = _infer_config(weights, overrides)
        with torch.device("meta"):  # no random weights can survive: what is not read has no data
            model = _make_model(config)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the tensor {error}; get a complete file") from error
    except (IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path} describes no wav2vec2 that can be built: {error}") from error
    _check_tensors(path, {key: value.shape for key, value in model.state_dict().items()}, weights)
    model.load_state_dict(weights, assign=True)
    return Wav2Vec2Encoder(model.requires_grad_(False).eval(), config)


def build_audio_encoder(config: EncoderConfig, *, seed: int) -> Wav2Vec2Encoder:
    """Make a new encoder with random weights, ready to train.

    Args:
        config: its geometry.
        seed: of the weights; the global generator is left as it was.

    Returns:
        The encoder, on the CPU, in training mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Wav2Vec2Encoder(_make_model(config).train(), config)


def save_audio_encoder(
    encoder: Wav2Vec2Encoder, path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write an encoder and its geometry to one safetensors file, whole or not at all.

    Args:
        encoder: what to write.
        path: the file; replaced if it exists.
        metadata: further safetensors metadata; ``config`` is set here.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    tensors = {
        key: value.detach().cpu().contiguous() for key, value in encoder.model.state_dict().items()
    }
    try:
        # Not save_file, whose files only their owner may read.
        part.write_bytes(
            save(tensors, {**(metadata or {}), CONFIG_KEY: json.dumps(asdict(encoder.config))})
        )
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write the audio encoder to {path}: {error}; give a folder that exists, is "
            "writable and has room"
        ) from error


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
    # The whole config.json of a published model is welcome: the rest only matters to training.
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


def _make_model(config: EncoderConfig) -> Wav2Vec2Model:
    # Imported when used: it takes seconds, and most of the core never needs it.
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(
        Wav2Vec2Config(
            **asdict(config),
            # Regularisers of pre-training: masking would add a tensor that inference never uses.
            mask_time_prob=0.0,
            mask_feature_prob=0.0,
            layerdrop=0.0,
            hidden_dropout=0.0,
            activation_dropout=0.0,
            attention_dropout=0.0,
        )
    )


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
