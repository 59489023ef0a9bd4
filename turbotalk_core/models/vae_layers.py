"""Layers of the video VAE: causal convolutions, residual blocks, resampling, encoder and decoder.

A causal layer depends on the present frame and the past alone. Each layer caches the earlier frames
that it needs in a ``Stream``, so that a clip may be processed in pieces of any length: the cached
frames take the place of the zero padding that the start of a clip gets.

Clips have the layout [T, B, C, H, W], with each pixel's channels adjacent in memory. Every 3-D
convolution is computed as one 2-D convolution whose input channels are the stacked time taps: the
sums are the same, and CPUs and GPUs have far faster kernels for it. Separate from ``vae.py``, which
handles the statistics of latents and checks lengths and sizes.

Axes: T frames, B batch, C channels, H height, W width, N frames of all clips, I and O channels of a
kernel.
Source of the architecture: Wan 2.1, wan/modules/vae.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import LATENT_CHANNELS, SPATIAL_STRIDE

Stream = dict[nn.Module, Tensor]
"""Earlier frames that each layer caches; empty at the start of a clip."""


def time_first(clip_BCTHW: Tensor) -> Tensor:
    """Permute a clip to the layout of the stages, [T, B, C, H, W], channels last in memory."""
    clip_TBCHW = clip_BCTHW.permute(2, 0, 1, 3, 4)
    return _channels_last(clip_TBCHW.flatten(0, 1)).unflatten(0, clip_TBCHW.shape[:2])


class CausalConv3d(nn.Conv3d):
    """Causal 3-D convolution: frame t of the output depends on frames up to t of the input.

    Frames before the first are zeros. Kernels are 1 or 3 in time, odd in space, stride 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (a stream goes along)
        self, frames_TBCHW: Tensor, stream: Stream
    ) -> Tensor:
        """Convolve the next frames of a clip, [T, B, C, H, W], and cache the last two of them.

        With a kernel of 3 in time, output frame t needs input frames t - 2, t - 1 and t. The two
        cached frames make the result the same as that of one call for the whole clip.
        """
        num_frames, batch = frames_TBCHW.shape[:2]
        taps, height, _ = self.kernel_size
        weight = self.weight
        stacked_NCHW = frames_TBCHW.flatten(0, 1)  # all clips' first frame, then all their second
        if taps > 1:
            past_NCHW = stream.get(self)
            is_lone = past_NCHW is None and num_frames == 1
            if past_NCHW is None:
                past_NCHW = stacked_NCHW.new_zeros((taps - 1) * batch, *stacked_NCHW.shape[1:])
            extended_NCHW = torch.cat((_channels_last(past_NCHW), stacked_NCHW))
            stream[self] = extended_NCHW[(1 - taps) * batch :].clone()  # a view would keep it all
            if is_lone:  # a clip's first frame alone: the earlier taps would multiply zeros
                weight = weight[:, :, -1:]
            else:
                length = num_frames * batch
                stacked_NCHW = torch.cat(
                    [extended_NCHW[t * batch : t * batch + length] for t in range(taps)], 1
                )
        output_NCHW = F.conv2d(stacked_NCHW, _stack_taps(weight), self.bias, padding=height // 2)
        return output_NCHW.unflatten(0, (num_frames, batch))


class RMSNorm(nn.Module):
    """RMS norm of each pixel's channel vector: unit mean square, times a learned gain."""

    def __init__(self, channels: int, *, num_spatial_axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * num_spatial_axes))

    def forward(self, frames_TBCHW: Tensor) -> Tensor:  # noqa: D102
        # Equal to F.normalize over the channels, but its strided norm is far slower on a CPU.
        inverse = frames_TBCHW.square().sum(2, keepdim=True).clamp_min(1e-24).rsqrt()
        gain = self.gamma.view(-1, 1, 1) * self.gamma.shape[0] ** 0.5
        return (frames_TBCHW * inverse).mul_(gain)


