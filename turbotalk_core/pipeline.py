"""Generation of a talking video from a portrait and speech, chunk by chunk.

Input: a request, reference images, encoded speech, and networks that satisfy ``protocols``. Output:
an iterator of finished frames, so that one chunk is in memory whatever the length of the video.

Axes: B batch, C channels, T video frames, F latent frames, H height, W width, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .audio.windows import hold_last_row, null_windows, take_windows
from .chunking.color import match_color
from .chunking.plan import plan_chunks
from .chunking.stitch import keep_frames
from .conditioning.reference import add_mask
from .errors import MismatchError, OutOfMemoryError, RequestError
from .geometry import LATENT_CHANNELS, MASK_CHANNELS, SPATIAL_STRIDE, count_latent_frames
from .models.low_memory import is_shortage
from .protocols import AudioAdapter, CheckStop, Denoiser, ImageEncoder, Progress, VideoVAE
from .reference_behaviour import Behaviour, choose_behaviour
from .request import TalkRequest
from .sampling.guidance import Guidance, count_calls
from .sampling.sampler import sample
from .sampling.schedule import request_sigmas
from .types import (
    AudioTokens,
    Chunk,
    ChunkPlan,
    ChunkState,
    Conditioning,
    FeatureRows,
    FrameChunk,
    Speech,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The networks, and those of their inputs that are the same for the whole video.

    Attributes:
        vae: the video VAE.
        denoiser: the diffusion model.
        adapter: the audio adapter, from audio windows to audio tokens.
        text_BND: embedding of the prompt, or None for the null text.
        null_text_BND: embedding of the negative prompt, or None for the null text.
        image_embeds_BND: CLIP tokens of the portrait, or None where the model has no image branch.
        image_encoder: encoder of each reference image to CLIP tokens, instead of
            ``image_embeds_BND``.
        later_texts: embeddings that replace ``text_BND``, each with the video frame at which it
            starts, in order. A chunk uses the one that is valid in the middle of its new frames.
    """

    vae: VideoVAE
    denoiser: Denoiser
    adapter: AudioAdapter
    text_BND: Tensor | None = None
    null_text_BND: Tensor | None = None
    image_embeds_BND: Tensor | None = None
    image_encoder: ImageEncoder | None = None
    later_texts: tuple[tuple[int, Tensor], ...] = ()

    def cache_fields(self) -> dict[str, Tensor | None]:
        """Return these inputs by readable names, for ``cache_key.compute_cache_key``."""
        later = {f"prompt from frame {start}": text_BND for start, text_BND in self.later_texts}
        return {
            "prompt": self.text_BND,
            "negative prompt": self.null_text_BND,
            "clip vision": self.image_embeds_BND,
            **later,
        }


class NoProgress:
    """Progress that is not shown."""

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        """Do nothing."""


def never_stop() -> None:
    """Continue: a ``CheckStop`` that never stops."""


_NO_PROGRESS = NoProgress()


def plan_video(request: TalkRequest, speeches: Sequence[Speech]) -> ChunkPlan:
    """Plan the chunks that ``generate`` will make.

    Args:
        request: contains the numbers of chunk and motion frames, and the length limit.
        speeches: one per speaker; the video is as long as the longest.

    Returns:
        The plan.
    """
    lengths = [speech.features.num_frames for speech in speeches]
    most = request.max_frames or max(lengths)

    def plan(num_frames: int) -> ChunkPlan:
        return plan_chunks(min(num_frames, most), request.chunk_frames, request.num_motion_frames)

    return plan(choose_behaviour(request).count_frames(lengths, plan))


def count_work(
    plan: ChunkPlan, request: TalkRequest, num_pictures: int = 1, num_finished: int = 0
) -> int:
    """Count the units that ``generate`` reports: network, encoder and decoder calls.

    Args:
        plan: chunk plan of the video.
        request: contains the number of steps and the guidance scales.
        num_pictures: length of the sequence of reference images; 1 for a portrait.
        num_finished: number of chunks that are finished already.

    Returns:
        One for each reference image that is encoded, and per chunk one to encode the motion frames,
        one per network call and one to decode.
    """
    calls = count_calls(request.guidance_scale, request.audio_guidance_scale)
    chunks = plan.chunks[num_finished:]
    encoded = {_choose_picture(chunk, num_pictures) for chunk in chunks}
    return len(encoded) + len(chunks) * (request.num_inference_steps * calls + 2)


