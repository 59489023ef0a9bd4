"""Digests of texts, tensors, sounds, files and weights; and the cache key of a video.

Equal cache keys mean equal frames, so an unfinished take is continued only under an equal key.
Below all rooms, because some of them compute digests of what only they can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..request import TalkRequest
from ..sound import Sound, Span
from ..types import Speech

_DIGEST_BYTES = 16
_BLOCK = 1 << 20  # bytes of a file read at a time
SAMPLES_PER_WEIGHT = 64  # values that stand for a weight: a 14B model takes a second


# --- fingerprints: digests of single values -----------------------------------------------------


@runtime_checkable
class Digested(Protocol):
    """Pictures or a sound with a shorter way to their digest than decoding all of them."""

    def digest(self) -> str:
        """Return hexadecimal digits that differ for different content."""
        ...


def digest(*tensors: Tensor) -> str:
    """Compute a digest of all values, types and shapes of tensors.

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
    """Compute a digest of all samples of a sound, or of all bytes of its file, which are fewer.

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
    """Compute a digest of all bytes of a file.

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
    """Compute a digest of names, types, shapes and evenly spread values of weights.

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


# --- the cache key ------------------------------------------------------------------------------

_SHORT = 24  # characters of a value that a message shows


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKey:
    """All that decides the frames of a video: equal keys mean equal frames.

    Attributes:
        fields: value by name. Names are for people; short values stand for themselves, digests for
            large ones.
    """

    fields: Mapping[str, str]

    def to_json(self) -> dict[str, str]:
        """Return the fields as one JSON object, as journals of takes store them."""
        return dict(self.fields)

    @classmethod
    def from_json(cls, value: object) -> CacheKey:
        """Read what ``to_json`` returned.

        Args:
            value: a JSON object.

        Returns:
            The key; values that are no strings are converted.

        Raises:
            ValueError: the value is no object.
        """
        if not isinstance(value, dict):
            raise ValueError(f"the cache key is a {type(value).__name__}")
        return cls(fields={str(name): str(each) for name, each in value.items()})


def identify(
    request: TalkRequest,
    speeches: Sequence[Speech],
    pictures: Sequence[Tensor] | Digested,
    tensors: Mapping[str, Tensor | None],
    weights: str,
    others: Mapping[str, str] | None = None,
) -> CacheKey:
    """Compute the cache key of a video.

    Args:
        request: all settings.
        speeches: one per speaker.
        pictures: the portrait, or the frames of a video to dub.
        tensors: all other inputs of the networks, by names for people.
        weights: of ``fingerprint``.
        others: whatever else decides the frames, by names for people.

    Returns:
        Settings as they are, and digests of everything else.
    """
    settings = {field.name: json.dumps(getattr(request, field.name)) for field in fields(request)}
    # The digest of the features themselves only where nothing shorter decides them: features of
    # hours of sound never exist all at once.
    encoded = [
        digest(speech.features.rows()) if speech.origin is None else speech.origin
        for speech in speeches
    ]
    shown = pictures.digest() if isinstance(pictures, Digested) else digest(*pictures)
    digests = {name: digest(tensor) for name, tensor in tensors.items() if tensor is not None}
    return CacheKey(
        fields={
            **(others or {}),
            **settings,
            "hearing": "; ".join(encoded),  # replaces the setting, which "auto" leaves open
            "voice": ", ".join(digest_sound(speech.waveform) for speech in speeches),
            "picture": shown,
            "weights": weights,
            **digests,
        }
    )


def describe_changes(before: CacheKey, now: CacheKey) -> tuple[str, ...]:
    """Describe how two keys differ.

    Args:
        before: of a take that was begun.
        now: of the video that is wanted.

    Returns:
        A phrase for each difference, as in "seed was 0 and is 1"; none where both are equal.
    """
    phrases = []
    for name in sorted({*before.fields, *now.fields}):
        old, new = before.fields.get(name, "none"), now.fields.get(name, "none")
        if old == new:
            continue
        if name == "hearing" and ", by " in old:  # a sentence, where digests stand since
            phrases.append(
                "hearing was recorded by an earlier version of this program, in another form"
            )
        elif max(len(old), len(new)) <= _SHORT:
            phrases.append(f"{name} was {old} and is {new}")
        else:
            phrases.append(f"{name} is another")
    return tuple(phrases)
