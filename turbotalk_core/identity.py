"""What decides a video, in a few short words: two videos with equal words have equal frames.

Goes in: a request, what the networks hear and see, and the networks. Comes out: names and values
that travel as JSON. Separate because both the command line and the host ask whether an unfinished
take is of the video that is wanted, and below all rooms because rooms name what only they know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .request import TalkRequest
from .sound import Sound, Span
from .types import Speech

_DIGEST_BYTES = 16
_BLOCK = 1 << 20  # bytes of a file read at a time
SAMPLES_PER_WEIGHT = 64  # values that stand for a weight: a 14B model is known in a second


@runtime_checkable
class Digested(Protocol):
    """Pictures or a sound that know a shorter way to tell what they are than to be all decoded."""

    def digest(self) -> str:
        """Tell them apart from all others."""
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
    # Not the features themselves: of hours of sound they are never all there.
    heard = [
        digest(voice.features.rows()) if voice.origin is None else voice.origin
        for voice in speeches
    ]
    shown = pictures.digest() if isinstance(pictures, Digested) else digest(*pictures)
    given = {name: digest(tensor) for name, tensor in tensors.items() if tensor is not None}
    return {
        **settings,
        "hearing": "; ".join(heard),  # what the setting comes to
        "voice": ", ".join(digest_sound(voice.waveform) for voice in speeches),
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


def digest_text(text: str) -> str:
    """Compute a digest of a text.

    Args:
        text: any.

    Returns:
        Hexadecimal digits.
    """
    return blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def digest_sound(sound: Sound) -> str:
    """Tell sounds apart by all of their samples, or a file by all of its bytes, which are fewer.

    Args:
        sound: of any length; memory is that of one block.

    Returns:
        Hexadecimal digits.
    """
    hashed = blake2b(digest_size=_DIGEST_BYTES)
    hashed.update(f"{sound.sample_rate} {sound.num_channels} {sound.num_samples}".encode())
    source, spans = sound, []
    while isinstance(source, Span):
        spans.append((source.start, source.num_samples))
        source = source.sound
    if isinstance(source, Digested):
        hashed.update(f"{spans} {source.digest()}".encode())
    else:
        for block_CS in sound.blocks():
            # Sample by sample, all channels of each: so blocks of any lengths give the same.
            hashed.update(block_CS.T.contiguous().numpy().data)
    return hashed.hexdigest()


def digest_file(path: Path) -> str:
    """Tell files apart by all of their bytes.

    Args:
        path: of a file.

    Returns:
        Hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    hashed = blake2b(digest_size=_DIGEST_BYTES)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
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