def generate(
    request: TalkRequest,
    pictures: Sequence[Tensor],
    speeches: Sequence[Speech],
    models: Models,
    *,
    progress: Progress = _NO_PROGRESS,
    check_stop: CheckStop = never_stop,
    regions_PHW: Tensor | None = None,
    chunk_state: ChunkState | None = None,
) -> Iterator[FrameChunk]:
    """Generate a talking video chunk by chunk; each is yielded before the next is generated.

    All noise comes from one CPU generator seeded by the request, in this order: for each chunk its
    noise, float32 [1, 16, F, H/8, W/8]; then, with the renoise update, one draw of that shape per
    step but the last. ``Behaviour.draw_unused_noise`` may draw in between.

    Args:
        request: all settings.
        pictures: the portrait alone, at the request's size, [1, 3, height, width] in [-1, 1]; or
            the frames of a video to dub, each such a picture. The reference image of a chunk is the
            one at its start, or the last. A picture is read when a chunk needs it.
        speeches: one per speaker, in the order of their regions.
        models: the networks.
        progress: counts the units of ``count_work``; gets the last frame of each finished chunk.
        check_stop: called before each network, encoder or decoder call.
        regions_PHW: regions of several speakers, from ``regions.fit_regions``.
        chunk_state: state after the last finished chunk of the same video; the following chunks
            are exactly those of a run that was never stopped.

    Returns:
        An iterator of chunks whose frames are float32 on the CPU and tile the video, or the rest of
        it. Nothing is generated before its first item is requested.

    Raises:
        MismatchError: if a reference image has another size than the request, the numbers of
            regions and voices differ, or the motion frames are of another video.
        RequestError: if there is text guidance without a prompt.
        OutOfMemoryError: if the device has too little memory; chunks yielded before are valid.
    """
    _check_picture(request, pictures[0])
    num_regions = 1 if regions_PHW is None else regions_PHW.shape[0] - 1
    if len(speeches) != num_regions:
        raise MismatchError(
            f"got {len(speeches)} voices and {num_regions} regions; give each of several speakers "
            "a region, and a lone one none"
        )
    if request.guidance_scale != 1 and models.text_BND is None:
        raise RequestError(
            f"got guidance_scale {request.guidance_scale} without a prompt; give a prompt, or "
            "use 1 (off)"
        )
    _check_chunk_state(request, chunk_state)
    return _report_shortage(
        request,
        _generate(
            request, pictures, speeches, models, progress, check_stop, regions_PHW, chunk_state
        ),
    )


def _report_shortage(request: TalkRequest, chunks: Iterator[FrameChunk]) -> Iterator[FrameChunk]:
    """Convert out-of-memory errors to an ``OutOfMemoryError`` that contains the remedies."""
    try:
        yield from chunks
        return
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        reason = str(error).split("\n")[0]
    # Outside the except block: inside it, the traceback would keep the tensors of the failed call.
    raise OutOfMemoryError(
        f"memory ran out at {request.width}x{request.height} with chunks of "
        f"{request.chunk_frames} frames, also in the ways that need less ({reason}). Close "
        "what else uses the device and run the same again, which goes on after the last finished "
        "chunk; or begin anew with a smaller size, fewer chunk_frames, or weights of a smaller "
        "dtype"
    )


