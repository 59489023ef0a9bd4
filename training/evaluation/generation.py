"""Generation of clips with the embedded family, for all evaluations.

Axes: C channels, T video frames, H height, W width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from training.avatars.synthetic import SyntheticClip
from turbotalk_core import loading as library
from turbotalk_core.audio.conversation import encode_speech
from turbotalk_core.checkpoints.audio_encoder import load_audio_encoder
from turbotalk_core.errors import RequestError
from turbotalk_core.pipeline import Models, generate
from turbotalk_core.protocols import AudioEncoder, Denoiser, VideoVAE
from turbotalk_core.request import TalkRequest
from turbotalk_core.types import AudioTokens, Conditioning, FrameChunk, Waveform

SPLIT = "heldout"
DITS = {"teacher": library.TEACHER, "student": library.STUDENT}


def load_family(
    weights: Path, model: str, dit: Path | None = None, adapter: Path | None = None
) -> tuple[TalkRequest, Models, AudioEncoder]:
    """Load an embedded family, or one with another transformer.

    Args:
        weights: models folder.
        model: ``teacher`` or ``student``.
        dit: transformer file to use instead of the model's; requires ``adapter``.
        adapter: adapter file to use instead of the model's; requires ``dit``.

    Returns:
        The settings that ship with the transformer, the networks, and the audio encoder.

    Raises:
        CheckpointError: if a file is missing or damaged.
        MismatchError: if the adapter was made for another transformer.
        RequestError: if only one of ``dit`` and ``adapter`` is set.
    """
    if (dit is None) != (adapter is None):
        raise RequestError(
            f"got the transformer {dit} and the adapter {adapter}; a transformer and its adapter "
            "learn together, so name both or neither"
        )
    if dit is None or adapter is None:
        files = library.find_model_files(weights, dit=DITS[model])
    else:
        files = name_files(weights, dit, adapter)
    models = library.load_models(files, torch.device("cpu"))
    return library.read_request(files.dit), models, load_audio_encoder(files.audio_encoder)


def name_files(weights: Path, dit: Path, adapter: Path) -> library.ModelFiles:
    """Return the files of a family with another transformer.

    Args:
        weights: models folder with the embedded VAE and audio encoder.
        dit: file of the transformer.
        adapter: file of its audio adapter.

    Returns:
        All files.
    """
    return library.ModelFiles(
        dit=dit,
        adapter=adapter,
        audio_encoder=weights / "audio_encoders" / library.AUDIO_ENCODER,
        vae=weights / "vae" / library.VAE,
    )


class RememberingVAE:
    """Video VAE with a cache of encoded frames, because all models use the same reference images.

    Args:
        vae: the VAE that encodes and decodes.

    Attributes:
        num_decoded: chunks decoded so far.
        encode_seconds: time spent on encoding so far, in seconds.
    """

    def __init__(self, vae: VideoVAE) -> None:
        self.num_decoded = 0
        self.encode_seconds = 0.0
        self._vae = vae
        self._latents: dict[bytes, Tensor] = {}

    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        """Encode frames, or return their cached latents; see ``protocols.VideoVAE``."""
        return self._reuse(lambda: self._vae.encode(frames_BCTHW), frames_BCTHW)

    def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
        """Encode a picture followed by grey frames, with the cache; see ``protocols.VideoVAE``."""
        return self._reuse(
            lambda: self._vae.encode_reference(picture_BCHW, num_frames), picture_BCHW, num_frames
        )

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Decode latents, and count the call; see ``protocols.VideoVAE``."""
        self.num_decoded += 1
        return self._vae.decode(latents_BCFHW)

    def _reuse(self, encode: Callable[[], Tensor], inputs: Tensor, num_frames: int = 0) -> Tensor:
        pixels = inputs.contiguous().numpy()
        key = hashlib.sha256(repr((pixels.shape, num_frames)).encode() + pixels.tobytes()).digest()
        if key not in self._latents:
            started = time.perf_counter()
            self._latents[key] = encode()
            self.encode_seconds += time.perf_counter() - started
        return self._latents[key].clone()


@dataclass(slots=True)
class CountingDenoiser:
    """Denoiser that counts its calls; satisfies ``protocols.Denoiser``.

    Attributes:
        denoiser: the denoiser that is called.
        num_calls: calls so far.
    """

    denoiser: Denoiser
    num_calls: int = field(default=0, init=False)

    def __call__(
        self, latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> Tensor:
        """Predict the velocity; see ``protocols.Denoiser``."""
        self.num_calls += 1
        return self.denoiser(latents_BCFHW, sigma, conditioning, tokens)


@torch.no_grad()
def generate_clip(
    clip: SyntheticClip, request: TalkRequest, models: Models, encoder: AudioEncoder
) -> Tensor:
    """Generate a clip from the reference image and the voice of a true clip.

    Args:
        clip: the true clip.
        request: all settings.
        models: the networks.
        encoder: the audio encoder.

    Returns:
        Frames [3, T, H, W], rounded to 8 bits as in a file, in [-1, 1].
    """
    waveform = Waveform(samples_CS=clip.waveform_S.unsqueeze(0), sample_rate=clip.sample_rate)
    speech = encode_speech(waveform, encoder, normalizes_loudness=request.normalizes_loudness)
    reference = clip.frames_CTHW[:, 0].unsqueeze(0)
    return collect_frames(generate(request, [reference], [speech], models))


def collect_frames(chunks: Iterable[FrameChunk]) -> Tensor:
    """Return the frames of all chunks with the rounding of a video file.

    Args:
        chunks: chunks of ``generate``.

    Returns:
        [3, T, H, W], rounded to 8 bits, in [-1, 1].
    """
    frames = torch.cat([chunk.frames_BCTHW for chunk in chunks], 2)[0]
    return ((frames + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
