"""What one chunk needs and how long it takes, at any size of the networks.

Goes in: sizes and settings. Comes out: memory by part, counted without taking it, and seconds by
part, measured in the pipeline itself. Separate because it needs no file and no voice: speed and
memory do not depend on what the weights are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .geometry import (
    LATENT_CHANNELS,
    PATCH,
    SAMPLE_RATE,
    SPATIAL_STRIDE,
    count_latent_frames,
    count_samples,
)
from .library import ModelFiles, load_models
from .model.audio_adapter import AudioAdapterConfig, AudioProjection
from .model.checkpoint import load_dit, load_vae
from .model.denoiser import ProjectionAdapter, WanDenoiser
from .model.memory import count_memory
from .model.vae import WanVAE
from .model.wan import TEXT_LENGTH, WanConfig, WanModel
from .pipeline import Models, generate
from .ports import VideoCodec
from .request import TalkRequest
from .types import AudioFeatures, Speech, Waveform

IMAGE_TOKENS = 257  # CLIP ViT-H/14 at 224 pixels: 16 x 16 patches and one for the whole
NUM_RUNS = 2  # the first also pays for what kernels set up once
KERNEL_SHARE = 0.1  # of the counted memory, for what kernels take for themselves
CPU_WEIGHTS = 4_000_000_000  # bytes; with more of them a chunk takes hours without CUDA
WEIGHT_STD = 0.02

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Networks by their sizes.

    Attributes:
        transformer: of the video transformer with its audio attention.
        projection: of the adapter's projection.
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
    """Memory of one chunk by part, in bytes.

    Attributes:
        transformer: its weights, without the audio attention's.
        audio: weights of audio attention and projection.
        vae: weights of the VAE.
        encode: on top of all weights, while the reference is encoded.
        forward: on top of all weights, during one call of the transformer.
        decode: on top of all weights, while the chunk is decoded.
    """

    transformer: int
    audio: int
    vae: int
    encode: int
    forward: int
    decode: int

    @property
    def weights(self) -> int:
        """All weights."""
        return self.transformer + self.audio + self.vae

    @property
    def peak(self) -> int:
        """All weights, and on top the part that takes most."""
        return self.weights + max(self.encode, self.forward, self.decode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one chunk by part.

    Attributes:
        forward: one call of the transformer; of several the mean.
        encode: reference and motion frames.
        decode: the whole chunk.
        chunk: everything, from noise to frames on the CPU.
    """

    forward: float
    encode: float
    decode: float
    chunk: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What running chunks one after the other showed.

    Attributes:
        runs: of each chunk.
        peak: most bytes allocated on the device; None where it keeps no count.
    """

    runs: tuple[Timing, ...]
    peak: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a chunk needs, and where it could be run, what it took.

    Attributes:
        request: size, frames and steps of the chunk.
        weights: where they came from, and their dtype.
        device: in words.
        need: memory by part.
        obstacle: why the chunk was not run; None where it was.
        measurement: of the runs; None where there is an obstacle.
    """

    request: TalkRequest
    weights: str
    device: str
    need: Need
    obstacle: str | None
    measurement: Measurement | None

    @property
    def ratios(self) -> dict[str, float]:
        """The last run's chunk and VAE in calls of the transformer; they travel between devices."""
        if self.measurement is None:
            return {}
        last = self.measurement.runs[-1]
        return {
            "chunk": last.chunk / last.forward,
            "vae": (last.encode + last.decode) / last.forward,
        }

    def lines(self) -> list[str]:
        """Tell it to people."""
        request, need = self.request, self.need
        parts = {
            "transformer weights": need.transformer,
            "audio weights": need.audio,
            "VAE weights": need.vae,
            "on top, encode": need.encode,
            "on top, forward": need.forward,
            "on top, decode": need.decode,
            "needed at once": need.peak,
        }
        lines = [
            f"one chunk of {request.chunk_frames} frames, {request.width}x{request.height}, "
            f"{count_tokens(request):,} video tokens, steps: {request.num_inference_steps}",
            f"{self.weights}, on {self.device}",
            *(f"  {name:<22}{num_bytes / 1e9:>9.3f} GB" for name, num_bytes in parts.items()),
        ]
        if self.measurement is None:
            return [*lines, f"not run: {self.obstacle}"]
        first, *_, last = self.measurement.runs
        for name, seconds in asdict(last).items():
            lines.append(f"  {name:<22}{seconds:>9.3f} s, first run {getattr(first, name):.3f} s")
        for name, ratio in self.ratios.items():
            lines.append(f"  {name + ' / forward':<22}{ratio:>9.2f}")
        if self.measurement.peak is not None:
            lines.append(f"  {'measured peak':<22}{self.measurement.peak / 1e9:>9.3f} GB")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Tell it to programs."""
        return {
            "width": self.request.width,
            "height": self.request.height,
            "num_frames": self.request.chunk_frames,
            "num_inference_steps": self.request.num_inference_steps,
            "num_tokens": count_tokens(self.request),
            "weights": self.weights,
            "device": self.device,
            "needed_bytes": asdict(self.need) | {"peak": self.need.peak},
            "obstacle": self.obstacle,
            "seconds": [asdict(run) for run in self.measurement.runs] if self.measurement else [],
            "ratios": self.ratios,
            "peak_bytes": self.measurement.peak if self.measurement else None,
        }


def measure(
    request: TalkRequest,
    sizes: Sizes,
    *,
    files: ModelFiles | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Report:
    """Count what a chunk needs, and run it where that is there.

    Args:
        request: of ``single_chunk``.
        sizes: of the networks.
        files: of the networks; None draws random weights.
        dtype: of transformer and adapter; the VAE is in float32.
        device: where they run.

    Returns:
        The report.

    Raises:
        CheckpointError: a file that is damaged or of another kind.
    """
    need = count_need(sizes, request, dtype)
    obstacle = find_obstacle(need, device)
    measurement = None
    if obstacle is None:
        if files is None:
            models = build_random_models(sizes, dtype, device)
        else:
            models = load_models(files, device, dtype=dtype)
        measurement = run_chunks(models, sizes, request, device)
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


def single_chunk(request: TalkRequest, num_steps: int, num_frames: int | None) -> TalkRequest:
    """Make the request of one chunk, sampled without guidance.

    Args:
        request: gives height and width, and the frames where none are given.
        num_steps: calls of the transformer.
        num_frames: of the chunk, 4n + 1; None takes the request's.

    Returns:
        The request.

    Raises:
        RequestError: a setting outside its range.
    """
    return replace(
        request,
        num_inference_steps=num_steps,
        schedule="reference",
        guidance_scale=1.0,
        audio_guidance_scale=1.0,
        chunk_frames=num_frames or request.chunk_frames,
        num_motion_frames=1,
    )


def read_sizes(files: ModelFiles) -> Sizes:
    """Read the sizes of networks off their files.

    Args:
        files: of the networks.

    Returns:
        Their sizes.

    Raises:
        CheckpointError: a file that is damaged or of another kind.
    """
    model, projection = load_dit(files.dit, files.adapter)
    assert projection is not None  # an adapter was given
    return Sizes(
        transformer=model.config,
        projection=projection.config,
        vae_width=load_vae(files.vae).dim,
    )


def count_tokens(request: TalkRequest) -> int:
    """Count the video tokens that the transformer attends to at once."""
    return count_latent_frames(request.chunk_frames) * (
        (request.height // SPATIAL_STRIDE // PATCH) * (request.width // SPATIAL_STRIDE // PATCH)
    )


def count_need(sizes: Sizes, request: TalkRequest, dtype: torch.dtype) -> Need:
    """Count the memory of one chunk without taking it.

    Weights are exact. What the parts take on top is counted by running the very networks on shapes
    alone, so it is exact too but for what kernels take for themselves.

    Args:
        sizes: of the networks.
        request: gives height, width and chunk_frames.
        dtype: of the weights of transformer and adapter; the VAE is in float32.

    Returns:
        Bytes by part.
    """
    # Blocks are alike and run one after the other: one tells the weights and the memory of all.
    config = replace(sizes.transformer, num_layers=1)
    with torch.device("meta"):
        model, vae = WanModel(config).to(dtype), WanVAE(sizes.vae_width)
        projection = AudioProjection(sizes.projection).to(dtype)
        rest, block = _count_weights(model), _count_weights(model.blocks)
        audio = sum(
            parameter.nbytes
            for name, parameter in model.named_parameters()
            if ".audio_cross_attn." in name or ".norm_x." in name
        )
        inputs = _Inputs(sizes, request)
        return Need(
            transformer=rest - block + sizes.transformer.num_layers * (block - audio),
            audio=sizes.transformer.num_layers * audio + _count_weights(projection),
            vae=_count_weights(vae),
            encode=count_memory(
                vae, lambda: vae.encode_reference(inputs.picture(), request.chunk_frames)
            ),
            forward=count_memory(model, lambda: inputs.call(model)),
            decode=count_memory(vae, lambda: vae.decode(inputs.latents())),
        )


def build_random_models(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Models:
    """Build networks with random weights on their device.

    Args:
        sizes: of the networks.
        dtype: of transformer and adapter; the VAE is in float32.
        device: where they run, and where the weights are drawn.

    Returns:
        The networks; the same sizes, dtype and device give the same weights.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model, projection = WanModel(sizes.transformer), AudioProjection(sizes.projection)
    for module in (model, projection):
        module.to(dtype).to_empty(device=device)
    with torch.random.fork_rng(devices=[]):  # it draws while it is built, and is drawn again
        vae = WanVAE(sizes.vae_width).to(device)
    for module in (model, projection, vae):
        _draw(module.requires_grad_(False).eval(), generator)
    return Models(codec=vae, denoiser=WanDenoiser(model), adapter=ProjectionAdapter(projection))


