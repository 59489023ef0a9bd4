"""What the pipeline asks of the outside: the seams where a host or a test plugs in.

Axes as in types.py.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .types import AudioTokens, AudioWindows, Conditioning, SoundMoments


class AudioEncoder(Protocol):
    """Hears a waveform."""

    @property
    def first_kernel(self) -> tuple[int, int] | None:
        """Width and stride, in samples, of the stretches whose moments it normalises by.

        None for an encoder to which a part sounds the same whatever lies around it.
        """
        ...

    def fingerprint(self) -> str:
        """Tell its weights apart from all others, in hexadecimal digits."""
        ...

    def encode(
        self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
    ) -> Tensor:
        """Turn 16 kHz mono samples into one row of hidden states per video frame, [T, L, D].

        Where the samples are a part of a sound, moments are those of all of it.
        """
        ...


class AudioAdapter(Protocol):
    """Turns audio windows into the tokens that the denoiser attends to."""

    def __call__(self, windows: AudioWindows) -> AudioTokens:
        """Make the tokens of one chunk."""
        ...


class ImageEncoder(Protocol):
    """CLIP, for models with an image branch."""

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Turn a picture in [-1, 1] into image tokens, [1, N, D]."""
        ...


class VideoCodec(Protocol):
    """The video VAE."""

    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        """Encode 4n + 1 frames in [-1, 1] to normalised latents [B, 16, n + 1, H/8, W/8]."""
        ...

    def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
        """Encode what ``image.reference_clip`` makes of a picture in [-1, 1]; see ``encode``.

        A method of its own as most of that clip is always the same: a codec may use it. Others
        make the clip and encode it.
        """
        ...

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Decode normalised latents to frames in [-1, 1]."""
        ...


class Denoiser(Protocol):
    """One network call."""

    def __call__(
        self, latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> Tensor:
        """Predict the velocity (noise - data) of noisy latents at noise level sigma in [0, 1]."""
        ...


class Progress(Protocol):
    """Told of finished work, in units announced by ``pipeline.count_work``."""

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        """Count finished units; now and then with a finished picture, [H, W, 3] in [0, 1]."""
        ...


class CheckStop(Protocol):
    """Asked between any two network or codec calls."""

    def __call__(self) -> None:
        """Raise to stop; what is raised passes through the pipeline unchanged."""
        ...
