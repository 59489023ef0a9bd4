"""The core's protocols over ComfyUI: model, audio and image encoders, progress bar, stop button.

The host manages all weights: it decides their device and the precision of computation.

Axes: B batch, C channels, S audio samples, T video frames, F latent frames, H height, W width,
L encoder layers, N tokens, D width.
"""

from __future__ import annotations

from logging import getLogger
from types import TracebackType
from typing import Any
from uuid import uuid4

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.audio_encoders.audio_encoders import AudioEncoderModel
from comfy.audio_encoders.wav2vec2 import Wav2Vec2Model
from comfy.conds import CONDNoiseShape, CONDRegular
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.utils import ProgressBar
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from ...turbotalk_core.audio.normalization import find_first_kernel, normalized_by
from ...turbotalk_core.audio.resample import resample
from ...turbotalk_core.audio.wav2vec2 import Wav2Vec2Encoder, resample_steps
from ...turbotalk_core.errors import MismatchError
from ...turbotalk_core.geometry import SAMPLE_RATE, TEXT_LENGTH
from ...turbotalk_core.models.speaker_embedding import token_regions
from ...turbotalk_core.protocols import AudioEncoder
from ...turbotalk_core.request import TalkRequest
from ...turbotalk_core.sampling.schedule import request_sigmas
from ...turbotalk_core.types import AudioTokens, Conditioning, SoundMoments
from .audio_adapter import REGIONS_KEY, TOKENS_KEY, get_wan
from .takes import fingerprint_networks

_log = getLogger(__name__)

PROMPT_START = "turbotalk_start"  # key in the options of a CONDITIONING: a video frame
PREVIEW_SIDE = 512  # pixels, the longer side of a preview


class HostDenoiser:
    """Denoiser over a MODEL with an audio adapter; satisfies ``ports.Denoiser``.

    It is a context manager: sampling happens inside ``with``. A call uses the same functions as the
    host's own samplers, so that LoRA, quantised weights, compilation, attention patches and
    offloading keep working.
    """

    def __init__(self, model: ModelPatcher, sigmas: Tensor) -> None:
        """Store the model and the noise levels.

        Args:
            model: image-to-video Wan 2.1 with an audio adapter.
            sigmas: all noise levels of a chunk; patches of other packs read them.
        """
        self._model = model
        self._wan = get_wan(model)
        self._sigmas = sigmas
        self._offloads = False  # set when memory ran out: the host then offloads all it can

    @classmethod
    def of_request(cls, model: ModelPatcher, request: TalkRequest) -> HostDenoiser:
        """Prepare for the noise levels of a request.

        Args:
            model: image-to-video Wan 2.1 with an audio adapter.
            request: of the video.

        Returns:
            The denoiser, not entered yet.
        """
        return cls(model, request_sigmas(request))

    def __enter__(self) -> HostDenoiser:
        """Prepare the model and its patches for sampling."""
        model, device = self._model, self._model.load_device
        self._options = create_model_options_clone(model.model_options)
        self._options["transformer_options"]["sample_sigmas"] = self._sigmas.to(device)
        comfy.sampler_helpers.prepare_model_patcher(model, {}, self._options)
        comfy.samplers.cast_to_load_options(self._options, device, model.model_dtype())
        model.pre_run()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Clean up the model and its patches."""
        self._model.cleanup()

    def __call__(
        self, latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> Tensor:
        """Predict the velocity; see ``ports.Denoiser``."""
        try:
            return self._predict(latents_BCFHW, sigma, conditioning, tokens)
        except Exception as error:
            if self._offloads or not comfy.model_management.is_oom(error):
                raise
        # Outside the except block: inside it the traceback keeps the tensors of the failed call.
        self._offloads = True
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        _log.warning(
            "memory ran out in the video model, whose weights from now on come from main memory "
            "when they are needed: that takes more time"
        )
        return self._predict(latents_BCFHW, sigma, conditioning, tokens)

    def _predict(
        self, latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> Tensor:
        # A single voice, and so null audio too, applies to the whole picture.
        regions_PHW = conditioning.regions_PHW if tokens.num_speakers > 1 else None
        device = self._model.load_device
        cond = {"uuid": uuid4(), "model_conds": self._make_conds(conditioning)}
        # The VAE may have pushed the model out of memory since the last call.
        network, _, _ = comfy.sampler_helpers.prepare_sampling(
            self._model,
            latents_BCFHW.shape,
            {"positive": [cond]},
            self._options,
            force_offload=self._offloads,
        )
        options = create_model_options_clone(self._options)
        options["transformer_options"][TOKENS_KEY] = tokens.tokens_FND[None].to(device)
        if regions_PHW is not None:
            options["transformer_options"][REGIONS_KEY] = token_regions(regions_PHW).to(device)
        noisy_BCFHW = latents_BCFHW.to(device, torch.float32)
        with comfy.model_management.cuda_device_context(device):
            (denoised_BCFHW,) = comfy.samplers.calc_cond_batch(
                network, [[cond]], noisy_BCFHW, torch.full((1,), sigma, device=device), options
            )
        # the host returns x0 = x - sigma v
        return ((noisy_BCFHW - denoised_BCFHW) / sigma).to(latents_BCFHW.device)

    def _make_conds(self, conditioning: Conditioning) -> dict[str, CONDRegular]:
        conds = {
            "c_concat": CONDNoiseShape(conditioning.reference_BCFHW),
            "c_crossattn": CONDRegular(self._make_text(conditioning.text_BND)),
        }
        if conditioning.image_embeds_BND is not None:
            conds["clip_fea"] = CONDRegular(conditioning.image_embeds_BND)
        return conds

    def _make_text(self, text_BND: Tensor | None) -> Tensor:
        text_dim = self._wan.text_dim
        if text_BND is None:
            # attention over 512 equal rows equals attention over one of them
            return torch.zeros(1, 1, text_dim)
        if text_BND.shape[1] > TEXT_LENGTH or text_BND.shape[2] != text_dim:
            raise MismatchError(
                f"got {text_BND.shape[1]} text tokens, {text_BND.shape[2]} wide; this model takes "
                f"at most {TEXT_LENGTH}, {text_dim} wide: use its own text encoder"
            )
        return pad(text_BND, (0, 0, 0, TEXT_LENGTH - text_BND.shape[1]))


class HostAudioEncoder:
    """The core's audio encoder as an AUDIO_ENCODER; also satisfies ``ports.AudioEncoder``."""

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
        """Width and stride of the first, normalised convolution; see ``ports.AudioEncoder``."""
        return self._encoder.first_kernel

    def fingerprint(self) -> str:
        """Compute the fingerprint of the weights; see ``ports.AudioEncoder``."""
        return self._encoder.fingerprint()

    def encode(
        self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
    ) -> Tensor:
        """Encode a waveform; see ``ports.AudioEncoder``."""
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
    """AUDIO_ENCODER of the host's own loader; satisfies ``ports.AudioEncoder``."""

    def __init__(self, encoder: AudioEncoderModel) -> None:
        """Wrap an encoder.

        Args:
            encoder: wav2vec2.
        """
        self._encoder = encoder

    @property
    def first_kernel(self) -> tuple[int, int] | None:
        """Width and stride of the first, normalised convolution; see ``ports.AudioEncoder``."""
        return find_first_kernel(self._encoder.model.feature_extractor.conv_layers[0])

    def fingerprint(self) -> str:
        """Compute the fingerprint of the weights; see ``ports.AudioEncoder``."""
        return fingerprint_networks([self._encoder.model])

    @torch.no_grad()
    def encode(
        self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
    ) -> Tensor:
        """Encode a waveform; see ``ports.AudioEncoder``."""
        comfy.model_management.load_model_gpu(self._encoder.patcher)
        model = self._encoder.model
        with normalized_by(model.feature_extractor.conv_layers[0], moments):
            features_BTD = model.feature_extractor(waveform_S[None].to(self._encoder.load_device))
        features_BTD = resample_steps(features_BTD.transpose(1, 2), num_frames).transpose(1, 2)
        _, states = model.encoder(model.feature_projection(features_BTD))
        return torch.stack([state_BTD[0] for state_BTD in states[1:]], dim=1).float().cpu()