def run_chunks(
    models: Models, sizes: Sizes, request: TalkRequest, device: torch.device
) -> Measurement:
    """Make a first chunk ``NUM_RUNS`` times with the pipeline itself, from random inputs.

    Args:
        models: the networks; text and image tokens are added here.
        sizes: of the networks.
        request: settings of the chunk.
        device: where the networks are.

    Returns:
        Seconds of each run, and the peak of all.
    """
    generator = torch.Generator().manual_seed(0)
    config = sizes.transformer
    text_BND = torch.randn(1, TEXT_LENGTH, config.text_dim, generator=generator)
    image_BND = None
    if config.image_dim is not None:
        image_BND = torch.randn(1, IMAGE_TOKENS, config.image_dim, generator=generator).to(device)
    clocks = {name: _Clock(device) for name in ("forward", "encode", "decode", "chunk")}
    timed = replace(
        models,
        codec=_TimedCodec(models.codec, clocks["encode"], clocks["decode"]),
        denoiser=clocks["forward"].wrap(models.denoiser),
        text_BND=text_BND.to(device),
        image_embeds_BND=image_BND,
    )
    reference_BCHW = torch.rand(1, 3, request.height, request.width, generator=generator) * 2 - 1
    speech = _make_speech(sizes, request, generator)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    runs = []
    for _ in range(NUM_RUNS):
        for clock in clocks.values():
            clock.reset()
        clocks["chunk"].wrap(lambda: list(generate(request, reference_BCHW, speech, timed)))()
        runs.append(
            Timing(
                forward=clocks["forward"].seconds / clocks["forward"].num_calls,
                encode=clocks["encode"].seconds,
                decode=clocks["decode"].seconds,
                chunk=clocks["chunk"].seconds,
            )
        )
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Measurement(runs=tuple(runs), peak=peak)


