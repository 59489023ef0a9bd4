"""Speed of a video: seconds of each chunk by part, and in bare calls of the network.

Works with any networks, as speed does not depend on the values of the weights. Separate from
``report``, which counts memory without running anything.

Axes: B batch, C channels, T video frames, F latent frames, H height, W width, N tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..audio.windows import take_windows
from ..geometry import LATENT_CHANNELS, MASK_CHANNELS, SPATIAL_STRIDE, count_latent_frames
from ..pipeline import Models, plan_video
from ..render import render_video
from ..request import TalkRequest
from ..types import Conditioning, Conversation
from ..video.mux import assemble

NUM_BARE = 5  # bare calls, of which the median counts; one before them pays for what is set up once

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTiming:
    """Seconds of one chunk by part, and counts of the work in them.

    Attributes:
        encode: the VAE's encoder: motion frames, and the reference image where it is new.
        adapter: from audio windows to tokens.
        forward: all calls of the network.
        decode: the VAE's decoder.
        rest: all other work between the last chunk and this one: noise, update rule, pixels.
        write: time that the caller waited until the files accepted the chunk.
        num_encoded: frames that the VAE encoded.
        num_calls: calls of the network.
    """

    encode: float
    adapter: float
    forward: float
    decode: float
    rest: float
    write: float
    num_encoded: int
    num_calls: int

    @property
    def chunk(self) -> float:
        """Seconds of all parts."""
        return self.encode + self.adapter + self.forward + self.decode + self.rest + self.write


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoTiming:
    """Seconds of one video, from a picture and audio features to a finished file.

    Attributes:
        chunks: in order, at least two.
        seconds: from the first call to the finished file.
        num_frames: frames of the video.
    """

    chunks: tuple[ChunkTiming, ...]
    seconds: float
    num_frames: int

    @property
    def steady(self) -> ChunkTiming:
        """Median of all chunks but the first, of each part by itself."""
        later = self.chunks[1:]
        medians = {
            f.name: median(getattr(chunk, f.name) for chunk in later) for f in fields(later[0])
        }
        return ChunkTiming(**medians)

    @property
    def throughput(self) -> float:
        """Frames of the video per second of work."""
        return self.num_frames / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Speed at one number of steps per chunk.

    Attributes:
        num_steps: calls of the network per chunk.
        bare: seconds of one call of the network alone.
        video: seconds of a video, made as the command line makes it.
    """

    num_steps: int
    bare: float
    video: VideoTiming

    @property
    def ratio(self) -> float:
        """Duration of a steady chunk in bare calls of the network; comparable between devices."""
        return self.video.steady.chunk / self.bare


