"""The host's diffusion model behind the core's ``Denoiser`` protocol.

The weights stay the host's: it decides where they are stored and in what precision they compute.

Axes: B batch, C channels, F latent frames, H height, W width, N tokens, D width, P speakers.
"""

from __future__ import annotations

from logging import getLogger
from types import TracebackType
from uuid import uuid4

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.conds import CONDNoiseShape, CONDRegular
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from torch import Tensor
from torch.nn.functional import pad

from ...turbotalk_core.errors import MismatchError
from ...turbotalk_core.geometry import TEXT_LENGTH
from ...turbotalk_core.models.speaker_embedding import token_regions
from ...turbotalk_core.request import TalkRequest
from ...turbotalk_core.sampling.schedule import request_sigmas
from ...turbotalk_core.types import AudioTokens, Conditioning
from .audio_adapter import REGIONS_KEY, TOKENS_KEY, get_wan

_log = getLogger(__name__)


class HostDenoiser:
    """Denoiser over a MODEL with an audio adapter; satisfies ``protocols.Denoiser``.

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
        """Predict the velocity; see ``protocols.Denoiser``."""
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
        # the host returns x0 = x - sigma v; sampling is on the CPU, so each call waits for it
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
