"""Denoiser and audio adapter of the pipeline's protocols, made of the core's own networks."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from ..errors import MismatchError
from ..types import AudioTokens, AudioWindows, Conditioning
from .audio_adapter import AudioProjection
from .low_memory import call_with_low_memory
from .teacache import TeaCache
from .wan import WanModel


class WanDenoiser:
    """Velocity prediction by a ``WanModel``; satisfies ``protocols.Denoiser``.

    Args:
        model: a transformer with audio attention.
        audio_scale: factor on the output of the audio attention; 1 is as trained.
        teacache_threshold: accumulated change from which on the blocks run again, see
            ``TeaCache``; None runs them in every call.
    """

    def __init__(
        self, model: WanModel, audio_scale: float = 1.0, teacache_threshold: float | None = None
    ) -> None:
        self.model = model
        self.audio_scale = audio_scale
        self.teacache_threshold = teacache_threshold
        self._caches: dict[tuple[int, int], TeaCache] = {}
        self._asked: set[tuple[int, int]] = set()  # at the last sigma
        self._last_sigma = 0.0

    @torch.no_grad()
    def __call__(
        self, latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> Tensor:
        """Predict the velocity; see ``protocols.Denoiser``."""
        # One voice applies to the whole picture, and so does null audio, which counts as one.
        regions_PHW = conditioning.regions_PHW if tokens.num_speakers > 1 else None
        if tokens.num_speakers > 1 and regions_PHW is None:
            raise MismatchError(
                f"got {tokens.num_speakers} voices without regions; give each speaker a region of "
                "the picture"
            )
        device = self.model.patch_embedding.weight.device
        kind = self._find_cache(latents_BCFHW, sigma, conditioning, tokens)

        def call() -> Tensor:
            cache = copy(self._caches.get(kind))  # a call that fails must not change the cache
            # Sampling is done on the CPU, so that noise and rounding are those of every device: a
            # call waits for its result, and the copies to the device come when it is idle anyway.
            velocity = self.model(
                latents_BCFHW.to(device),
                torch.full((latents_BCFHW.shape[0],), 1000.0 * sigma, device=device),
                conditioning.reference_BCFHW.to(device),
                text_BND=_move(conditioning.text_BND, device),
                image_embeds_BND=_move(conditioning.image_embeds_BND, device),
                audio_BFND=tokens.tokens_FND.unsqueeze(0),
                audio_scale=self.audio_scale,
                regions_PHW=regions_PHW,
                cache=cache,
            )
            if cache is not None:
                self._caches[kind] = cache
            return velocity.to(latents_BCFHW.device)

        return call_with_low_memory(self.model, call, "the video transformer")

    def _find_cache(
        self, latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> tuple[int, int]:
        """Return the kind of a call, a key of ``_caches``, and make its cache if there is none.

        A step has one to three kinds of call: with or without text and voice, see
        ``sampling.guidance``. Each has a cache of its own, as their outputs differ. All caches are
        dropped when a new chunk begins.
        """
        # Text and audio tokens are the same objects through all steps of a chunk, so their
        # identities distinguish the kinds.
        kind = (id(conditioning.text_BND), id(tokens))
        if self.teacache_threshold is None:
            return kind
        if sigma != self._last_sigma:
            self._asked.clear()
        # Within a chunk sigma falls from step to step and each kind is called once per step. If
        # sigma rises, or a kind comes twice at one sigma (one-step sampling), a new chunk began.
        if sigma > self._last_sigma or kind in self._asked:
            self._caches.clear()
            self._asked.clear()
        self._asked.add(kind)
        self._last_sigma = sigma
        if kind not in self._caches:
            num_cells = latents_BCFHW.shape[3] * latents_BCFHW.shape[4]
            self._caches[kind] = TeaCache(self.teacache_threshold, num_cells)
        return kind


def _move(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


class ProjectionAdapter:
    """Audio adapter that projects one chunk at a time; satisfies ``protocols.AudioAdapter``."""

    def __init__(self, projection: AudioProjection) -> None:
        """Wrap a projection."""
        self.projection = projection

    @torch.no_grad()
    def __call__(self, windows: AudioWindows) -> AudioTokens:
        """Compute the audio tokens of one chunk; see ``protocols.AudioAdapter``."""
        weight = self.projection.proj1.weight
        # Features are on the CPU: two copies, which wait for the device, per voice and chunk.
        tokens = self.projection(
            windows.first_KLD.to(weight).unsqueeze(0), windows.later_FKLD.to(weight).unsqueeze(0)
        )
        return AudioTokens(tokens_FND=tokens.squeeze(0))
