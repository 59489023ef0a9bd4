"""Batches: chunks to learn from, with their conditions.

This module stands apart from the data reader, which makes batches, and from the methods, which use
them, because neither imports the other. The reader decides how many latent frames are given: one
where a video begins; three, from 9 context frames, where it continues. TurboTalk has half of each.

Axes: B batch, C channels, F latent frames, H height, W width, P speakers (in masks, the background
comes last), K window, L encoder layers, N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from turbotalk_core.errors import MismatchError
from turbotalk_core.sampling.steps import add_noise

CONTEXT_LATENTS = 3  # InfiniteTalk: latent frames of 9 context frames


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device without waiting for the device.

    A GPU copies from ordinary memory only after all earlier work, and the program waits for that.
    A copy from pinned memory takes its turn in the GPU's queue.

    Args:
        tensor: tensor on any device.
        device: target device.

    Returns:
        The tensor on the device.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Chunks of one length and size, with their conditions.

    Attributes:
        latents_BCFHW: clean, normalised latents: the real samples.
        reference_BCFHW: 20 channels, the mask and the reference latents.
        first_BPKLD: audio windows of the first latent frame, for each voice.
        later_BPFKLD: audio windows of the later latent frames.
        pinned_BF: True where a latent frame is given clean; the given frames of a chunk come first.
        weight_BHW: weight of each place in the loss, mean 1 over a chunk; None for 1 everywhere.
        regions_PHW: masks of the speakers and the background, on latent cells; None for one.
        text_BND: text embedding; None for the null text.
        null_text_BND: embedding of the negative prompt, for guidance; None for zeros.
        image_embeds_BND: CLIP tokens, for a model with the image branch.
    """

    latents_BCFHW: Tensor
    reference_BCFHW: Tensor
    first_BPKLD: Tensor
    later_BPFKLD: Tensor
    pinned_BF: Tensor
    weight_BHW: Tensor | None = None
    regions_PHW: Tensor | None = None
    text_BND: Tensor | None = None
    null_text_BND: Tensor | None = None
    image_embeds_BND: Tensor | None = None

    def __post_init__(self) -> None:
        size, _, frames, height, width = self.latents_BCFHW.shape
        needed = {
            "reference_BCFHW": (size, self.reference_BCFHW.shape[1], frames, height, width),
            "pinned_BF": (size, frames),
            "first_BPKLD": (size, *self.first_BPKLD.shape[1:]),
            "later_BPFKLD": (
                size,
                self.first_BPKLD.shape[1],
                frames - 1,
                *self.later_BPFKLD.shape[3:],
            ),
        }
        for name, shape in needed.items():
            got = tuple(getattr(self, name).shape)
            if got != shape:
                raise MismatchError(
                    f"got {name} of shape {got} beside latents of "
                    f"{tuple(self.latents_BCFHW.shape)}; needed {shape}"
                )

    @property
    def size(self) -> int:
        """Number of chunks in the batch."""
        return self.latents_BCFHW.shape[0]

    @property
    def free_B1F11(self) -> Tensor:
        """1 where a latent frame is to be generated, 0 where it is given; float32."""
        return (~self.pinned_BF).float()[:, None, :, None, None]

    @property
    def has_text(self) -> bool:
        """Whether leaving the text out changes the text condition of a network."""
        return self.text_BND is not None or self.null_text_BND is not None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move the batch to a device.

        Args:
            device: target device.
            dtype: target dtype of all tensors but ``latents_BCFHW``, which stays in float32 because
                noise is added in float32, and ``pinned_BF``, which stays bool. None keeps all.

        Returns:
            The same chunks on the device.
        """
        moved = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            keeps = field.name in ("latents_BCFHW", "pinned_BF")
            if tensor is not None:
                tensor = to_device(tensor if keeps or dtype is None else tensor.to(dtype), device)
            moved[field.name] = tensor
        return Batch(**moved)

    def pin(self, latents_BCFHW: Tensor) -> Tensor:
        """Replace the given latent frames by their clean values.

        No gradient flows through the replaced places, so a loss there has no effect.

        Args:
            latents_BCFHW: latents of these chunks, at any noise level.

        Returns:
            Latents of the same shape.

        Source: InfiniteTalk, wan/multitalk.py, the denoising loop (before and after every call).
        """
        pinned = self.pinned_BF[:, None, :, None, None]
        return torch.where(pinned, self.latents_BCFHW.to(latents_BCFHW), latents_BCFHW)

    def add_noise(self, latents_BCFHW: Tensor, noise_BCFHW: Tensor, sigma_B: Tensor) -> Tensor:
        """Add noise to latents, and keep the given latent frames clean.

        Args:
            latents_BCFHW: clean latents; the batch's own or others under the same conditions.
            noise_BCFHW: standard normal noise.
            sigma_B: noise level of each chunk, in [0, 1].

        Returns:
            Noisy latents, the same shape.
        """
        sigma = sigma_B.view(-1, 1, 1, 1, 1)
        return self.pin(add_noise(latents_BCFHW, noise_BCFHW, sigma))