@torch.no_grad()  # on a generator it holds only while this code runs, not in the caller's loop
def _generate(
    request: TalkRequest,
    pictures: Sequence[Tensor],
    speeches: Sequence[Speech],
    models: Models,
    progress: Progress,
    check_stop: CheckStop,
    regions_PHW: Tensor | None,
    chunk_state: ChunkState | None,
) -> Iterator[FrameChunk]:
    plan = plan_video(request, speeches)
    behaviour = choose_behaviour(request)
    sigmas = request_sigmas(request)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    guidance = Guidance(
        guidance_scale=request.guidance_scale,
        audio_guidance_scale=request.audio_guidance_scale,
        null_text_BND=models.null_text_BND,
        # All chunks are equally long, so they share one set of null tokens. Guidance needs the
        # prediction without any voice, which is the same for one speaker and for several.
        null_tokens=models.adapter(null_windows(speeches[0].features, plan.chunks[0])),
        uses_apg=request.uses_apg,
    )
    first_BCHW = pictures[0]
    # The first chunk has one motion frame, the picture itself, so that every chunk is sampled in
    # the same way: as the continuation of frames.
    motion_frames_BCTHW = first_BCHW.unsqueeze(2)
    num_finished = 0
    if chunk_state is not None:
        # The frames and the generator are as they were after the last finished chunk, so all later
        # chunks are the same as in a run that was never stopped.
        motion_frames_BCTHW, num_finished = chunk_state.motion_frames_BCTHW, chunk_state.num_chunks
        generator.set_state(chunk_state.noise_state_S)
    conditioning, encoded_index = None, None
    for chunk in plan.chunks[num_finished:]:
        check_stop()
        index = _choose_picture(chunk, len(pictures))
        # Encoding a whole clip costs many times as much as encoding motion frames, so it is done
        # only when the picture changes; a portrait is encoded once.
        if conditioning is None or index != encoded_index:
            conditioning = _condition(request, pictures[index], models, regions_PHW)
            encoded_index = index
            progress.advance()
            check_stop()
        text_BND = _find_text(models, chunk)
        if conditioning.text_BND is not text_BND:
            conditioning = replace(conditioning, text_BND=text_BND)
        # Motion frames are encoded again: the VAE is causal, so the latents that were decoded to
        # them also depend on earlier frames, and do not fit the start of a clip.
        motion_latents_BCFHW = models.vae.encode(motion_frames_BCTHW)
        if request.anchors_chunks and motion_latents_BCFHW.shape[2] > 1:
            motion_latents_BCFHW = _anchor(motion_latents_BCFHW, conditioning)
        progress.advance()
        # Before all draws of ``sample``: the order of the draws determines the frames.
        noise_BCFHW = _draw_noise(request, generator)
        if chunk.index > 0:
            behaviour.draw_unused_noise(request, motion_latents_BCFHW, generator)
        latents_BCFHW = sample(
            models.denoiser,
            noise_BCFHW,
            sigmas,
            conditioning=conditioning,
            tokens=_make_tokens(behaviour, speeches, chunk, plan, models.adapter),
            guidance=guidance,
            update=request.update,
            motion_latents_BCFHW=motion_latents_BCFHW,
            generator=generator,
            progress=progress,
            check_stop=check_stop,
        )
        check_stop()
        # Waits for the device, per chunk: frames are joined and written on the CPU.
        frames_BCTHW = models.vae.decode(latents_BCFHW).to("cpu", torch.float32)
        # Before joining and before the motion frames are taken, so that the next chunk continues
        # corrected colours and errors do not accumulate. The target is the first picture, also in a
        # dubbed video, as in the reference.
        frames_BCTHW = match_color(frames_BCTHW, first_BCHW, request.color_strength)
        if chunk.index > 0:
            frames_BCTHW = behaviour.join(frames_BCTHW, motion_frames_BCTHW)
        # The last frames of the whole chunk, kept or not: only the last chunk is ever shortened.
        motion_frames_BCTHW = frames_BCTHW[:, :, -request.num_motion_frames :]
        chunk_state = ChunkState(
            num_chunks=chunk.index + 1,
            motion_frames_BCTHW=motion_frames_BCTHW,
            noise_state_S=generator.get_state(),
        )
        finished = keep_frames(frames_BCTHW, chunk, chunk_state)
        progress.advance(preview_HWC=_preview(finished))
        yield finished