def time_call(
    models: Models, request: TalkRequest, conversation: Conversation, device: torch.device
) -> float:
    """Time a bare call of the network, without the pipeline and without other work beside it.

    Args:
        models: networks and their conditions.
        request: gives the size and frames of a chunk.
        conversation: of one speaker, at least a chunk of it.
        device: device of the networks.

    Returns:
        Seconds; the median of ``NUM_BARE`` calls.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = request.height // SPATIAL_STRIDE, request.width // SPATIAL_STRIDE
    shape = count_latent_frames(request.chunk_frames), height, width
    latents_BCFHW = torch.randn(1, LATENT_CHANNELS, *shape, generator=generator)
    conditioning = Conditioning(
        reference_BCFHW=torch.randn(
            1, MASK_CHANNELS + LATENT_CHANNELS, *shape, generator=generator
        ),
        image_embeds_BND=models.image_embeds_BND,
        text_BND=models.text_BND,
    )
    first = plan_video(request, conversation.speeches).chunks[0]
    with torch.no_grad():
        tokens = models.adapter(take_windows(conversation.speeches[0].features, first))
        seconds = []
        for _ in range(1 + NUM_BARE):
            clock = _Clock(device)
            clock.wrap(models.denoiser)(latents_BCFHW, 1.0, conditioning, tokens)
            seconds.append(clock.seconds)
    return median(seconds[1:])


def time_video(
    models: Models,
    request: TalkRequest,
    conversation: Conversation,
    picture_HWC: Tensor,
    device: torch.device,
) -> VideoTiming:
    """Make a video as the command line does, and delete it.

    Args:
        models: networks and their conditions.
        request: settings that give two chunks or more.
        conversation: of one speaker.
        picture_HWC: portrait at the request's size, in [0, 1].
        device: device of the networks.

    Returns:
        Its seconds. Take and video are written while the next chunk is made.
    """

    def make(timer: ChunkTimer, folder: Path) -> int:
        def finish(frames: Iterable[Tensor]) -> Iterator[Tensor]:
            for frames_THWC in frames:
                timer.finish_chunk()
                yield frames_THWC

        with render_video(
            request, [picture_HWC], conversation, timer.models, folder / "take"
        ) as run:
            frames = finish(run.generate(timer))
            return assemble(folder / "video.mp4", frames, conversation.waveform)

    return time_chunks(make, models, device)


def time_chunks(
    make: Callable[[ChunkTimer, Path], int], models: Models, device: torch.device
) -> VideoTiming:
    """Time any way to make a video in chunks.

    Args:
        make: makes a video in a folder with the models of a timer, on which it calls
            ``finish_chunk`` once per chunk; returns the number of frames.
        models: networks and their conditions.
        device: device of the networks.

    Returns:
        Seconds of the video, which is deleted.
    """
    with TemporaryDirectory() as folder:
        timer = ChunkTimer(models, device)
        started = time.perf_counter()
        num_frames = make(timer, Path(folder))
        seconds = time.perf_counter() - started
    return VideoTiming(chunks=tuple(timer.chunks), seconds=seconds, num_frames=num_frames)


class _Clock:
    """Sum of the seconds of calls, each until the device has done its work."""

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


class ChunkTimer:
    """Timer of the chunks of one video; satisfies ``protocols.VideoVAE`` and ``Progress``.

    Attributes:
        models: the networks, with a clock around each.
        chunks: seconds of the chunks that are finished.
    """

    def __init__(self, models: Models, device: torch.device) -> None:
        """Wrap the networks and start.

        Args:
            models: networks and their conditions.
            device: device of the networks.
        """
        self._clocks = {name: _Clock(device) for name in ("encode", "adapter", "forward", "decode")}
        self._vae = models.vae
        self._num_encoded = 0
        self._since = self._made = time.perf_counter()
        self.models = replace(
            models,
            vae=self,
            denoiser=self._clocks["forward"].wrap(models.denoiser),
            adapter=self._clocks["adapter"].wrap(models.adapter),
        )
        self.chunks: list[ChunkTiming] = []

    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        """Encode frames; see ``protocols.VideoVAE``."""
        self._num_encoded += frames_BCTHW.shape[2]
        return self._clocks["encode"].wrap(self._vae.encode)(frames_BCTHW)

    def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
        """Encode a picture followed by grey frames; see ``protocols.VideoVAE``."""
        self._num_encoded += num_frames
        return self._clocks["encode"].wrap(self._vae.encode_reference)(picture_BCHW, num_frames)

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Decode latents; see ``protocols.VideoVAE``."""
        return self._clocks["decode"].wrap(self._vae.decode)(latents_BCFHW)

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        """End a chunk where the pipeline reports one, with a preview; see ``Progress``."""
        if preview_HWC is not None:
            self.end_chunk()

    def end_chunk(self) -> None:
        """Record the time when the frames of a chunk exist; writing them begins."""
        self._made = time.perf_counter()

    def finish_chunk(self) -> None:
        """Record the seconds of a chunk that is written now, and start the next."""
        now = self._made
        parts = {name: clock.seconds for name, clock in self._clocks.items()}
        rest = now - self._since - sum(parts.values())
        self.chunks.append(
            ChunkTiming(
                **parts,
                rest=rest,
                write=time.perf_counter() - now,
                num_encoded=self._num_encoded,
                num_calls=self._clocks["forward"].num_calls,
            )
        )
        for clock in self._clocks.values():
            clock.reset()
        self._num_encoded = 0
        self._since = time.perf_counter()
