"""The Wan 2.1 video VAE: causal in time, streaming in any split, keys as in the public file.

Frames in [-1, 1] go in, normalised latents come out, and back. Inside, a clip is laid out
[B, T, C, H, W] and every 3-D convolution is computed as one 2-D convolution over the stacked time
taps: the same sums, and CPUs have far faster kernels for it at small widths.

A stage keeps what it needs of earlier frames in a ``Stream``. One call with a fresh stream is the
whole-clip result; several calls with the same stream give the same frames piece by piece.

Axes: B batch, T video frames, F latent frames, C channels, H height, W width.
Source of the architecture: Wan 2.1, wan/modules/vae.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GeometryError, MismatchError
from ..geometry import LATENT_CHANNELS, SPATIAL_STRIDE, count_latent_frames
from .frugal import call_frugally

# Wan 2.1, wan/modules/vae.py: statistics that the DiT's latents are normalised with.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

Stream = dict[nn.Module, Tensor]
"""What each stage remembers of the frames before; empty at the start of a clip."""


class CausalConv3d(nn.Conv3d):
    """A convolution over time and space that sees only the present and the past.

    Before the first frame it sees zeros. Kernels are 1 or 3 in time, odd in space, stride 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (a stream goes along)
        self, frames_BTCHW: Tensor, stream: Stream
    ) -> Tensor:
        """Convolve the next frames of a clip, [B, T, C, H, W], remembering the last two."""
        taps, height, _ = self.kernel_size
        weight = self.weight
        if taps > 1:
            past = stream.get(self)
            is_lone = past is None and frames_BTCHW.shape[1] == 1
            if past is None:
                past = frames_BTCHW.new_zeros(
                    frames_BTCHW.shape[0], taps - 1, *frames_BTCHW.shape[2:]
                )
            extended = torch.cat((past, frames_BTCHW), 1)
            stream[self] = extended[:, 1 - taps :]
            if is_lone:  # a clip's first frame alone: the other taps would only see zeros
                weight = weight[:, :, -1:]
            else:
                length = frames_BTCHW.shape[1]
                frames_BTCHW = torch.cat([extended[:, t : t + length] for t in range(taps)], 2)
        weight = weight.transpose(1, 2).flatten(1, 2)  # [out, taps * in, h, w]
        output = F.conv2d(frames_BTCHW.flatten(0, 1), weight, self.bias, padding=height // 2)
        return output.unflatten(0, frames_BTCHW.shape[:2])


class RMSNorm(nn.Module):
    """Scale each pixel's channel vector to unit mean square, then by a learned gain."""

    def __init__(self, channels: int, *, num_spatial_axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * num_spatial_axes))

    def forward(self, frames_BTCHW: Tensor) -> Tensor:  # noqa: D102
        # The same as F.normalize over the channels, whose strided norm is far slower on a CPU.
        inverse = frames_BTCHW.square().sum(2, keepdim=True).clamp_min(1e-24).rsqrt()
        return frames_BTCHW * inverse * (self.gamma.view(-1, 1, 1) * self.gamma.shape[0] ** 0.5)


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(  # indices are the public file's; 5 was a dropout
            RMSNorm(in_channels, num_spatial_axes=3),
            nn.SiLU(),
            CausalConv3d(in_channels, out_channels, (3, 3, 3)),
            RMSNorm(out_channels, num_spatial_axes=3),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        )
        self.shortcut = (
            CausalConv3d(in_channels, out_channels, (1, 1, 1))
            if in_channels != out_channels
            else None
        )

    def forward(self, frames_BTCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        hidden = frames_BTCHW
        for layer in self.residual:
            hidden = layer(hidden, stream) if isinstance(layer, CausalConv3d) else layer(hidden)
        if self.shortcut is not None:
            frames_BTCHW = self.shortcut(frames_BTCHW, stream)
        return frames_BTCHW + hidden


class AttentionBlock(nn.Module):
    """One attention head over the pixels of each frame by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, num_spatial_axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, frames_BTCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        height, width = frames_BTCHW.shape[-2:]
        qkv = self.to_qkv(self.norm(frames_BTCHW).flatten(0, 1))
        q, k, v = qkv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        output = self.proj(attended.unflatten(2, (height, width)))
        return frames_BTCHW + output.view_as(frames_BTCHW)


class Downsample(nn.Module):
    """Halve height and width; with ``in_time``, also the frames after the first."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
        )
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1)) if in_time else None

    def forward(self, frames_BTCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        batch = frames_BTCHW.shape[0]
        frames_BTCHW = self.resample(frames_BTCHW.flatten(0, 1)).unflatten(0, (batch, -1))
        if self.time_conv is None:
            return frames_BTCHW
        pending = stream.get(self)
        # The clip's first frame passes as it is, and is also the past of the first pair.
        first = frames_BTCHW[:, :1] if pending is None else frames_BTCHW[:, :0]
        if pending is not None:
            frames_BTCHW = torch.cat((pending, frames_BTCHW), 1)
        num_pairs = (frames_BTCHW.shape[1] - 1) // 2
        stream[self] = frames_BTCHW[:, 2 * num_pairs :]
        if num_pairs == 0:
            return first
        stop = 2 * num_pairs
        stacked = torch.cat(
            (
                frames_BTCHW[:, :stop:2],
                frames_BTCHW[:, 1:stop:2],
                frames_BTCHW[:, 2 : stop + 1 : 2],
            ),
            2,
        )
        weight = self.time_conv.weight.transpose(1, 2).flatten(1, 2)
        halved = F.conv2d(stacked.flatten(0, 1), weight, self.time_conv.bias)
        return torch.cat((first, halved.unflatten(0, (batch, num_pairs))), 1)


class Upsample(nn.Module):
    """Double height and width, halve the channels; with ``in_time``, double the later frames."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
            nn.Conv2d(channels, channels // 2, 3, padding=1),
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if in_time else None

    def forward(self, frames_BTCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        if self.time_conv is not None:
            # The clip's first latent frame stands for one frame; the convolution never sees it.
            is_first = self not in stream
            stream[self] = frames_BTCHW[:, :0]
            first, later = frames_BTCHW[:, : int(is_first)], frames_BTCHW[:, int(is_first) :]
            if later.shape[1]:
                pairs = self.time_conv(later, stream).unflatten(2, (2, -1))
                later = pairs.flatten(1, 2)  # [B, T, 2, C, H, W] -> [B, 2T, C, H, W]
            frames_BTCHW = torch.cat((first, later), 1)
        batch = frames_BTCHW.shape[0]
        return self.resample(frames_BTCHW.flatten(0, 1)).unflatten(0, (batch, -1))


def _make_head(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        RMSNorm(in_channels, num_spatial_axes=3),
        nn.SiLU(),
        CausalConv3d(in_channels, out_channels, (3, 3, 3)),
    )


def _make_middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels),
        AttentionBlock(channels),
        ResidualBlock(channels, channels),
    )


class Encoder(nn.Module):
    """Frames to twice the latent channels: mean and log-variance."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(3, dim, (3, 3, 3))
        channels = [dim, dim, 2 * dim, 4 * dim, 4 * dim]
        stages: list[nn.Module] = []
        for i in range(4):
            stages += [
                ResidualBlock(channels[i], channels[i + 1]),
                ResidualBlock(channels[i + 1], channels[i + 1]),
            ]
            if i < 3:
                stages.append(Downsample(channels[i + 1], in_time=i > 0))
        self.downsamples = nn.Sequential(*stages)
        self.middle = _make_middle(4 * dim)
        self.head = _make_head(4 * dim, 2 * LATENT_CHANNELS)

    def forward(self, frames_BTCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        hidden = self.conv1(frames_BTCHW, stream)
        for stage in (*self.downsamples, *self.middle):
            hidden = stage(hidden, stream)
        return self.head[2](self.head[1](self.head[0](hidden)), stream)


class Decoder(nn.Module):
    """Latents to frames."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(LATENT_CHANNELS, 4 * dim, (3, 3, 3))
        self.middle = _make_middle(4 * dim)
        stages: list[nn.Module] = []
        for i, (in_channels, out_channels) in enumerate(
            ((4 * dim, 4 * dim), (2 * dim, 4 * dim), (2 * dim, 2 * dim), (dim, dim))
        ):
            stages += [
                ResidualBlock(in_channels, out_channels),
                ResidualBlock(out_channels, out_channels),
                ResidualBlock(out_channels, out_channels),
            ]
            if i < 3:
                stages.append(Upsample(out_channels, in_time=i < 2))
        self.upsamples = nn.Sequential(*stages)
        self.head = _make_head(dim, 3)

    def forward(self, latents_BTCHW: Tensor, stream: Stream, *, is_frugal: bool = False) -> Tensor:
        """Decode the next latents of a clip; frugally no stage sees two frames at a time."""
        stages = (self.conv1, *self.middle, *self.upsamples)
        return self._finish(latents_BTCHW, stages, stream, is_frugal)

    def _finish(
        self, hidden_BTCHW: Tensor, stages: Sequence[nn.Module], stream: Stream, is_frugal: bool
    ) -> Tensor:
        for index, stage in enumerate(stages):
            if is_frugal and hidden_BTCHW.shape[1] > 1:
                frames = hidden_BTCHW.split(1, 1)
                return torch.cat([self._finish(f, stages[index:], stream, True) for f in frames], 1)
            hidden_BTCHW = stage(hidden_BTCHW, stream)
        return self.head[2](self.head[1](self.head[0](hidden_BTCHW)), stream)


class WanVAE(nn.Module):
    """Video frames to and from the latents that the DiT works on; satisfies ``ports.VideoCodec``.

    Args:
        dim: channels at full resolution: 96 in the public file.

    Attributes:
        dim: the same.
        is_frugal: work on one frame at a time: less memory, more time, the same up to rounding.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.is_frugal = False
        self.encoder = Encoder(dim)
        self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, (1, 1, 1))
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, (1, 1, 1))
        self.decoder = Decoder(dim)
        self.latent_mean_C: Tensor
        self.latent_std_C: Tensor
        self.register_buffer("latent_mean_C", torch.tensor(LATENT_MEAN), persistent=False)
        self.register_buffer("latent_std_C", torch.tensor(LATENT_STD), persistent=False)

    def initialize(self) -> None:
        """Draw weights for training from nothing, from torch's global generator.

        Orthogonal convolutions, residual branches that begin quiet, and latents that begin spread
        out, with little posterior noise: without these the loss stays for hundreds of updates where
        a flat picture has it. In time nothing happens at first: convolutions see the present frame
        alone, two frames become their mean and one becomes two. So what is learned from single
        frames holds for clips; random taps would mix it up and colours would be lost.
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
        """Encode frames to the distribution of their latents.

        Args:
            frames_BCTHW: in [-1, 1].
            stream: of the clip so far; None for a clip of its own.

        Returns:
            Mean and log-variance, unnormalised, [B, 16, F, H/8, W/8]; F counts the latent frames
            completed by these frames.
        """
        stream = {} if stream is None else stream
        hidden = self.encoder(frames_BCTHW.transpose(1, 2), stream)
        mean, log_variance = self.conv1(hidden, stream).transpose(1, 2).chunk(2, 1)
        return mean, log_variance

    def reconstruct(self, raw_BCFHW: Tensor, stream: Stream | None = None) -> Tensor:
        """Decode unnormalised latents to unclamped frames.

        Args:
            raw_BCFHW: unnormalised latents.
            stream: of the clip so far; None for a clip of its own.

        Returns:
            [B, 3, T, H, W]; T is 4F, or 4F - 3 at the start of a clip.
        """
        stream = {} if stream is None else stream
        hidden = self.conv2(raw_BCFHW.transpose(1, 2), stream)
        return self.decoder(hidden, stream, is_frugal=self.is_frugal).transpose(1, 2)

    def encode_stream(self, frames_BCTHW: Tensor, stream: Stream) -> Tensor:
        """Encode the next frames of a clip, any number of them.

        Args:
            frames_BCTHW: in [-1, 1].
            stream: of this clip, empty before its first frame; updated.

        Returns:
            The normalised latent frames that are complete now, possibly none.
        """
        mean, _ = self.posterior(frames_BCTHW, stream)
        return (mean - self._column(self.latent_mean_C)) / self._column(self.latent_std_C)

    def decode_stream(self, latents_BCFHW: Tensor, stream: Stream) -> Tensor:
        """Decode the next normalised latent frames of a clip, any number of them.

        Args:
            latents_BCFHW: normalised latents, at least one frame.
            stream: of this clip, empty before its first latent; updated.

        Returns:
            Their frames, clamped to [-1, 1].
        """
        raw = latents_BCFHW * self._column(self.latent_std_C) + self._column(self.latent_mean_C)
        return self.reconstruct(raw, stream).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        """Encode a whole clip.

        Args:
            frames_BCTHW: [B, 3, 4n + 1, H, W] in [-1, 1], sides multiples of 8.

        Returns:
            Normalised latents [B, 16, n + 1, H/8, W/8] in the weights' dtype.

        Raises:
            GeometryError: a frame count or size that the codec cannot take.
            MismatchError: not three channels.
        """
        _, channels, num_frames, height, width = frames_BCTHW.shape
        if channels != 3:
            raise MismatchError(f"the codec takes 3 colour channels, got {channels}")
        if height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise GeometryError(
                f"got {width}x{height} frames; both sides must be multiples of {SPATIAL_STRIDE}"
            )
        count_latent_frames(num_frames)

        def call() -> Tensor:
            stream: Stream = {}
            stops = range(1, num_frames, 1 if self.is_frugal else 8)
            pieces = frames_BCTHW.to(self._placement).tensor_split(tuple(stops), 2)
            return torch.cat([self.encode_stream(piece, stream) for piece in pieces], 2)

        return call_frugally(self, call, "the video VAE")

    @torch.no_grad()  # on a generator it holds only while this code runs, not in the caller's loop
    def iter_decode(self, latents_BCFHW: Tensor) -> Iterator[Tensor]:
        """Decode a whole clip piece by piece, so that memory does not grow with its length.

        Args:
            latents_BCFHW: normalised latents of a whole clip.

        Yields:
            Frames [B, 3, t, H, W] in [-1, 1], in order; 4F - 3 in all.
        """
        stream: Stream = {}
        for piece in latents_BCFHW.to(self._placement).split(1 if self.is_frugal else 2, 2):
            yield self.decode_stream(piece, stream)

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Decode the normalised latents of a whole clip to frames [B, 3, 4F - 3, H, W]."""
        return call_frugally(
            self, lambda: torch.cat(list(self.iter_decode(latents_BCFHW)), 2), "the video VAE"
        )

    @property
    def _placement(self) -> Tensor:
        return self.conv1.weight

    @staticmethod
    def _column(statistics_C: Tensor) -> Tensor:
        return statistics_C.view(-1, 1, 1, 1)
