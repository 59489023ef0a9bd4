"""What decides a video, in a few short words: two videos with equal words have equal frames.

Goes in: a request, what the networks hear and see, and the networks. Comes out: names and values
that travel as JSON. Separate because both the command line and the host ask whether an unfinished
take is of the video that is wanted.

Axes: T frames.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .request import TalkRequest
from .types import Speech

_DIGEST_BYTES = 16
SAMPLES_PER_WEIGHT = 64  # values that stand for a weight: a 14B model is known in a second


@runtime_checkable
class Digested(Protocol):
    """Pictures that know a shorter way to tell what they are than to be all decoded."""

    def digest(self) -> str:
        """Tell all pictures apart from others."""
        ...


def identify(
    request: TalkRequest,
    speeches: Sequence[Speech],
    pictures: Sequence[Tensor] | Digested,
    tensors: Mapping[str, Tensor | None],
    weights: str,
) -> dict[str, str]:
    """Name all that decides the frames of a video.

    Args:
        request: all settings.
        speeches: all voices.
        pictures: the portrait, or the frames of a video to dub.
        tensors: whatever else the networks are told, by names for people.
        weights: of ``fingerprint``.

    Returns:
        Settings as they are, of everything else digests.
    """
    settings = {field.name: json.dumps(getattr(request, field.name)) for field in fields(request)}
    voices = [
        f"{digest(voice.features.features_TLD, voice.waveform.samples_CS)} "
        f"{voice.waveform.sample_rate}"
        for voice in speeches
    ]
    shown = pictures.digest() if isinstance(pictures, Digested) else digest(*pictures)
    given = {name: digest(tensor) for name, tensor in tensors.items() if tensor is not None}
    return {
        **settings,
        "voice": ", ".join(voices),
        "picture": shown,
        "weights": weights,
        **given,
    }


def digest(*tensors: Tensor) -> str:
    """Tell tensors apart by all of their values, types and shapes.

    Args:
        *tensors: any.

    Returns:
        Hexadecimal digits.
    """
    hashed = blake2b(digest_size=_DIGEST_BYTES)
    for tensor in tensors:
        hashed.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().to("cpu").contiguous().flatten()
        hashed.update(flat.view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Tell weights apart by names, types, shapes and evenly spread values.

    No training, merged LoRA or conversion leaves all of these as they were, and reading them takes
    a second where all values would take minutes.

    Args:
        weights: by name, in an order that is always the same.

    Returns:
        Hexadecimal digits.
    """
    hashed = blake2b(digest_size=_DIGEST_BYTES)
    for name, weight in weights:
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // SAMPLES_PER_WEIGHT)
        hashed.update(f"{name} {digest(flat[::step])} {tuple(weight.shape)}".encode())
    return hashed.hexdigest()
