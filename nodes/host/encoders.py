"""The core's protocols over ComfyUI: model, audio and image encoders, progress bar, stop button.

The host manages all weights: it decides their device and the precision of computation.

Axes: B batch, C channels, S audio samples, T video frames, F latent frames, H height, W width,
L encoder layers, N tokens, D width.
"""

from __future__ import annotations

from logging import getLogger
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.audio_encoders.audio_encoders import AudioEncoderModel
from comfy.audio_encoders.wav2vec2 import Wav2Vec2Model
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...turbotalk_core.audio.normalization import find_first_kernel, normalized_by
from ...turbotalk_core.audio.resample import resample
from ...turbotalk_core.audio.wav2vec2 import Wav2Vec2Encoder, resample_steps
from ...turbotalk_core.errors import MismatchError
from ...turbotalk_core.geometry import SAMPLE_RATE
from ...turbotalk_core.protocols import AudioEncoder
from ...turbotalk_core.types import SoundMoments
from .audio_adapter import get_wan
from .takes import fingerprint_networks

_log = getLogger(__name__)

PROMPT_START = "turbotalk_start"  # key in the options of a CONDITIONING: a video frame


class HostAudioEncoder:
    """The core's audio encoder as an AUDIO_ENCODER; also satisfies ``protocols.AudioEncoder``."""

    def __init__(self, encoder: Wav2Vec2Encoder) -> None:
        """Wrap the encoder, so that the host manages its weights.

        Args:
            encoder: on the CPU, float32.
        """
        self._encoder = encoder
        # The Sequential is needed because the host sets the attribute ``device``, which
        # transformers forbids. The host's dynamic patcher supports only the host's own layers.
        self._patcher = ModelPatcher(
            torch.nn.Sequential(encoder.model),
            load_device=comfy.model_management.text_encoder_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )

    @property
    def first_kernel(self) -> tuple[int, int] | None:
        """Width and stride of the first, normalised convolution; see ``protocols.AudioEncoder``."""
        return self._encoder.first_kernel

    def fingerprint(self) -> str:
        """Compute the fingerprint of the weights; see ``protocols.AudioEncoder``."""
        return self._encoder.fingerprint()

    def encode(
        self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
    ) -> Tensor:
        """Encode a waveform; see ``protocols.AudioEncoder``."""
        comfy.model_management.load_model_gpu(self._patcher)
        return self._encoder.encode(waveform_S, num_frames, moments).cpu()

    def encode_audio(self, audio: Tensor, sample_rate: int) -> dict[str, Any]:
        """Encode an AUDIO in the format of the host's AudioEncoderEncode.

        Args:
            audio: [B, C, S].
            sample_rate: Hz.

        Returns:
            AUDIO_ENCODER_OUTPUT: hidden states at the encoder's own 50 Hz.
        """
        comfy.model_management.load_model_gpu(self._patcher)
        audio = resample(audio.float(), sample_rate, SAMPLE_RATE)
        states = self._encoder.hidden_states(audio.mean(dim=1), None)
        return {
            "encoded_audio": states[-1],
            "encoded_audio_all_layers": tuple(states),
            "audio_samples": audio.shape[2],
        }


class NativeAudioEncoder:
    """AUDIO_ENCODER of the host's own loader; satisfies ``protocols.AudioEncoder``."""

    def __init__(self, encoder: AudioEncoderModel) -> None:
        """Wrap an encoder.

        Args:
            encoder: wav2vec2.
        """
        self._encoder = encoder

    @property
    def first_kernel(self) -> tuple[int, int] | None:
        """Width and stride of the first, normalised convolution; see ``protocols.AudioEncoder``."""
        return find_first_kernel(self._encoder.model.feature_extractor.conv_layers[0])

    def fingerprint(self) -> str:
        """Compute the fingerprint of the weights; see ``protocols.AudioEncoder``."""
        return fingerprint_networks([self._encoder.model])

    @torch.no_grad()
    def encode(
        self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
    ) -> Tensor:
        """Encode a waveform; see ``protocols.AudioEncoder``."""
        comfy.model_management.load_model_gpu(self._encoder.patcher)
        model = self._encoder.model
        with normalized_by(model.feature_extractor.conv_layers[0], moments):
            features_BTD = model.feature_extractor(waveform_S[None].to(self._encoder.load_device))
        features_BTD = resample_steps(features_BTD.transpose(1, 2), num_frames).transpose(1, 2)
        _, states = model.encoder(model.feature_projection(features_BTD))
        return torch.stack([state_BTD[0] for state_BTD in states[1:]], dim=1).float().cpu()


