"""The sampling loop over noise levels, which turns noise into the latents of one chunk.

Axes: B batch, C channels, F latent frames, H height, W width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..errors import MismatchError
from ..protocols import CheckStop, Denoiser, Progress
from ..request import Update
from ..types import AudioTokens, Conditioning
from .guidance import Guidance, begin_pushes, guided_velocity
from .steps import euler_step, renoise_step


def sample(
    denoiser: Denoiser,
    noise_BCFHW: Tensor,
    sigmas: Tensor,
    *,
    conditioning: Conditioning,
    tokens: AudioTokens,
    guidance: Guidance,
    update: Update,
    motion_latents_BCFHW: Tensor,
    generator: torch.Generator,
    progress: Progress,
    check_stop: CheckStop,
) -> Tensor:
    """Sample the clean latents of one chunk.

    The first latent frames are pinned to the clean motion latents in every network call and in the
    result, yet the network gets one timestep for all frames. The model was trained that way.

    Args:
        denoiser: the network.
        noise_BCFHW: standard normal noise; its dtype and device are those of all arithmetic here.
        sigmas: noise levels, descending to 0, [num_steps + 1].
        conditioning: the network's inputs besides latents, sigma and audio tokens.
        tokens: audio tokens of the voice.
        guidance: scales and null inputs.
        update: update rule from one noise level to the next.
        motion_latents_BCFHW: clean latents of the chunk's first latent frames; fewer frames than
            the noise.
        generator: source of the fresh noise of the renoise update.
        progress: advanced once per network call.
        check_stop: called before each network call; it may raise.

    Returns:
        Clean latents, in the shape of the noise.

    Raises:
        MismatchError: if the motion latents do not fit into the noise.

    Source: InfiniteTalk, wan/multitalk.py, the denoising loop of generate_infinitetalk.
    """
    motion_latents_BCFHW = motion_latents_BCFHW.to(noise_BCFHW)  # waits for the VAE, per chunk
    _check_fit(motion_latents_BCFHW, noise_BCFHW)
    watched = _watch(denoiser, progress, check_stop)
    pushes = begin_pushes(guidance)
    latents_BCFHW = _pin(noise_BCFHW, motion_latents_BCFHW)
    for sigma, next_sigma in pairwise(sigmas.tolist()):
        velocity_BCFHW = guided_velocity(
            watched, latents_BCFHW, sigma, conditioning, tokens, guidance, pushes
        )
        if update == "euler":
            latents_BCFHW = euler_step(latents_BCFHW, velocity_BCFHW, sigma, next_sigma)
        else:
            latents_BCFHW = renoise_step(
                latents_BCFHW, velocity_BCFHW, sigma, next_sigma, generator
            )
        latents_BCFHW = _pin(latents_BCFHW, motion_latents_BCFHW)
    return latents_BCFHW


def _pin(latents_BCFHW: Tensor, motion_latents_BCFHW: Tensor) -> Tensor:
    num_pinned = motion_latents_BCFHW.shape[2]
    return torch.cat((motion_latents_BCFHW, latents_BCFHW[:, :, num_pinned:]), 2)


def _watch(denoiser: Denoiser, progress: Progress, check_stop: CheckStop) -> Denoiser:
    def watched(
        latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> Tensor:
        check_stop()
        velocity_BCFHW = denoiser(latents_BCFHW, sigma, conditioning, tokens)
        progress.advance()
        return velocity_BCFHW.to(latents_BCFHW)

    return watched


def _check_fit(motion_latents_BCFHW: Tensor, noise_BCFHW: Tensor) -> None:
    motion, noise = tuple(motion_latents_BCFHW.shape), tuple(noise_BCFHW.shape)
    if motion[:2] + motion[3:] != noise[:2] + noise[3:] or motion[2] >= noise[2]:
        raise MismatchError(
            f"got motion latents of shape {motion} for noise of shape {noise}; all axes but the "
            "third must be equal and the third must be shorter"
        )
