"""Video VAE protocol over a VAE of ComfyUI; see ``host`` for the other protocols.

Separate because it can compute in two ways: with the host's code, or with the core's code and the
host's weights.

Axes: B batch, C channels, T video frames, F latent frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.latent_formats
import comfy.model_management
import torch
from comfy.ldm.wan.vae import WanVAE as HostWanVAE
from comfy.sd import VAE
from torch import Tensor, nn

from ...turbotalk_core.conditioning.reference import reference_clip
from ...turbotalk_core.errors import MismatchError
from ...turbotalk_core.geometry import LATENT_CHANNELS
from ...turbotalk_core.models.vae import LATENT_MEAN, LATENT_STD, WanVAE
from .convert import frames_from_image, image_from_frames
from .progress import check_stop

_PLAIN = (Tensor, nn.Parameter)
WIDE = 96  # channels of the public file: at this width the host is as fast, with less memory


class HostVAE:
    """VAE of the host; satisfies ``protocols.VideoVAE``.

    For a narrow VAE on a CPU the core's code computes with the host's weights, because the host's
    three-dimensional convolutions take several times as long there. In all other cases the host
    computes, with its own handling of low memory: on other devices, in any dtype but float32, and
    for a VAE with another structure or with code of another pack in it.
    """

    def __init__(self, vae: VAE) -> None:
        """Wrap a VAE.

        Args:
            vae: of Wan 2.1.

        Raises:
            MismatchError: The VAE is any other one.
        """
        if not isinstance(vae, VAE):
            raise MismatchError(
                f"got a {type(vae).__name__} as VAE; connect the Wan 2.1 VAE, from Load VAE"
            )
        # Wan 2.2's has 48 channels, image VAEs have no time axis
        if vae.latent_channels != LATENT_CHANNELS or vae.latent_dim != 3:
            kind = "video" if vae.latent_dim == 3 else "image"
            raise MismatchError(
                f"got a VAE for {kind} with {vae.latent_channels} latent channels; the Wan 2.1 VAE "
                f"for video with {LATENT_CHANNELS} is needed"
            )
        self._vae = vae
        self._format = comfy.latent_formats.Wan21()
        self._core = _build_core(vae)
        self._loaded: list[tuple[Any, ...]] = []  # weights that the core's VAE shares

    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        """Encode frames; see ``protocols.VideoVAE``."""
        core = self._load_core()
        if core is not None:
            return core.encode(frames_BCTHW)
        return self._format.process_in(self._vae.encode(image_from_frames(frames_BCTHW)).float())

    def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
        """Encode a picture followed by grey frames; see ``protocols.VideoVAE``."""
        core = self._load_core()
        if core is not None:
            return core.encode_reference(picture_BCHW, num_frames)
        return self.encode(reference_clip(picture_BCHW, num_frames))

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Decode latents; see ``protocols.VideoVAE``."""
        core = self._load_core()
        if core is not None:
            return core.decode(latents_BCFHW)
        images_BTHWC = self._vae.decode(self._format.process_out(latents_BCFHW))
        return frames_from_image(images_BTHWC[0].float())

    def _load_core(self) -> WanVAE | None:
        """Return the core's VAE with the host's current weights; None if the host must compute."""
        if self._core is None:
            return None
        # Loading applies the patches. On a CPU the host does not count memory.
        comfy.model_management.load_models_gpu([self._vae.patcher])
        if not _is_unchanged(self._vae):
            return None
        weights = self._vae.first_stage_model.state_dict()
        found = [_describe(name, weight) for name, weight in weights.items()]
        if found != self._loaded:
            if not _fit(weights, self._core):
                return None
            self._core.load_state_dict(weights, assign=True)  # shares the memory
            self._loaded = found
        return self._core


def _build_core(vae: VAE) -> WanVAE | None:
    """Build the core's VAE of the same size, without weights; None if the host must compute."""
    network = vae.first_stage_model
    if vae.device.type != "cpu" or type(network) is not HostWanVAE or network.dim >= WIDE:
        return None
    with torch.device("meta"):
        core = WanVAE(network.dim).requires_grad_(False)
    core.latent_mean_C, core.latent_std_C = torch.tensor((LATENT_MEAN, LATENT_STD))
    for layer in core.modules():
        layer.register_forward_pre_hook(lambda *_: check_stop())  # as the host's layers do
    return core


def _describe(name: str, weight: Tensor) -> tuple[Any, ...]:
    """Describe where the values of a weight are, to compare it with one that is loaded.

    Equal descriptions of plain tensors mean the same memory, as long as one of them is alive.
    """
    place = weight.data_ptr() if type(weight) in _PLAIN else None
    return name, type(weight), weight.dtype, weight.device, weight.shape, weight.stride(), place


def _fit(weights: Mapping[str, Tensor], core: WanVAE) -> bool:
    """Check that the structure is the same, and the weights are plain float32 on the CPU."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    return shapes == {name: weight.shape for name, weight in core.state_dict().items()} and all(
        type(weight) in _PLAIN and weight.dtype == torch.float32 and weight.device.type == "cpu"
        for weight in weights.values()
    )


def _is_unchanged(vae: VAE) -> bool:
    """Check that a VAE runs the host's code only; packs may wrap it or patch its instances."""
    layers = list(vae.first_stage_model.modules())
    if type(vae) is not VAE or type(layers[0]) is not HostWanVAE:
        return False
    if any(type(layer).__module__.partition(".")[0] not in ("comfy", "torch") for layer in layers):
        return False
    changes = ("_forward_hooks", "_forward_pre_hooks", "weight_function", "bias_function")
    if any(getattr(layer, name, None) for layer in layers for name in changes):
        return False
    return not any(
        callable(getattr(type(part), name, None))  # an instance attribute that replaces a method
        for part in (vae, *layers)
        for name in vars(part)
    )
