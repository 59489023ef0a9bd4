"""Model files of the full sizes, which have a header and no weights, and videos made with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.fake_cuda import CUDA, FakeCuda, write_unread
from turbotalk_core.benchmark.report import FULL_REQUEST, FULL_SIZES, Sizes
from turbotalk_core.checkpoints.networks import PROJECTION_PREFIX
from turbotalk_core.loading import ModelFiles, load_models
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.image_encoder import VIT_H, ImageEncoder
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanModel
from turbotalk_core.pipeline import Models
from turbotalk_core.render import render_video
from turbotalk_core.request import TalkRequest
from turbotalk_core.types import (
    AudioFeatures,
    AudioTokens,
    Conditioning,
    Conversation,
    Speaker,
    Speech,
    Waveform,
)

SIZES = {"480p": (480, 832), "720p": (720, 1280)}


def make_sizes(num_layers: int) -> Sizes:
    """Return the sizes of Wan2.1-I2V-14B with InfiniteTalk, with this number of blocks."""
    return replace(FULL_SIZES, transformer=replace(FULL_SIZES.transformer, num_layers=num_layers))


def make_request(**changes: Any) -> TalkRequest:
    """Return the request of ``bench --model 14b``, with changes."""
    return replace(FULL_REQUEST, **changes)


def make_small_request(**changes: Any) -> TalkRequest:
    """Return a request for chunks of few frames and pixels."""
    fields: dict[str, Any] = {
        "height": 64,
        "width": 96,
        "chunk_frames": 9,
        "num_motion_frames": 5,
    }
    return make_request(**(fields | changes))


def write_files(folder: Path, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> ModelFiles:
    """Write the files of a family without weights, CLIP included; the audio encoder is missing."""
    with torch.device("meta"):
        model, vae = WanModel(sizes.transformer), WanVAE(sizes.vae_width)
        projection = AudioProjection(sizes.projection)
        clip = ImageEncoder(**VIT_H | {"num_layers": 32})  # the last one is not used
    weights = model.to(dtype).state_dict()
    audio = {key: weights.pop(key) for key in list(weights) if ".audio_" in key or "norm_x" in key}
    audio |= {PROJECTION_PREFIX + key: w for key, w in projection.to(dtype).state_dict().items()}
    visual = {f"visual.{key}": weight for key, weight in clip.half().state_dict().items()}
    return ModelFiles(
        dit=write_unread(folder / "dit.safetensors", weights),
        adapter=write_unread(folder / "adapter.safetensors", audio),
        audio_encoder=folder / "none",
        vae=write_unread(folder / "vae.safetensors", vae.state_dict()),
        image_encoder=write_unread(folder / "clip.safetensors", visual),
    )


def make_conversation(request: TalkRequest, num_chunks: int, num_speakers: int) -> Conversation:
    """Return silent voices of the length of some chunks; two share the picture."""
    new_frames = request.chunk_frames - request.num_motion_frames
    num_frames = request.chunk_frames + (num_chunks - 1) * new_frames
    width = FULL_SIZES.projection.frame_width
    waveform = Waveform(samples_CS=torch.zeros(1, 640 * num_frames), sample_rate=16_000)
    features = AudioFeatures(features_TLD=torch.zeros(num_frames, 1, width), num_frames=num_frames)
    half = request.width // 2
    speakers = [
        Speaker(
            name=f"speaker {number}",
            waveform=waveform,
            region=None if num_speakers == 1 else (number * half, 0, half, request.height),
        )
        for number in range(num_speakers)
    ]
    return Conversation(
        speakers=tuple(speakers),
        speeches=(Speech(features=features, waveform=waveform),) * num_speakers,
        waveform=waveform,
    )


@dataclass(slots=True)
class Part:
    """What the calls of one part of the pipeline took.

    Attributes:
        num_calls: number of calls.
        peak: largest peak of memory on the device, bytes, with all that exists then.
        syncs: synchronisations inside of the calls, by place.
    """

    num_calls: int = 0
    peak: int = 0
    syncs: Counter[str] = field(default_factory=Counter)


class Meter:
    """Memory and synchronisations of the pipeline, by part; its models measure as they compute.

    Attributes:
        parts: encode, forward, adapter, image and decode; "rest" has no peak.
        models: the networks with a measurement around each.
        noises: latents that the denoiser got, in order.
        results: devices and dtypes of the results of each part.
    """

    def __init__(self, cuda: FakeCuda, models: Models) -> None:
        self._cuda = cuda
        self.parts: dict[str, Part] = {}
        self.noises: list[Tensor] = []
        self.results: dict[str, set[str]] = {}
        vae, encoder = models.vae, models.image_encoder
        denoise = self._measure("forward", models.denoiser)

        def keep(
            latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
        ) -> Tensor:
            self.noises.append(latents_BCFHW)
            return denoise(latents_BCFHW, sigma, conditioning, tokens)

        class Vae:
            encode = staticmethod(self._measure("encode", vae.encode))
            encode_reference = staticmethod(self._measure("encode", vae.encode_reference))
            decode = staticmethod(self._measure("decode", vae.decode))

        self.models = replace(
            models,
            vae=Vae(),
            denoiser=keep,
            adapter=self._measure("adapter", models.adapter),
            image_encoder=None if encoder is None else self._measure("image", encoder),
        )

    def _measure(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            cuda, part = self._cuda, self.parts.setdefault(name, Part())
            self.flush()
            cuda.reset_peak()
            result = call(*arguments)
            part.num_calls += 1
            part.peak = max(part.peak, cuda.peak)
            part.syncs += cuda.places()
            cuda.syncs.clear()
            tensor = result if isinstance(result, Tensor) else result.tokens_FND
            self.results.setdefault(name, set()).add(f"{tensor.device.type} {tensor.dtype}")
            return result

        return measured

    def flush(self) -> None:
        """Count what happened since the last call, between the parts."""
        self.parts.setdefault("rest", Part()).syncs += self._cuda.places()
        self._cuda.syncs.clear()

    @property
    def peak(self) -> int:
        """Peak of all parts, bytes."""
        return max(part.peak for part in self.parts.values())


def render(
    meter: Meter,
    request: TalkRequest,
    folder: Path,
    *,
    num_chunks: int = 1,
    num_speakers: int = 1,
    film: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Make a video as the command line does, from a grey portrait or a film; return its chunks."""
    conversation = make_conversation(request, num_chunks, num_speakers)
    portrait = torch.full((request.height, request.width, 3), 0.5)
    meter.flush()
    meter.parts.clear()
    with render_video(request, film or [portrait], conversation, meter.models, folder) as run:
        chunks = list(run.generate())
    meter.flush()
    assert len(chunks) == num_chunks
    for chunk in chunks:
        assert chunk.shape[1:] == (request.height, request.width, 3)
        assert chunk.dtype == torch.uint8
    return chunks


def load(
    folder: Path, num_layers: int, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> tuple[FakeCuda, Models]:
    """Load a family of the full sizes to a fake device, which exists inside ``with`` alone.

    Args:
        folder: folder for the files.
        num_layers: blocks of the transformer.
        dtype: dtype of transformer and adapter on the device.
        **changes: other model files.

    Returns:
        The device and the networks.
    """
    files = replace(write_files(folder / "models", make_sizes(num_layers)), **changes)
    cuda = FakeCuda()
    with cuda, cuda.unread():
        models = load_models(files, CUDA, dtype=dtype)
    cuda.syncs.clear()
    return cuda, models