def _choose_picture(chunk: Chunk, num_pictures: int) -> int:
    """Return the index of a chunk's reference image: the one at its start, or the last."""
    return min(chunk.start, num_pictures - 1)


def _find_text(models: Models, chunk: Chunk) -> Tensor | None:
    """Return the text embedding of a chunk; without a prompt, the null text used by guidance."""
    if models.text_BND is None:
        return models.null_text_BND
    middle = (chunk.keep_start + chunk.keep_stop) // 2
    valid = [text_BND for start, text_BND in models.later_texts if start <= middle]
    return valid[-1] if valid else models.text_BND


def _check_picture(request: TalkRequest, picture_BCHW: Tensor) -> None:
    expected = (1, 3, request.height, request.width)
    if tuple(picture_BCHW.shape) != expected:
        raise MismatchError(
            f"got a reference image of shape {tuple(picture_BCHW.shape)}; the request needs "
            f"{expected}, so prepare the image at the request's size"
        )


def _check_chunk_state(request: TalkRequest, chunk_state: ChunkState | None) -> None:
    if chunk_state is None:
        return
    expected = (1, 3, request.num_motion_frames, request.height, request.width)
    frames_BCTHW = chunk_state.motion_frames_BCTHW
    if tuple(frames_BCTHW.shape) != expected or frames_BCTHW.dtype != torch.float32:
        raise MismatchError(
            f"got motion frames of shape {tuple(frames_BCTHW.shape)} and type "
            f"{frames_BCTHW.dtype} to go on from; the request needs {expected} and "
            f"{torch.float32}, so begin anew"
        )
    try:
        torch.Generator("cpu").set_state(chunk_state.noise_state_S)
    except (RuntimeError, TypeError) as error:
        raise MismatchError(
            f"got {chunk_state.noise_state_S.numel()} values that are no state of the noise to go "
            "on from; begin anew"
        ) from error


def _make_tokens(
    behaviour: Behaviour,
    speeches: Sequence[Speech],
    chunk: Chunk,
    plan: ChunkPlan,
    adapter: AudioAdapter,
) -> AudioTokens:
    """Compute the audio tokens of all voices for one chunk, one speaker after the other."""

    def project(features: FeatureRows) -> Tensor:
        features = behaviour.select_rows(features, chunk, is_last=chunk is plan.chunks[-1])
        return adapter(take_windows(hold_last_row(features, chunk.stop), chunk)).tokens_FND

    tokens = [project(speech.features) for speech in speeches]
    return AudioTokens(tokens_FND=torch.cat(tokens, 1), num_speakers=len(tokens))


def _condition(
    request: TalkRequest, picture_BCHW: Tensor, models: Models, regions_PHW: Tensor | None
) -> Conditioning:
    """Encode a picture as the first frame of an otherwise grey chunk."""
    _check_picture(request, picture_BCHW)
    latents_BCFHW = models.vae.encode_reference(picture_BCHW, request.chunk_frames)
    # Waits for the device, per picture: the conditioning is kept where sampling is done.
    latents_BCFHW = latents_BCFHW.to("cpu", torch.float32)
    image_embeds_BND = models.image_embeds_BND
    if models.image_encoder is not None:
        image_embeds_BND = models.image_encoder(picture_BCHW)
    return Conditioning(
        reference_BCFHW=add_mask(latents_BCFHW),
        image_embeds_BND=image_embeds_BND,
        regions_PHW=regions_PHW,
    )


def _anchor(motion_latents_BCFHW: Tensor, conditioning: Conditioning) -> Tensor:
    """Replace the first motion latents by the latents of the reference image.

    The other motion latents depend on the frames before them, as without an anchor.
    """
    # One latent frame to the device and back: two waits per chunk, with the one in ``sample``.
    image_BCFHW = conditioning.reference_BCFHW[:, MASK_CHANNELS:, :1].to(motion_latents_BCFHW)
    return torch.cat((image_BCFHW, motion_latents_BCFHW[:, :, 1:]), 2)


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