class HostImageEncoder:
    """CLIP_VISION of the host; satisfies ``ports.ImageEncoder``."""

    def __init__(self, clip_vision: Any) -> None:
        """Wrap an encoder.

        Args:
            clip_vision: from the host's Load CLIP Vision.
        """
        self._clip_vision = clip_vision

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Encode a picture; see ``ports.ImageEncoder``."""
        image_BHWC = ((image_BCHW + 1) / 2).movedim(1, -1)
        # resized without a crop, as in the reference
        return self._clip_vision.encode_image(image_BHWC, crop=False).penultimate_hidden_states


class HostProgress:
    """Progress bar of the host over all work of a node; satisfies ``ports.Progress``."""

    def __init__(self, total: int) -> None:
        """Start the bar at 0.

        Args:
            total: units of work.
        """
        self._bar = ProgressBar(total)

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        """Count finished units; see ``ports.Progress``."""
        preview = None
        if preview_HWC is not None:
            picture = Image.fromarray((preview_HWC * 255).round().to(torch.uint8).numpy())
            # without the limit the host would enlarge a smaller picture
            preview = ("JPEG", picture, min(PREVIEW_SIDE, max(picture.size)))
        self._bar.update_absolute(self._bar.current + units, preview=preview)


def check_stop() -> None:
    """Raise the host's exception if its stop button was pressed; see ``ports.CheckStop``."""
    comfy.model_management.throw_exception_if_processing_interrupted()


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
    if conditioning is None:
        return None, ()
    (first_BND, told), *others = conditioning
    later = tuple(
        (options[PROMPT_START], text_BND) for text_BND, options in others if PROMPT_START in options
    )
    if PROMPT_START not in told and others:
        _log.warning("the prompt has %d parts; only the first is used", len(conditioning))
        return first_BND, ()
    return first_BND, later


def see_with(
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


def hear_with(audio_encoder: Any) -> AudioEncoder:
    """Return an AUDIO_ENCODER as the core's ``ports.AudioEncoder``.

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
