"""How fast chunks follow each other: by part, in bare calls of the network, and beside another way.

Goes in: networks, whatever their weights. Comes out: seconds by part, and counts of what was done
in them. Separate from what a chunk needs of memory, which is counted without running anything.

Axes: B batch, C channels, T video frames, F latent frames, H height, W width, N tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..audio.windows import take_windows
from ..conditioning.reference import prepare_reference, reference_clip
from ..geometry import LATENT_CHANNELS, MASK_CHANNELS, SPATIAL_STRIDE, count_latent_frames
from ..pipeline import Models, generate, plan_video
from ..protocols import VideoVAE
from ..render import render_video
from ..request import TalkRequest
from ..types import Conditioning, Conversation
from ..video.mux import assemble, quantize_frames

NUM_BARE = 5  # bare calls, of which the median counts; one before them pays for what is set up once
_BATCH = 16  # frames that are encoded at a time, as a take reads them

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTiming:
    """Seconds of one chunk by part, and what was done in them.

    Attributes:
        encode: the VAE's encoder: motion frames, and the reference where it is shown anew.
        adapter: from audio windows to tokens.
        forward: all calls of the network.
        decode: the VAE's decoder.
        rest: what else lies between the last chunk and this one: noise, update rule, pixels.
        write: that the caller waited until the files took the chunk.
        num_encoded: frames that the VAE encoded.
        num_calls: of the network.
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
        """Seconds of all."""
        return self.encode + self.adapter + self.forward + self.decode + self.rest + self.write


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way from a picture and a voice to a finished file.

    Attributes:
        chunks: in order, at least two.
        seconds: from the first call to the finished file.
        num_frames: of the video.
    """

    chunks: tuple[ChunkTiming, ...]
    seconds: float
    num_frames: int

    @property
    def steady(self) -> ChunkTiming:
        """The median of all chunks but the first, each part by itself."""
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
    """What some steps per chunk take.

    Attributes:
        num_steps: calls of the network per chunk.
        bare: seconds of one call of the network and nothing else.
        ours: through the pipeline into a take and a video, as the command line does it.
        reference: the same networks, called as the reference calls them.
    """

    num_steps: int
    bare: float
    ours: Way
    reference: Way

    @property
    def ratio(self) -> float:
        """A steady chunk in bare calls of the network; it travels between devices."""
        return self.ours.steady.chunk / self.bare

    @property
    def gain(self) -> float:
        """Our throughput in the reference way's."""
        return self.ours.throughput / self.reference.throughput


def time_call(
    models: Models, request: TalkRequest, conversation: Conversation, device: torch.device
) -> float:
    """Time a bare call of the network: no pipeline around it, nothing beside it.

    Args:
        models: the networks, and what they were told.
        request: gives the size and frames of a chunk.
        conversation: of one speaker, at least a chunk of it.
        device: where the networks are.

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


def time_ours(
    models: Models,
    request: TalkRequest,
    conversation: Conversation,
    picture_HWC: Tensor,
    device: torch.device,
) -> Way:
    """Make a video as the command line does, and drop it.

    Args:
        models: the networks, and what they were told.
        request: settings; two chunks or more must come of it.
        conversation: of one speaker.
        picture_HWC: the portrait at the request's size, in [0, 1].
        device: where the networks are.

    Returns:
        What it took. Take and video are written while the next chunk is made.
    """

    def make(watch: _Watch, folder: Path) -> int:
        def finish(frames: Iterable[Tensor]) -> Iterator[Tensor]:
            for frames_THWC in frames:
                watch.finish_chunk()
                yield frames_THWC

        with render_video(
            request, [picture_HWC], conversation, watch.models, folder / "take"
        ) as run:
            frames = finish(run.generate(watch))
            return assemble(folder / "video.mp4", frames, conversation.waveform)

    return _time(make, models, device)


def time_reference(
    models: Models,
    request: TalkRequest,
    conversation: Conversation,
    picture_HWC: Tensor,
    device: torch.device,
) -> Way:
    """Make the same video with the same networks in the order of the reference, and drop it.

    Args:
        models: as for ``time_ours``, with all others.
        request: see there.
        conversation: see there.
        picture_HWC: see there.
        device: see there.

    Returns:
        What it took. The picture and the grey behind it are encoded for each chunk, all of it; all
        frames are kept in float32, and encoded after the last chunk.

    Source: the loop of the reference's ``wan/multitalk.py``, generate_infinitetalk. That writes the
    file twice, and asks CLIP for each chunk; here neither is done.
    """

    def make(watch: _Watch, folder: Path) -> int:
        kept: list[Tensor] = []
        plain = replace(watch.models, vae=_PlainVAE(watch.models.vae))
        picture_BCHW = prepare_reference(picture_HWC, request.height, request.width)
        pictures = _Always(picture_BCHW, plan_video(request, conversation.speeches).num_frames)
        for made in generate(request, pictures, conversation.speeches, plain):
            watch.end_chunk()
            kept.append(made.frames_BCTHW)
            watch.finish_chunk()
        frames_THWC = quantize_frames(torch.cat(kept, 2))
        return assemble(folder / "video.mp4", frames_THWC.split(_BATCH), conversation.waveform)

    return _time(make, models, device)


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


class _Watch:
    """Networks under clocks; cuts the time at each chunk."""

    def __init__(self, models: Models, device: torch.device) -> None:
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
        self._num_encoded += frames_BCTHW.shape[2]
        return self._clocks["encode"].wrap(self._vae.encode)(frames_BCTHW)

    def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
        self._num_encoded += num_frames
        return self._clocks["encode"].wrap(self._vae.encode_reference)(picture_BCHW, num_frames)

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        return self._clocks["decode"].wrap(self._vae.decode)(latents_BCFHW)

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        """Notice the end of a chunk, which the pipeline reports with a preview."""
        if preview_HWC is not None:
            self.end_chunk()

    def end_chunk(self) -> None:
        """Note the time when a chunk's frames exist; after it they are written."""
        self._made = time.perf_counter()

    def finish_chunk(self) -> None:
        """Record the seconds of a chunk that is written now."""
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


def _time(make: Callable[[_Watch, Path], int], models: Models, device: torch.device) -> Way:
    with TemporaryDirectory() as folder:
        watch = _Watch(models, device)
        started = time.perf_counter()
        num_frames = make(watch, Path(folder))
        seconds = time.perf_counter() - started
    return Way(chunks=tuple(watch.chunks), seconds=seconds, num_frames=num_frames)


class _PlainVAE:
    """A codec without what is known of the grey behind a reference; ``protocols.VideoVAE``."""

    def __init__(self, vae: VideoVAE) -> None:
        self.encode, self.decode = vae.encode, vae.decode

    def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
        return self.encode(reference_clip(picture_BCHW, num_frames))


class _Always(Sequence[Tensor]):
    """A picture as the frames of a video to dub: of those each chunk encodes its own."""

    def __init__(self, picture_BCHW: Tensor, length: int) -> None:
        self._picture_BCHW, self._length = picture_BCHW, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 (slices are not asked for)
        return self._picture_BCHW
