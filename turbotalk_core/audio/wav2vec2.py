"""The wav2vec2 audio encoder: 16 kHz mono samples to hidden states, one row per video frame.

Axes: B batch, S audio samples, T video frames (or the encoder's own 50 Hz steps), L encoder
layers, D feature width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dependencies import required_for
from ..errors import MismatchError
from ..fingerprints import fingerprint
from ..geometry import SAMPLE_RATE
from ..safe_io.json import is_number
from ..safe_io.tensor_header import MAX_LAYERS
from ..types import SoundMoments
from .normalization import find_first_kernel, normalized_by

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model

BASE_CONV_STRIDE = (5, 2, 2, 2, 2, 2, 2)  # wav2vec 2.0, section 4.2: 320 samples per step


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The geometry of a wav2vec2 encoder; names and defaults are those of Hugging Face.

    Attributes:
        hidden_size: width of the transformer, D.
        num_hidden_layers: transformer layers, L.
        num_attention_heads: attention heads; must divide hidden_size.
        intermediate_size: width of the feed-forward layers.
        conv_dim: channels of each convolution over the waveform.
        conv_kernel: width of each convolution, in samples of its input.
        conv_stride: stride of each convolution.
        conv_bias: whether these convolutions have a bias.
        feat_extract_norm: "group" normalises over time after the first convolution only, "layer"
            over channels after each.
        num_conv_pos_embeddings: width of the positional convolution, in steps.
        num_conv_pos_embedding_groups: groups of the positional convolution.
        do_stable_layer_norm: whether layers normalise their input instead of their output.
        layer_norm_eps: as in the checkpoint's training.

    Raises:
        MismatchError: if a value has another type, a number is not above 0, sizes do not fit each
            other, the kind of norm is unknown, there are more than ``MAX_LAYERS`` layers, or the
            convolutions need more than a second for one step.
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
        """Number of samples that the convolutions need for one step."""
        samples = 1
        for kernel, stride in zip(
            reversed(self.conv_kernel), reversed(self.conv_stride), strict=True
        ):
            samples = (samples - 1) * stride + kernel
        return samples

    def _check_kinds(self) -> None:
        """Refuse values of another type, which untrusted metadata may contain."""
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
    """Wav2vec2 model with any number of rows per second; satisfies ``protocols.AudioEncoder``.

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
        """First convolution, if it normalises over time; see ``protocols.AudioEncoder``."""
        return find_first_kernel(self._first_layer)

    def fingerprint(self) -> str:
        """Return a digest of its weights; see ``protocols.AudioEncoder``."""
        return fingerprint(self.model.state_dict().items())

    def hidden_states(self, waveforms_BS: Tensor, num_frames: int | None) -> list[Tensor]:
        """Run the network and return the output of every layer; differentiable.

        The convolutions' output is resampled linearly before the transformer, so the transformer
        itself runs at the video's frame rate.

        Args:
            waveforms_BS: 16 kHz mono samples; if shorter than the convolutions' receptive field
                (400 samples), they are padded with silence.
            num_frames: number of rows, or None for the encoder's own 50 Hz steps.

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
        """Encode 16 kHz mono samples as one row of hidden states per video frame.

        Args:
            waveform_S: samples, any length from 1 on.
            num_frames: number of rows, T.
            moments: statistics of the whole sound, if the samples are a section of it.

        Returns:
            [T, L, D], float32, on the network's device; the transformer's input is left out.

        Raises:
            MismatchError: if the waveform is not one non-empty row, or there would be no frame.
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


def build_audio_encoder(config: EncoderConfig, *, seed: int) -> Wav2Vec2Encoder:
    """Build a new encoder with random weights, ready to train.

    Args:
        config: its geometry.
        seed: seed of the weights; the state of the global generator is unchanged.

    Returns:
        The encoder, on the CPU, in training mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Wav2Vec2Encoder(make_model(config).train(), config)


def make_model(config: EncoderConfig) -> Wav2Vec2Model:
    """Build the network on the current default device.

    Args:
        config: its geometry.

    Returns:
        The network, with random weights from the global generator.

    Raises:
        MissingToolError: if transformers is not installed.
    """
    # Imported on use: it takes seconds, and most of the core does not need it.
    with required_for("an audio encoder"):
        from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(
        Wav2Vec2Config(
            **asdict(config),
            # Regularisers of pre-training: masking would add a tensor that inference does not use.
            mask_time_prob=0.0,
            mask_feature_prob=0.0,
            layerdrop=0.0,
            hidden_dropout=0.0,
            activation_dropout=0.0,
            attention_dropout=0.0,
        )
    )


def resample_steps(features_BDT: Tensor, num_frames: int) -> Tensor:
    """Resample a sequence linearly; its first and last step are also those of the result.

    Args:
        features_BDT: channels before time.
        num_frames: number of steps of the result.

    Returns:
        [B, D, num_frames].
    """
    return F.interpolate(features_BDT, size=num_frames, mode="linear", align_corners=True)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
