"""From a portrait and a voice to frames, chunk by chunk: the only file that knows all rooms.

Goes in: a request, the reference image, the speech and the networks behind ports. Comes out: an
iterator of finished frames, so memory is one chunk whatever the length.

Axes: B batch, C channels, T video frames, F latent frames, H height, W width, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .audio.windows import null_windows, take_windows
from .chunking.plan import plan_chunks
from .chunking.stitch import keep_frames
from .errors import MismatchError, RequestError
from .geometry import LATENT_CHANNELS, SPATIAL_STRIDE, count_latent_frames
from .ports import AudioAdapter, CheckStop, Denoiser, Progress, VideoCodec
from .request import TalkRequest
from .sampling.guidance import Guidance, count_calls
from .sampling.sampler import sample
from .sampling.schedule import request_sigmas
from .types import ChunkPlan, Conditioning, FrameChunk, Speech

MASK_CHANNELS = 4  # Wan 2.1 image-to-video: one per video frame of a latent frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The networks, and what they were told once for the whole video.

    Attributes:
        codec: the video VAE.
        denoiser: the diffusion model.
        adapter: from audio windows to tokens.
        text_BND: embedding of the prompt, or None for the null text.
        null_text_BND: embedding of the negative prompt, or None for the null text.
        image_embeds_BND: CLIP tokens of the portrait, or None where the model has no image branch.
    """

    codec: VideoCodec
    denoiser: Denoiser
    adapter: AudioAdapter
    text_BND: Tensor | None = None
    null_text_BND: Tensor | None = None
    image_embeds_BND: Tensor | None = None


class NoProgress:
    """Counts nothing."""

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        """Do nothing."""


def never_stop() -> None:
    """Let the work go on."""


_NO_PROGRESS = NoProgress()


def plan_video(request: TalkRequest, speech: Speech) -> ChunkPlan:
    """Plan the chunks that ``generate`` will make.

    Args:
        request: gives chunk and motion frames.
        speech: gives the number of frames.

    Returns:
        The plan.
    """
    return plan_chunks(speech.features.num_frames, request.chunk_frames, request.num_motion_frames)


def count_work(plan: ChunkPlan, request: TalkRequest) -> int:
    """Count the units that ``generate`` reports: network, encoder and decoder calls.

    Args:
        plan: of the video.
        request: gives steps and guidance.

    Returns:
        One for the reference, and per chunk one to encode the motion frames, one per network call
        and one to decode.
    """
    calls = count_calls(request.guidance_scale, request.audio_guidance_scale)
    return 1 + len(plan.chunks) * (request.num_inference_steps * calls + 2)


def generate(
    request: TalkRequest,
    reference_BCHW: Tensor,
    speech: Speech,
    models: Models,
    *,
    progress: Progress = _NO_PROGRESS,
    check_stop: CheckStop = never_stop,
) -> Iterator[FrameChunk]:
    """Make a talking video, one chunk after the other, each handed on before the next begins.

    All noise comes from one CPU generator seeded by the request, in this order: for each chunk its
    noise, float32 [1, 16, F, H/8, W/8]; then, with the renoise update, one draw of that shape per
    step but the last.

    Args:
        request: all settings.
        reference_BCHW: the portrait at the request's size, [1, 3, height, width] in [-1, 1].
        speech: the voice.
        models: the networks.
        progress: told of each unit of ``count_work``; at the end of a chunk with its last frame.
        check_stop: asked before each network, encoder or decoder call.

    Returns:
        An iterator of chunks whose frames are float32 on the CPU and tile the video. Work begins
        when it is first asked.

    Raises:
        MismatchError: a reference image of another size than the request's.
        RequestError: text guidance without a prompt.
    """
    expected = (1, 3, request.height, request.width)
    if tuple(reference_BCHW.shape) != expected:
        raise MismatchError(
            f"got a reference image of shape {tuple(reference_BCHW.shape)}; the request needs "
            f"{expected}, so prepare the image at the request's size"
        )
    if request.guidance_scale != 1 and models.text_BND is None:
        raise RequestError(
            f"got guidance_scale {request.guidance_scale} without a prompt; give a prompt, or "
            "use 1 (off)"
        )
    return _generate(request, reference_BCHW, speech, models, progress, check_stop)


@torch.no_grad()  # on a generator it holds only while this code runs, not in the caller's loop
def _generate(
    request: TalkRequest,
    reference_BCHW: Tensor,
    speech: Speech,
    models: Models,
    progress: Progress,
    check_stop: CheckStop,
) -> Iterator[FrameChunk]:
    plan = plan_video(request, speech)
    sigmas = request_sigmas(request)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    guidance = Guidance(
        guidance_scale=request.guidance_scale,
        audio_guidance_scale=request.audio_guidance_scale,
        null_text_BND=models.null_text_BND,
        # All chunks are equally long, so one set of null tokens serves them all.
        null_tokens=models.adapter(null_windows(speech.features, plan.chunks[0])),
    )
    check_stop()
    conditioning = _condition(request, reference_BCHW, models)
    progress.advance()
    motion_frames_BCTHW = reference_BCHW.unsqueeze(2)
    for chunk in plan.chunks:
        check_stop()
        motion_latents_BCFHW = models.codec.encode(motion_frames_BCTHW)
        progress.advance()
        latents_BCFHW = sample(
            models.denoiser,
            _draw_noise(request, generator),
            sigmas,
            conditioning=conditioning,
            tokens=models.adapter(take_windows(speech.features, chunk)),
            guidance=guidance,
            update=request.update,
            motion_latents_BCFHW=motion_latents_BCFHW,
            generator=generator,
            progress=progress,
            check_stop=check_stop,
        )
        check_stop()
        frames_BCTHW = models.codec.decode(latents_BCFHW).to("cpu", torch.float32)
        finished = keep_frames(frames_BCTHW, chunk)
        progress.advance(preview_HWC=_preview(finished))
        yield finished
        motion_frames_BCTHW = frames_BCTHW[:, :, -request.num_motion_frames :]


def _condition(request: TalkRequest, reference_BCHW: Tensor, models: Models) -> Conditioning:
    """Encode the reference image as the first frame of an otherwise grey chunk, once per video."""
    image_BCTHW = reference_BCHW.unsqueeze(2).to("cpu", torch.float32)
    grey_BCTHW = image_BCTHW.new_zeros(
        1, 3, request.chunk_frames - 1, request.height, request.width
    )
    latents_BCFHW = models.codec.encode(torch.cat((image_BCTHW, grey_BCTHW), 2))
    latents_BCFHW = latents_BCFHW.to("cpu", torch.float32)
    mask_BCFHW = latents_BCFHW.new_zeros(1, MASK_CHANNELS, *latents_BCFHW.shape[2:])
    mask_BCFHW[:, :, 0] = 1
    return Conditioning(
        reference_BCFHW=torch.cat((mask_BCFHW, latents_BCFHW), 1),
        text_BND=models.null_text_BND if models.text_BND is None else models.text_BND,
        image_embeds_BND=models.image_embeds_BND,
    )


def _draw_noise(request: TalkRequest, generator: torch.Generator) -> Tensor:
    return torch.randn(
        1,
        LATENT_CHANNELS,
        count_latent_frames(request.chunk_frames),
        request.height // SPATIAL_STRIDE,
        request.width // SPATIAL_STRIDE,
        generator=generator,
        dtype=torch.float32,
    )


def _preview(finished: FrameChunk) -> Tensor:
    last_CHW = finished.frames_BCTHW[0, :, -1]
    return ((last_CHW + 1) / 2).clamp(0, 1).permute(1, 2, 0)