def find_obstacle(need: Need, device: torch.device) -> str | None:
    """Say why a chunk cannot be run on a device.

    Args:
        need: of the chunk.
        device: where it would run.

    Returns:
        The reason, or None where nothing is in the way.
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


class _Clock:
    """Adds up the seconds of calls, each until the device has done its work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        self.seconds, self.num_calls = 0.0, 0

    def wrap(self, call: Callable[..., Result]) -> Callable[..., Result]:
        def timed(*arguments: Any) -> Result:  # noqa: ANN401
            self._wait()
            started = time.perf_counter()
            result = call(*arguments)
            self._wait()
            self.seconds += time.perf_counter() - started
            self.num_calls += 1
            return result

        return timed

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _TimedCodec:
    """A codec under two clocks; satisfies ``ports.VideoCodec``."""

    def __init__(self, codec: VideoCodec, encode: _Clock, decode: _Clock) -> None:
        self.encode = encode.wrap(codec.encode)
        self.encode_reference = encode.wrap(codec.encode_reference)
        self.decode = decode.wrap(codec.decode)


class _Inputs:
    """What the networks get for one chunk, as shapes on the default device."""

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


def _make_speech(sizes: Sizes, request: TalkRequest, generator: torch.Generator) -> Speech:
    """Draw what an audio encoder might have heard, exactly one chunk of it."""
    num_frames = request.chunk_frames
    width = sizes.projection.frame_width
    return Speech(
        features=AudioFeatures(
            features_TLD=torch.randn(num_frames, 1, width, generator=generator),
            num_frames=num_frames,
        ),
        waveform=Waveform(
            samples_CS=torch.zeros(1, count_samples(num_frames, SAMPLE_RATE)),
            sample_rate=SAMPLE_RATE,
        ),
    )


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
