"""What the video VAE is made of: convolutions that see only the past, stage after stage.

Each keeps what it needs of earlier frames in a ``Stream``, so that a clip may come in any pieces.
Inside, a clip is laid out [T, B, C, H, W], each pixel's channels side by side in memory, and every
3-D convolution is computed as one 2-D convolution over the stacked time taps: the same sums, and
processors have far faster kernels for it. Separate from the codec because it knows nothing of
latents' statistics, lengths and sizes.

Axes: T frames, B batch, C channels, H height, W width, N frames of all clips, I and O channels of a
kernel.
Source of the architecture: Wan 2.1, wan/modules/vae.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import LATENT_CHANNELS, SPATIAL_STRIDE

Stream = dict[nn.Module, Tensor]
"""What each stage remembers of the frames before; empty at the start of a clip."""


def time_first(clip_BCTHW: Tensor) -> Tensor:
    """Lay a clip out as the stages want it, [T, B, C, H, W]."""
    clip_TBCHW = clip_BCTHW.permute(2, 0, 1, 3, 4)
    return _channels_last(clip_TBCHW.flatten(0, 1)).unflatten(0, clip_TBCHW.shape[:2])


class CausalConv3d(nn.Conv3d):
    """A convolution over time and space that sees only the present and the past.

    Before the first frame it sees zeros. Kernels are 1 or 3 in time, odd in space, stride 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (a stream goes along)
        self, frames_TBCHW: Tensor, stream: Stream
    ) -> Tensor:
        """Convolve the next frames of a clip, [T, B, C, H, W], remembering the last two."""
        num_frames, batch = frames_TBCHW.shape[:2]
        taps, height, _ = self.kernel_size
        weight = self.weight
        stacked_NCHW = frames_TBCHW.flatten(0, 1)  # one frame's clips after the other's
        if taps > 1:
            past_NCHW = stream.get(self)
            is_lone = past_NCHW is None and num_frames == 1
            if past_NCHW is None:
                past_NCHW = stacked_NCHW.new_zeros((taps - 1) * batch, *stacked_NCHW.shape[1:])
            extended_NCHW = torch.cat((_channels_last(past_NCHW), stacked_NCHW))
            stream[self] = extended_NCHW[(1 - taps) * batch :].clone()  # a view would keep it all
            if is_lone:  # a clip's first frame alone: the other taps would only see zeros
                weight = weight[:, :, -1:]
            else:
                length = num_frames * batch
                stacked_NCHW = torch.cat(
                    [extended_NCHW[t * batch : t * batch + length] for t in range(taps)], 1
                )
        output_NCHW = F.conv2d(stacked_NCHW, _stack_taps(weight), self.bias, padding=height // 2)
        return output_NCHW.unflatten(0, (num_frames, batch))


class RMSNorm(nn.Module):
    """Scale each pixel's channel vector to unit mean square, then by a learned gain."""

    def __init__(self, channels: int, *, num_spatial_axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * num_spatial_axes))

    def forward(self, frames_TBCHW: Tensor) -> Tensor:  # noqa: D102
        # The same as F.normalize over the channels, whose strided norm is far slower on a CPU.
        inverse = frames_TBCHW.square().sum(2, keepdim=True).clamp_min(1e-24).rsqrt()
        gain = self.gamma.view(-1, 1, 1) * self.gamma.shape[0] ** 0.5
        return (frames_TBCHW * inverse).mul_(gain)


class CausalSequential(nn.Sequential):
    """Layers one after the other, of which the causal ones get the stream."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (a stream goes along)
        self, frames_TBCHW: Tensor, stream: Stream
    ) -> Tensor:
        """Run the next frames of a clip through all layers."""
        for layer in self:
            is_causal = isinstance(layer, CausalConv3d)
            frames_TBCHW = layer(frames_TBCHW, stream) if is_causal else layer(frames_TBCHW)
        return frames_TBCHW


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = CausalSequential(  # indices are the public file's; 5 was a dropout
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
    """One attention head over the pixels of each frame by itself."""

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
    """Halve height and width; with ``in_time``, also the frames after the first."""

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
        # The clip's first frame passes as it is, and is also the past of the first pair.
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
    """Double height and width, halve the channels; with ``in_time``, double the later frames."""

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
            # The clip's first latent frame stands for one frame; the convolution never sees it.
            is_first = self not in stream
            stream[self] = frames_TBCHW.new_empty(0)  # that there was one
            first, later = frames_TBCHW[: int(is_first)], frames_TBCHW[int(is_first) :]
            if len(later):
                pairs = self.time_conv(later, stream).unflatten(2, (2, -1))
                later = pairs.transpose(1, 2).flatten(0, 1)  # [T, B, 2, ...] -> [2T, B, ...]
            frames_TBCHW = torch.cat((first, later))
        frames_NCHW = _channels_last(frames_TBCHW.flatten(0, 1))
        return self.resample(frames_NCHW).unflatten(0, (-1, batch))


def _stack_taps(weight_OITHW: Tensor) -> Tensor:
    """Make a 3-D kernel the 2-D kernel, [O, T * I, H, W], of stacked frames, channels last."""
    return weight_OITHW.permute(0, 3, 4, 2, 1).flatten(3).permute(0, 3, 1, 2)


def _channels_last(images_NCHW: Tensor) -> Tensor:
    """Lay each pixel's channels side by side in memory: CPUs and GPUs convolve that faster."""
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

    def forward(self, frames_TBCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        hidden = frames_TBCHW
        for stage in self._stages:
            hidden = stage(hidden, stream)
            if not len(hidden):  # it waits for the second frame of a pair
                _, batch, _, height, width = frames_TBCHW.shape
                size = height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
                return hidden.new_empty(0, batch, 2 * LATENT_CHANNELS, *size)
        return hidden

    def iter_held(self, first_TBCHW: Tensor, held_TBCHW: Tensor, repeats: int) -> Iterator[Tensor]:
        """Encode a piece of a clip and then one and the same piece over and over.

        What a stage makes depends on its input and a few frames before it. So when its input has
        begun to repeat, its output does too, a fixed number of pieces later, and need not be made
        again. The results are to the bit those of calling this module piece by piece, as every
        call that is made is one of those.

        Args:
            first_TBCHW: the piece that the clip begins with.
            held_TBCHW: the piece that follows, with an even number of frames.
            repeats: how many times it does.

        Yields:
            What is complete now, nothing being left out.
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
        """Count, per stage, the pieces until its outputs repeat; None where they do not.

        Args:
            length: frames of the piece that is held from the second on.

        Returns:
            For each stage a number of pieces, or None from the stage on whose outputs alternate.
        """
        counts: list[int | None] = []
        count = 2
        for stage in self._stages:
            if isinstance(stage, Downsample) and stage.time_conv is not None:
                if length % 2:  # one piece completes a pair, the next does not
                    return counts + [None] * (len(self._stages) - len(counts))
                count += 1  # for the frame that a pair begins with
                length //= 2
            else:
                convolutions = [m for m in stage.modules() if isinstance(m, CausalConv3d)]
                count += sum(-(-(m.kernel_size[0] - 1) // length) for m in convolutions)
            counts.append(count)
        return counts


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

    def forward(self, latents_TBCHW: Tensor, stream: Stream) -> Tensor:  # noqa: D102
        hidden = self.conv1(latents_TBCHW, stream)
        for stage in (*self.middle, *self.upsamples, self.head):
            hidden = stage(hidden, stream)
        return hidden
