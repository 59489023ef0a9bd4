"""The Wan 2.1 video VAE: causal in time, streaming in any split, keys as in the public file.

It encodes frames in [-1, 1] to normalised latents and decodes them back. As every layer depends on
the present and the past alone, a clip can be processed piece by piece: several calls with one
stream return the same frames as one call for the whole clip with a fresh stream.

Axes: B batch, T video frames, F latent frames, C channels, H height, W width.
Source of the architecture: Wan 2.1, wan/modules/vae.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import GeometryError, MismatchError
from ..geometry import LATENT_CHANNELS, SPATIAL_STRIDE, count_latent_frames
from .low_memory import call_with_low_memory
from .vae_layers import (
    CausalConv3d,
    Decoder,
    Downsample,
    Encoder,
    ResidualBlock,
    Stream,
    Upsample,
    time_first,
)

# Wan 2.1, wan/modules/vae.py: per channel, mean and standard deviation of the raw latents. The DiT
# works on latents normalised by them.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

ENCODED_FRAMES = 2  # per call, after the first frame: more take more memory and gain no speed
DECODED_LATENTS = 1  # latent frames per call, for the same reason
NAME = "the video VAE"


class WanVAE(nn.Module):
    """Video VAE between frames and the DiT's normalised latents; satisfies ``protocols.VideoVAE``.

    Args:
        dim: channels at full resolution; 96 in the public file.

    Attributes:
        dim: channels at full resolution.
        saves_memory: whether it processes one frame at a time, with less memory, in more time, and
            with the same result up to rounding.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.saves_memory = False
        self.encoder = Encoder(dim)
        self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, (1, 1, 1))
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, (1, 1, 1))
        self.decoder = Decoder(dim)
        self.latent_mean_C: Tensor
        self.latent_std_C: Tensor
        self.register_buffer("latent_mean_C", torch.tensor(LATENT_MEAN), persistent=False)
        self.register_buffer("latent_std_C", torch.tensor(LATENT_STD), persistent=False)

    def initialize(self) -> None:
        """Initialise the weights for training from scratch, from torch's global generator.

        Convolutions are orthogonal, residual branches start with small output, and latents start
        widely spread with little posterior noise. Without these the loss stays for hundreds of
        updates at the value of a uniform picture. Time starts without mixing: convolutions use the
        present frame alone, temporal downsampling averages two frames and temporal upsampling
        repeats one. So weights trained on single frames also work on clips; random time taps would
        mix frames, and colours would be lost.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.orthogonal_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
                    with torch.no_grad():
                        module.weight[:, :, :-1] = 0
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, ResidualBlock):
                    last = module.residual[-1]
                    assert isinstance(last, CausalConv3d)
                    last.weight *= 0.1
                if isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                    weight = module.time_conv.weight
                    same = torch.eye(weight.shape[1])
                    weight.zero_()
                    if isinstance(module, Downsample):
                        weight[:, :, 1, 0, 0] = weight[:, :, 2, 0, 0] = same / 2
                    else:
                        weight[:, :, 2, 0, 0] = same.repeat(2, 1)
            assert self.conv1.bias is not None
            self.conv1.weight[:LATENT_CHANNELS] *= 2
            self.conv1.weight[LATENT_CHANNELS:] *= 0.1
            self.conv1.bias[:LATENT_CHANNELS] = self.latent_mean_C
            self.conv1.bias[LATENT_CHANNELS:] = -6.0

    def posterior(
        self, frames_BCTHW: Tensor, stream: Stream | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode frames to the posterior distribution of their latents.

        Args:
            frames_BCTHW: frames in [-1, 1].
            stream: state of the clip so far, updated; None if these frames begin a clip.

        Returns:
            Mean and log-variance, unnormalised, [B, 16, F, H/8, W/8]; F counts the latent frames
            completed by these frames.
        """
        stream = {} if stream is None else stream
        return self._read(self.encoder(time_first(frames_BCTHW), stream))

    def reconstruct(self, raw_BCFHW: Tensor, stream: Stream | None = None) -> Tensor:
        """Decode unnormalised latents to unclamped frames.

        Args:
            raw_BCFHW: unnormalised latents.
            stream: state of the clip so far, updated; None if these latents begin a clip.

        Returns:
            Frames, [B, 3, T, H, W]; T is 4F, or 4F - 3 at the start of a clip.
        """
        stream = {} if stream is None else stream
        hidden = self.conv2(time_first(raw_BCFHW), stream)
        return self.decoder(hidden, stream, saves_memory=self.saves_memory).permute(1, 2, 0, 3, 4)

    def encode_stream(self, frames_BCTHW: Tensor, stream: Stream) -> Tensor:
        """Encode the next frames of a clip, any number of them.

        Args:
            frames_BCTHW: frames in [-1, 1].
            stream: state of the clip, empty before its first frame; updated.

        Returns:
            Normalised latent frames completed by these frames, possibly none.
        """
        mean, _ = self.posterior(frames_BCTHW, stream)
        return self._normalize(mean)

    def decode_stream(self, latents_BCFHW: Tensor, stream: Stream) -> Tensor:
        """Decode the next normalised latent frames of a clip, any number of them.

        Args:
            latents_BCFHW: normalised latents, at least one frame.
            stream: state of the clip, empty before its first latent; updated.

        Returns:
            Decoded frames, clamped to [-1, 1].
        """
        raw = latents_BCFHW * self._column(self.latent_std_C) + self._column(self.latent_mean_C)
        return self.reconstruct(raw.to(self._placement), stream).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        """Encode a whole clip.

        Args:
            frames_BCTHW: [B, 3, 4n + 1, H, W] in [-1, 1], sides multiples of 8.

        Returns:
            Normalised latents [B, 16, n + 1, H/8, W/8] in the weights' dtype.

        Raises:
            GeometryError: if the frame count is not 4n + 1 or a side is no multiple of 8.
            MismatchError: if there are not three channels.
        """
        self._check(frames_BCTHW, frames_BCTHW.shape[2])

        def call() -> Tensor:
            stream: Stream = {}
            stops = range(1, frames_BCTHW.shape[2], 1 if self.saves_memory else ENCODED_FRAMES)
            # One copy of a whole clip, which waits for the device.
            pieces = frames_BCTHW.to(self._placement).tensor_split(tuple(stops), 2)
            return torch.cat([self.encode_stream(piece, stream) for piece in pieces], 2)

        return call_with_low_memory(self, call, NAME)

    @torch.no_grad()
    def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
        """Encode a clip of a picture followed by grey, bit for bit as ``encode``, but faster.

        The grey frames are all equal, so the output of each encoder stage begins to repeat after
        some frames, and the stage is not called again. For 81 frames this saves about seven tenths
        of the work.

        Args:
            picture_BCHW: [B, 3, H, W] in [-1, 1], sides multiples of 8.
            num_frames: length of the clip, 4n + 1.

        Returns:
            Normalised latents [B, 16, n + 1, H/8, W/8] in the weights' dtype.

        Raises:
            GeometryError: if the frame count is not 4n + 1 or a side is no multiple of 8.
            MismatchError: if there are not three channels.
        """
        picture_BCTHW = picture_BCHW.unsqueeze(2).to(self._placement)  # waits for the device
        self._check(picture_BCTHW, num_frames)

        def call() -> Tensor:
            grey_BCTHW = torch.zeros_like(picture_BCTHW)
            if self.saves_memory:  # frame by frame, later stages get no repeating pairs to reuse
                clip = (picture_BCTHW, grey_BCTHW.expand(-1, -1, num_frames - 1, -1, -1))
                return self.encode(torch.cat(clip, 2))
            pieces = self.encoder.iter_held(
                time_first(picture_BCTHW),
                time_first(grey_BCTHW.expand(-1, -1, ENCODED_FRAMES, -1, -1)),
                (num_frames - 1) // ENCODED_FRAMES,
            )
            return torch.cat([self._normalize(self._read(piece)[0]) for piece in pieces], 2)

        return call_with_low_memory(self, call, NAME)

    @torch.no_grad()  # on a generator: in force only while this code runs, not in the caller's loop
    def iter_decode(self, latents_BCFHW: Tensor) -> Iterator[Tensor]:
        """Decode a whole clip piece by piece, in memory that does not grow with its length.

        Args:
            latents_BCFHW: normalised latents of a whole clip.

        Yields:
            Frames [B, 3, t, H, W] in [-1, 1], in order; 4F - 3 in all.
        """
        stream: Stream = {}
        # One copy of a whole clip, which waits for the device.
        for piece in latents_BCFHW.to(self._placement.device).split(DECODED_LATENTS, 2):
            yield self.decode_stream(piece, stream)

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Decode the normalised latents of a whole clip to frames [B, 3, 4F - 3, H, W]."""
        return call_with_low_memory(
            self, lambda: torch.cat(list(self.iter_decode(latents_BCFHW)), 2), NAME
        )

    @staticmethod
    def _check(frames_BCTHW: Tensor, num_frames: int) -> None:
        _, channels, _, height, width = frames_BCTHW.shape
        if channels != 3:
            raise MismatchError(f"the codec takes 3 colour channels, got {channels}")
        if height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise GeometryError(
                f"got {width}x{height} frames; both sides must be multiples of {SPATIAL_STRIDE}"
            )
        count_latent_frames(num_frames)

    def _read(self, encoded_TBCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Compute mean and log-variance, [B, 16, F, H/8, W/8], from the output of the encoder."""
        mean, log_variance = self.conv1(encoded_TBCHW, {}).permute(1, 2, 0, 3, 4).chunk(2, 1)
        return mean, log_variance

    def _normalize(self, raw_BCFHW: Tensor) -> Tensor:
        return (raw_BCFHW - self._column(self.latent_mean_C)) / self._column(self.latent_std_C)

    @property
    def _placement(self) -> Tensor:
        return self.conv1.weight

    @staticmethod
    def _column(statistics_C: Tensor) -> Tensor:
        return statistics_C.view(-1, 1, 1, 1)
