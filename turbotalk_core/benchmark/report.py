"""Benchmark of one chunk, the command ``bench``: its memory and time by part, at any size.

Memory is counted by part without allocating it; seconds by part are measured in the pipeline
itself. Separate because it needs neither files nor a voice: speed and memory do not depend on the
values of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.networks import load_dit, load_vae
from ..errors import RequestError
from ..geometry import (
    IMAGE_TOKENS,
    LATENT_CHANNELS,
    SAMPLE_RATE,
    SPATIAL_STRIDE,
    TEXT_LENGTH,
    count_latent_frames,
    count_samples,
    count_video_tokens,
)
from ..loading import ModelFiles, load_models
from ..models.audio_adapter import AudioAdapterConfig, AudioProjection
from ..models.denoiser import ProjectionAdapter, WanDenoiser
from ..models.image_encoder import VIT_H, ImageEncoder
from ..models.vae import WanVAE
from ..models.wan import WanConfig, WanModel
from ..pipeline import Models
from ..request import TalkRequest
from ..types import AudioFeatures, Conversation, Speaker, Speech, Waveform
from .memory import count_memory
from .timing import ChunkTiming, Speed, time_call, time_video

NUM_STEPS = (1, 2, 4)  # those that students are distilled for
NUM_CHUNKS = 5  # the first is not representative, as it also encodes the reference
KERNEL_SHARE = 0.1  # workspace of kernels, which is not counted, as a share of the counted memory
CPU_WEIGHTS = 4_000_000_000  # bytes; with more of them a chunk takes hours without CUDA
WEIGHT_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the networks.

    Attributes:
        transformer: sizes of the video transformer with its audio attention.
        projection: sizes of the adapter's projection.
        vae_width: channels of the VAE at full resolution.
    """

    transformer: WanConfig
    projection: AudioAdapterConfig
    vae_width: int