class CausalSequential(nn.Sequential):
    """Sequence of layers; the causal convolutions among them get the stream."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (a stream goes along)
        self, frames_TBCHW: Tensor, stream: Stream
    ) -> Tensor:
        """Apply all layers to the next frames of a clip, [T, B, C, H, W]."""
        for layer in self:
            is_causal = isinstance(layer, CausalConv3d)
            frames_TBCHW = layer(frames_TBCHW, stream) if is_causal else layer(frames_TBCHW)
        return frames_TBCHW


class ResidualBlock(nn.Module):
    """Residual block of two causal convolutions, each after norm and SiLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # The indices are part of the public file's keys; its layer 5 is a dropout.
        self.residual = CausalSequential(
            RMSNorm(in_channels, num_spatial_axes=3),
            nn.SiLU(inplace=True),
            CausalConv3d(in_channels, out_channels, (3, 3, 3)),
            RMSNorm(out_channels, num_spatial_axes=3),
            nn.SiLU(inplace=True),
            nn.Identity(),
            CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        )
        self.shortcut = (
            CausalConv3d(in_channels, out_channels, (1, 1, 1))
            if in_channels != out_channels
            else None
        )

    def forward(self, frames_TBCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        hidden = self.residual(frames_TBCHW, stream)
        if self.shortcut is not None:
            frames_TBCHW = self.shortcut(frames_TBCHW, stream)
        return frames_TBCHW + hidden


class AttentionBlock(nn.Module):
    """Self-attention with one head among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, num_spatial_axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, frames_TBCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        qkv = self.to_qkv(self.norm(frames_TBCHW).flatten(0, 1))
        q, k, v = qkv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        output = self.proj(attended.unflatten(2, frames_TBCHW.shape[3:]))
        return frames_TBCHW + output.unflatten(0, frames_TBCHW.shape[:2])


class Downsample(nn.Module):
    """Downsampling of height and width by 2; with ``in_time``, also of the frames after the first.

    The first frame passes through alone, so 1 + 2n frames become 1 + n. Two such stages make one
    latent frame of the first video frame and one of every four after it.
    """

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
        )
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1)) if in_time else None

    def forward(self, frames_TBCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        batch = frames_TBCHW.shape[1]
        frames_NCHW = self.resample(frames_TBCHW.flatten(0, 1))
        if self.time_conv is None:
            return frames_NCHW.unflatten(0, (-1, batch))
        pending_NCHW = stream.get(self)
        # The time convolution has kernel 3 and stride 2: each output takes a pair of frames and the
        # frame before it. The clip's first frame passes unchanged and also precedes the first pair.
        # The stream holds the frame before the next pair, and the first frame of an incomplete one.
        first_NCHW = frames_NCHW[: batch if pending_NCHW is None else 0]
        if pending_NCHW is not None:
            frames_NCHW = torch.cat((pending_NCHW, frames_NCHW))
        frames_TBCHW = frames_NCHW.unflatten(0, (-1, batch))
        num_pairs = (len(frames_TBCHW) - 1) // 2
        stop = 2 * num_pairs
        stream[self] = frames_TBCHW[stop:].flatten(0, 1).clone()
        if num_pairs == 0:
            return first_NCHW.unflatten(0, (-1, batch))
        stacked_NCHW = torch.cat(
            [frames_TBCHW[tap : stop + tap : 2].flatten(0, 1) for tap in range(3)], 1
        )
        weight = _stack_taps(self.time_conv.weight)
        halved_NCHW = F.conv2d(stacked_NCHW, weight, self.time_conv.bias)
        return torch.cat((first_NCHW, halved_NCHW)).unflatten(0, (-1, batch))


class Upsample(nn.Module):
    """Upsampling of height and width by 2 with half the channels; with ``in_time``, also of time.

    The time convolution makes two frames of every latent frame but the clip's first.
    """

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
            nn.Conv2d(channels, channels // 2, 3, padding=1),
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if in_time else None

    def forward(self, frames_TBCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        batch = frames_TBCHW.shape[1]
        if self.time_conv is not None:
            # The clip's first latent frame stands for one video frame. It bypasses the time
            # convolution, whose past is therefore zeros at the second frame, as in the reference.
            is_first = self not in stream
            stream[self] = frames_TBCHW.new_empty(0)  # marks that the first frame has passed
            first, later = frames_TBCHW[: int(is_first)], frames_TBCHW[int(is_first) :]
            if len(later):
                pairs = self.time_conv(later, stream).unflatten(2, (2, -1))
                later = pairs.transpose(1, 2).flatten(0, 1)  # [T, B, 2, ...] -> [2T, B, ...]
            frames_TBCHW = torch.cat((first, later))
        frames_NCHW = _channels_last(frames_TBCHW.flatten(0, 1))
        return self.resample(frames_NCHW).unflatten(0, (-1, batch))


def _stack_taps(weight_OITHW: Tensor) -> Tensor:
    """Reshape a 3-D kernel to the 2-D kernel of stacked frames, [O, T * I, H, W], channels last."""
    return weight_OITHW.permute(0, 3, 4, 2, 1).flatten(3).permute(0, 3, 1, 2)


def _channels_last(images_NCHW: Tensor) -> Tensor:
    """Make each pixel's channels adjacent in memory: convolutions are faster on CPUs and GPUs."""
    return images_NCHW.contiguous(memory_format=torch.channels_last)


def _make_head(in_channels: int, out_channels: int) -> CausalSequential:
    return CausalSequential(
        RMSNorm(in_channels, num_spatial_axes=3),
        nn.SiLU(inplace=True),
        CausalConv3d(in_channels, out_channels, (3, 3, 3)),
    )


def _make_middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels),
        AttentionBlock(channels),
        ResidualBlock(channels, channels),
    )