class HostImageEncoder:
    """CLIP_VISION of the host; satisfies ``protocols.ImageEncoder``."""

    def __init__(self, clip_vision: Any) -> None:
        """Wrap an encoder.

        Args:
            clip_vision: from the host's Load CLIP Vision.
        """
        self._clip_vision = clip_vision

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Encode a picture; see ``protocols.ImageEncoder``."""
        image_BHWC = ((image_BCHW + 1) / 2).movedim(1, -1)
        # resized without a crop, as in the reference
        return self._clip_vision.encode_image(image_BHWC, crop=False).penultimate_hidden_states


def read_texts(
    conditioning: list[Any] | None,
) -> tuple[Tensor | None, tuple[tuple[int, Tensor], ...]]:
    """Return the text embeddings of a CONDITIONING.

    Args:
        conditioning: a prompt, or the output of Prompt schedule. If there are several entries
            without a time, only the first is used, for the whole video.

    Returns:
        The first embedding [1, N, D], or None without a prompt; and the later ones, each with the
        video frame at which it starts.
    """
    if not conditioning:  # None, or the empty list of a text encoder that found no text
        return None, ()
    (first_BND, first_options), *others = conditioning
    later = tuple(
        (options[PROMPT_START], text_BND) for text_BND, options in others if PROMPT_START in options
    )
    if PROMPT_START not in first_options and others:
        _log.warning("the prompt has %d parts; only the first is used", len(conditioning))
        return first_BND, ()
    return first_BND, later


def make_image_encoder(
    model: ModelPatcher, output: Any, clip_vision: Any
) -> tuple[Tensor | None, HostImageEncoder | None]:
    """Return the inputs for the image branch of a model.

    Args:
        model: the model with or without an image branch.
        output: CLIP_VISION_OUTPUT of the portrait, or None.
        clip_vision: CLIP_VISION, which encodes each reference image, or None.

    Returns:
        Image tokens [1, N, D] and the image encoder; at most one of them is not None.

    Raises:
        MismatchError: The model has no image branch, or both inputs were given.
    """
    has_branch = get_wan(model).img_emb is not None
    if output is None and clip_vision is None:
        if has_branch:
            # without image tokens the host feeds the text to this branch
            _log.warning("the model has an image branch; connect clip_vision for likeness")
        return None, None
    if not has_branch:
        raise MismatchError("got CLIP vision, and the model has no image branch; disconnect it")
    if output is None:
        return None, HostImageEncoder(clip_vision)
    if clip_vision is not None:
        raise MismatchError("got clip_vision_output and clip_vision; disconnect one of them")
    return output.penultimate_hidden_states, None


def make_audio_encoder(audio_encoder: Any) -> AudioEncoder:
    """Return an AUDIO_ENCODER as the core's ``protocols.AudioEncoder``.

    Args:
        audio_encoder: from our loader or the host's.

    Returns:
        The encoder, for ``encode_conversation``.

    Raises:
        MismatchError: The encoder is not a wav2vec2.
    """
    if isinstance(audio_encoder, HostAudioEncoder):
        return audio_encoder
    if isinstance(audio_encoder, AudioEncoderModel) and isinstance(
        audio_encoder.model, Wav2Vec2Model
    ):
        return NativeAudioEncoder(audio_encoder)
    kind = type(getattr(audio_encoder, "model", audio_encoder)).__name__
    raise MismatchError(
        f"got an audio encoder of type {kind}; InfiniteTalk hears with wav2vec2, so load that file"
    )