# Wan2.1-I2V-14B with InfiniteTalk's audio modules, and the public VAE.
FULL_SIZES = Sizes(transformer=WanConfig(), projection=AudioAdapterConfig(), vae_width=96)
FULL_REQUEST = TalkRequest(
    num_inference_steps=1,
    schedule="reference",
    shift=7.0,
    update="euler",
    seed=0,
    height=480,
    width=832,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Memory needed for one chunk by part, in bytes.

    Attributes:
        transformer: weights of the transformer, without those of the audio attention.
        audio: weights of audio attention and projection.
        vae: weights of the VAE.
        image: weights of the CLIP image encoder; 0 for a transformer that does not use CLIP's.
        encode: memory besides all weights while the reference is encoded.
        forward: memory besides all weights during one call of the transformer.
        decode: memory besides all weights while the chunk is decoded.
    """

    transformer: int
    audio: int
    vae: int
    image: int
    encode: int
    forward: int
    decode: int

    @property
    def weights(self) -> int:
        """Memory of all weights, bytes."""
        return self.transformer + self.audio + self.vae + self.image

    @property
    def peak(self) -> int:
        """Memory of all weights plus that of the largest other part, bytes."""
        return self.weights + max(self.encode, self.forward, self.decode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Measured speed and memory of making videos.

    Attributes:
        speeds: one for each number of steps.
        peak: peak of the memory allocated on the device, bytes; None without CUDA.
    """

    speeds: tuple[Speed, ...]
    peak: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Report of the memory that a chunk needs and, if it could be run, of its measurement.

    Attributes:
        request: settings of the chunk, with size and frames.
        weights: source and dtype of the weights, as text.
        device: name of the device.
        need: memory by part.
        obstacle: reason why no chunk was run; None if chunks were run.
        measurement: measurement of the runs; None if there is an obstacle.
    """

    request: TalkRequest
    weights: str
    device: str
    need: Need
    obstacle: str | None
    measurement: Measurement | None

    @property
    def num_tokens(self) -> int:
        """Video tokens of the chunk."""
        request = self.request
        return count_video_tokens(request.chunk_frames, request.height, request.width)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        request, need = self.request, self.need
        parts = {
            "transformer weights": need.transformer,
            "audio weights": need.audio,
            "VAE weights": need.vae,
            "CLIP weights": need.image,
            "on top, encode": need.encode,
            "on top, forward": need.forward,
            "on top, decode": need.decode,
            "needed at once": need.peak,
        }
        lines = [
            f"chunks of {request.chunk_frames} frames, {request.width}x{request.height}, "
            f"{self.num_tokens:,} video tokens",
            f"{self.weights}, on {self.device}",
            *(f"  {name:<30}{num_bytes / 1e9:>9.3f} GB" for name, num_bytes in parts.items()),
        ]
        if self.measurement is None:
            return [*lines, f"not run: {self.obstacle}"]
        speeds = self.measurement.speeds
        lines.append(_to_row("steps per chunk", [speed.num_steps for speed in speeds]))
        lines.append(_to_row("bare call, s", [speed.bare for speed in speeds]))
        for part in ("encode", "adapter", "forward", "decode", "rest", "write", "chunk"):
            lines.append(
                _to_row(f"chunk: {part}, s", [getattr(s.video.steady, part) for s in speeds])
            )
        rows = {
            "chunk / bare call": [speed.ratio for speed in speeds],
            "first chunk, s": [speed.video.chunks[0].chunk for speed in speeds],
            "frames per second": [speed.video.throughput for speed in speeds],
        }
        lines.extend(_to_row(name, values) for name, values in rows.items())
        if self.measurement.peak is not None:
            lines.append(f"  {'measured peak':<30}{self.measurement.peak / 1e9:>9.3f} GB")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        measured = self.measurement
        return {
            "width": self.request.width,
            "height": self.request.height,
            "num_frames": self.request.chunk_frames,
            "num_tokens": self.num_tokens,
            "weights": self.weights,
            "device": self.device,
            "needed_bytes": asdict(self.need) | {"peak": self.need.peak},
            "obstacle": self.obstacle,
            "speeds": [_to_record(speed) for speed in measured.speeds] if measured else [],
            "peak_bytes": measured.peak if measured else None,
        }


def _to_row(name: str, values: Sequence[float]) -> str:
    cells = [f"{value:>9}" if isinstance(value, int) else f"{value:>9.3f}" for value in values]
    return f"  {name:<30}{''.join(cells)}"


def _to_record(speed: Speed) -> dict[str, Any]:
    def to_dict(chunk: ChunkTiming) -> dict[str, Any]:
        return asdict(chunk) | {"chunk": chunk.chunk}

    return {
        "num_steps": speed.num_steps,
        "bare_call_seconds": speed.bare,
        "chunk_in_bare_calls": speed.ratio,
        "first_chunk": to_dict(speed.video.chunks[0]),
        "steady_chunk": to_dict(speed.video.steady),
        "frames_per_second": speed.video.throughput,
    }


def measure(
    request: TalkRequest,
    sizes: Sizes,
    *,
    files: ModelFiles | None,
    dtype: torch.dtype,
    device: torch.device,
    steps: Sequence[int] = NUM_STEPS,
    num_chunks: int = NUM_CHUNKS,
) -> Report:
    """Count the memory of a chunk and, if the device has enough, measure making videos.

    Args:
        request: result of ``plain_request``.
        sizes: sizes of the networks.
        files: files of the networks; None uses random weights.
        dtype: dtype of transformer and adapter; the VAE is in float32.
        device: device of the networks.
        steps: numbers of steps per chunk; a video is made for each.
        num_chunks: chunks of each video, at least 2.

    Returns:
        The report.

    Raises:
        RequestError: if there are fewer than two chunks, or a number of steps is outside its range.
        CheckpointError: if a file is damaged or of another kind.
    """
    if num_chunks < 2:
        raise RequestError(f"got {num_chunks} chunks; how they follow each other takes two or more")
    requests = [replace(request, num_inference_steps=number) for number in steps]
    need = count_need(sizes, request, dtype)
    obstacle = find_obstacle(need, device)
    measurement = None
    if obstacle is None:
        if files is None:
            models = build_random_models(sizes, dtype, device)
        else:
            models = load_models(files, device, dtype=dtype)
        measurement = run_chunks(models, sizes, requests, device, num_chunks)
    is_cuda = device.type == "cuda" and torch.cuda.is_available()
    return Report(
        request=request,
        weights=f"{'random weights' if files is None else files.dit.name} in "
        f"{str(dtype).removeprefix('torch.')}, VAE in float32",
        device=torch.cuda.get_device_name(device) if is_cuda else str(device),
        need=need,
        obstacle=obstacle,
        measurement=measurement,
    )


def plain_request(request: TalkRequest, num_frames: int | None) -> TalkRequest:
    """Return a request without guidance and with the reference schedule.

    Args:
        request: request with all other settings.
        num_frames: frames of a chunk, 4n + 1; None keeps those of the request.

    Returns:
        The request; with 1 motion frame if the chunk is too short for the request's number.

    Raises:
        RequestError: if num_frames is outside its range.
    """
    chunk_frames = num_frames or request.chunk_frames
    motion_frames = request.num_motion_frames
    return replace(
        request,
        schedule="reference",
        guidance_scale=1.0,
        audio_guidance_scale=1.0,
        chunk_frames=chunk_frames,
        num_motion_frames=motion_frames if motion_frames < chunk_frames else 1,
    )


def read_sizes(files: ModelFiles) -> Sizes:
    """Read the sizes of networks from their files.

    Args:
        files: files of the networks.

    Returns:
        Their sizes.

    Raises:
        CheckpointError: if a file is damaged or of another kind.
    """
    model, projection = load_dit(files.inspect(files.dit), files.inspect(files.adapter))
    assert projection is not None  # an adapter was given
    return Sizes(
        transformer=model.config,
        projection=projection.config,
        vae_width=load_vae(files.inspect(files.vae)).dim,
    )


def count_need(sizes: Sizes, request: TalkRequest, dtype: torch.dtype) -> Need:
    """Count the memory of one chunk without allocating it.

    The memory of weights is exact. The memory of intermediate results is counted by running the
    same networks on the meta device; it is exact except for the workspace of kernels.

    Args:
        sizes: sizes of the networks.
        request: request with height, width and chunk_frames.
        dtype: dtype of the weights of transformer and adapter; VAE and CLIP are in float32.

    Returns:
        Bytes by part.
    """
    # All blocks are equal and run one after the other, so one block is enough to compute the
    # weights and the peak memory of all.
    config = replace(sizes.transformer, num_layers=1)
    with torch.device("meta"):
        model, vae = WanModel(config).to(dtype), WanVAE(sizes.vae_width)
        projection = AudioProjection(sizes.projection).to(dtype)
        encoder = _build_image_encoder(sizes)
        rest, block = _count_weights(model), _count_weights(model.blocks)
        audio = sum(
            parameter.nbytes
            for name, parameter in model.named_parameters()
            if ".audio_cross_attn." in name or ".norm_x." in name
        )
        inputs = _ZeroInputs(sizes, request)
        return Need(
            transformer=rest - block + sizes.transformer.num_layers * (block - audio),
            audio=sizes.transformer.num_layers * audio + _count_weights(projection),
            vae=_count_weights(vae),
            image=0 if encoder is None else _count_weights(encoder),
            encode=count_memory(
                vae, lambda: vae.encode_reference(inputs.picture(), request.chunk_frames)
            ),
            forward=count_memory(model, lambda: inputs.call(model)),
            decode=count_memory(vae, lambda: vae.decode(inputs.latents())),
        )


def build_random_models(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Models:
    """Build networks with random weights.

    Args:
        sizes: sizes of the networks.
        dtype: dtype of transformer and adapter; VAE and CLIP are in float32.
        device: device of the networks, on which their weights are drawn too.

    Returns:
        The networks; the same sizes, dtype and device give the same weights.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model, projection = WanModel(sizes.transformer), AudioProjection(sizes.projection)
        encoder = _build_image_encoder(sizes)
    for module in (model, projection):
        module.to(dtype).to_empty(device=device)
    with torch.random.fork_rng(devices=[]):  # its constructor draws weights, replaced below
        vae = WanVAE(sizes.vae_width).to(device)
    for module in (model, projection, vae):
        _draw(module.requires_grad_(False).eval(), generator)
    if encoder is not None:
        _draw(encoder.to_empty(device=device).requires_grad_(False).eval(), generator)
    return Models(
        vae=vae,
        denoiser=WanDenoiser(model),
        adapter=ProjectionAdapter(projection),
        image_encoder=encoder,
    )


def run_chunks(
    models: Models,
    sizes: Sizes,
    requests: Sequence[TalkRequest],
    device: torch.device,
    num_chunks: int,
) -> Measurement:
    """Measure making a video for each request with the pipeline itself, from random inputs.

    Args:
        models: the networks; random text and image tokens are added here.
        sizes: sizes of the networks.
        requests: requests that differ in their number of steps only.
        device: device of the networks.
        num_chunks: chunks of each video.

    Returns:
        Speed for each request, and the peak memory of all.
    """
    inputs = make_inputs(models, sizes, requests[0], device, num_chunks)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bare = time_call(inputs.models, requests[0], inputs.conversation, device)
    speeds = [
        Speed(
            num_steps=request.num_inference_steps,
            bare=bare,
            video=time_video(
                inputs.models, request, inputs.conversation, inputs.picture_HWC, device
            ),
        )
        for request in requests
    ]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Measurement(speeds=tuple(speeds), peak=peak)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Random inputs of a video.

    Attributes:
        models: the networks, with random text and image tokens.
        conversation: random audio features of one speaker with a silent waveform.
        picture_HWC: random portrait at the video's size, in [0, 1].
    """

    models: Models
    conversation: Conversation
    picture_HWC: Tensor


def make_inputs(
    models: Models, sizes: Sizes, request: TalkRequest, device: torch.device, num_chunks: int
) -> Inputs:
    """Draw random inputs of a video.

    Args:
        models: the networks.
        sizes: sizes of the networks.
        request: gives the size and frames of a chunk.
        device: device of the networks.
        num_chunks: chunks of the video.

    Returns:
        The same inputs for the same arguments.
    """
    generator = torch.Generator().manual_seed(0)
    config = sizes.transformer
    text_BND = torch.randn(1, TEXT_LENGTH, config.text_dim, generator=generator)
    image_BND = None
    if config.image_dim is not None:
        image_BND = torch.randn(1, IMAGE_TOKENS, config.image_dim, generator=generator).to(device)
    picture_HWC = torch.rand(request.height, request.width, 3, generator=generator)
    new_frames = request.chunk_frames - request.num_motion_frames
    num_frames = request.chunk_frames + (num_chunks - 1) * new_frames
    return Inputs(
        models=replace(models, text_BND=text_BND.to(device), image_embeds_BND=image_BND),
        conversation=_make_conversation(sizes, num_frames, generator),
        picture_HWC=picture_HWC,
    )


def find_obstacle(need: Need, device: torch.device) -> str | None:
    """Return why a chunk cannot be run on a device.

    Args:
        need: memory needed for the chunk.
        device: device to run it on.

    Returns:
        The reason, or None if it can be run.
    """
    if device.type != "cuda":
        if need.weights <= CPU_WEIGHTS:
            return None
        return f"on {device} weights of this size would take hours; use a CUDA device"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    free, _ = torch.cuda.mem_get_info(device)
    wanted = need.peak * (1 + KERNEL_SHARE)
    if free >= wanted:
        return None
    return f"{free / 1e9:.1f} GB of the device are free; {wanted / 1e9:.1f} GB are wanted"


class _ZeroInputs:
    """Inputs of the networks for one chunk: zeros on the default device."""

    def __init__(self, sizes: Sizes, request: TalkRequest) -> None:
        self._sizes, self._request = sizes, request

    def picture(self) -> Tensor:
        return torch.zeros(1, 3, self._request.height, self._request.width)

    def latents(self, channels: int = LATENT_CHANNELS) -> Tensor:
        request = self._request
        height, width = request.height // SPATIAL_STRIDE, request.width // SPATIAL_STRIDE
        return torch.zeros(1, channels, count_latent_frames(request.chunk_frames), height, width)

    def call(self, model: WanModel) -> Tensor:
        config, tokens = self._sizes.transformer, self._sizes.projection
        latents_BCFHW = self.latents()
        image_BND = None
        if config.image_dim is not None:
            image_BND = torch.zeros(1, IMAGE_TOKENS, config.image_dim)
        return model(
            latents_BCFHW,
            torch.zeros(1),
            self.latents(config.in_channels - LATENT_CHANNELS),
            text_BND=torch.zeros(1, TEXT_LENGTH, config.text_dim),
            image_embeds_BND=image_BND,
            audio_BFND=torch.zeros(1, latents_BCFHW.shape[2], tokens.num_tokens, tokens.token_dim),
        )


def _make_conversation(sizes: Sizes, num_frames: int, generator: torch.Generator) -> Conversation:
    """Return random audio features of one speaker with a silent waveform."""
    width = sizes.projection.frame_width
    features = AudioFeatures(
        features_TLD=torch.randn(num_frames, 1, width, generator=generator), num_frames=num_frames
    )
    waveform = Waveform(
        samples_CS=torch.zeros(1, count_samples(num_frames, SAMPLE_RATE)), sample_rate=SAMPLE_RATE
    )
    return Conversation(
        speakers=(Speaker(name="the speaker", waveform=waveform),),
        speeches=(Speech(features=features, waveform=waveform),),
        waveform=waveform,
    )


def _build_image_encoder(sizes: Sizes) -> ImageEncoder | None:
    """Build CLIP on the default device if its tokens fit the transformer's image branch."""
    return ImageEncoder(**VIT_H) if sizes.transformer.image_dim == VIT_H["dim"] else None


def _count_weights(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    for name, weight in module.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif weight.ndim == 1 or name.endswith("gamma"):  # gains of norms
            weight.fill_(1)
        else:
            weight.normal_(std=WEIGHT_STD, generator=generator)