class Encoder(nn.Module):
    """Encoder from frames to twice the latent channels, from which mean and log-variance follow."""

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

    def forward(self, frames_TBCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        hidden = frames_TBCHW
        for stage in self._stages:
            hidden = stage(hidden, stream)
            if not len(hidden):  # a stage waits for the second frame of a pair
                _, batch, _, height, width = frames_TBCHW.shape
                size = height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
                return hidden.new_empty(0, batch, 2 * LATENT_CHANNELS, *size)
        return hidden

    def iter_held(self, first_TBCHW: Tensor, held_TBCHW: Tensor, repeats: int) -> Iterator[Tensor]:
        """Encode a first piece of a clip, followed by repetitions of one other piece.

        The output of a stage depends on its input and on a few frames before it. So once its input
        repeats, its output repeats too, a fixed number of pieces later, and is reused. The results
        equal bit for bit those of calling this module piece by piece, as the calls that are made
        are a subset of those.

        Args:
            first_TBCHW: piece that the clip begins with.
            held_TBCHW: piece that is repeated after it, with an even number of frames.
            repeats: number of repetitions.

        Yields:
            Encoded frames completed by each piece; concatenated, those of the whole clip.
        """
        stream: Stream = {}
        stages, counts = self._stages, self._count_distinct(len(held_TBCHW))
        start = 0
        for index in range(1 + repeats):
            hidden_TBCHW = held_TBCHW if index else first_TBCHW
            for position in range(start, len(stages)):
                hidden_TBCHW = stages[position](hidden_TBCHW, stream)
                if not len(hidden_TBCHW):
                    break
                if index + 1 == counts[position]:
                    start, held_TBCHW = position + 1, hidden_TBCHW
            else:
                yield hidden_TBCHW

    @property
    def _stages(self) -> tuple[nn.Module, ...]:
        return self.conv1, *self.downsamples, *self.middle, self.head

    def _count_distinct(self, length: int) -> list[int | None]:
        """Count, for each stage, the pieces until its output repeats.

        The count starts at 2: the first piece, and the first of the equal ones. A causal
        convolution with kernel K in time adds ceil((K - 1) / length) pieces, until its cached
        frames are equal too. Temporal downsampling adds one piece and halves the length.

        Args:
            length: frames of the piece that repeats from the second piece on.

        Returns:
            A number of pieces per stage; None for a stage whose outputs alternate, and for all
            stages after it.
        """
        counts: list[int | None] = []
        count = 2
        for stage in self._stages:
            if isinstance(stage, Downsample) and stage.time_conv is not None:
                if length % 2:  # one piece completes a pair, the next does not
                    return counts + [None] * (len(self._stages) - len(counts))
                count += 1  # until the frame before the pair is equal too
                length //= 2
            else:
                convolutions = [m for m in stage.modules() if isinstance(m, CausalConv3d)]
                count += sum(-(-(m.kernel_size[0] - 1) // length) for m in convolutions)
            counts.append(count)
        return counts


class Decoder(nn.Module):
    """Decoder from latents to frames."""

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

    def forward(
        self, latents_TBCHW: Tensor, stream: Stream, *, saves_memory: bool = False
    ) -> Tensor:
        """Decode the next latents of a clip; to save memory, one frame per stage at a time."""
        stages = (self.conv1, *self.middle, *self.upsamples, self.head)
        return _finish(latents_TBCHW, stages, stream, saves_memory)


def _finish(
    hidden_TBCHW: Tensor, stages: Sequence[nn.Module], stream: Stream, saves_memory: bool
) -> Tensor:
    for index, stage in enumerate(stages):
        if saves_memory and len(hidden_TBCHW) > 1:
            frames = hidden_TBCHW.split(1)
            return torch.cat([_finish(frame, stages[index:], stream, True) for frame in frames])
        hidden_TBCHW = stage(hidden_TBCHW, stream)
    return hidden_TBCHW
