"""Protocols of the networks and callbacks that the pipeline calls; a host or a test provides them.

Axes as in types.py.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .types import AudioTokens, AudioWindows, Conditioning, SoundMoments


class AudioEncoder(Protocol):
    """Encoder of a waveform to audio features."""

    @property
    def first_kernel(self) -> tuple[int, int] | None:
        """Width and stride, in samples, of the stretches whose mean and covariance normalise it.

        None for an encoder without normalisation over the whole sound, so that the features of a
        section do not depend on the rest.
        """
        ...

    def fingerprint(self) -> str:
        """Return hexadecimal digits that identify the weights."""
        ...

    def encode(
        self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
    ) -> Tensor:
        """Encode 16 kHz mono samples to one row of hidden states per video frame, [T, L, D].

        If the samples are a section of a sound, ``moments`` are those of the whole sound.
        """
        ...


class AudioAdapter(Protocol):
    """Network from audio windows to the audio tokens that the denoiser attends to."""

    def __call__(self, windows: AudioWindows) -> AudioTokens:
        """Compute the audio tokens of one chunk."""
        ...


class ImageEncoder(Protocol):
    """CLIP image encoder, for models with an image branch."""

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Encode a picture in [-1, 1] to image tokens, [1, N, D]."""
        ...


class VideoVAE(Protocol):
    """Video VAE between frames and normalised latents."""

    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        """Encode 4n + 1 frames in [-1, 1] to normalised latents [B, 16, n + 1, H/8, W/8]."""
        ...

    def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
        """Encode the ``reference.reference_clip`` of a picture in [-1, 1]; see ``encode``.

        A separate method because most of that clip is grey and always the same, which an
        implementation may use to save time. Others make the clip and encode it.
        """
        ...

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Decode normalised latents to frames in [-1, 1]."""
        ...


class Denoiser(Protocol):
    """Network that predicts the velocity."""

    def __call__(
        self, latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> Tensor:
        """Predict the velocity (noise - data) of noisy latents at noise level sigma in [0, 1]."""
        ...


class Progress(Protocol):
    """Receiver of progress, in units whose total is ``pipeline.count_work``."""

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        """Count finished units; some calls bring a finished frame, [H, W, 3] in [0, 1]."""
        ...


class CheckStop(Protocol):
    """Function that is called between any two calls of a network and may stop the work."""

    def __call__(self) -> None:
        """Raise an exception to stop; it passes through the pipeline unchanged."""
        ...
