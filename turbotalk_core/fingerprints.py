"""Digests of tensors, sounds, files and weights: equal content produces equal digests."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .sound import Sound, Span

_DIGEST_BYTES = 16
_BLOCK = 1 << 20  # bytes of a file read at a time
SAMPLES_PER_WEIGHT = 64  # values read of each weight: a 14B model takes a second


@runtime_checkable
class Digested(Protocol):
    """Pictures or a sound with a digest that needs no decoding, such as that of their file."""

    def digest(self) -> str:
        """Return hexadecimal digits that differ for different content."""
        ...


def digest(*tensors: Tensor) -> str:
    """Compute a digest of all values, types and shapes of tensors.

    Args:
        *tensors: any tensors.

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
        text: any text.

    Returns:
        Hexadecimal digits.
    """
    return blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def digest_sound(sound: Sound) -> str:
    """Compute a digest of all samples of a sound, or of all bytes of its file, which are fewer.

    Args:
        sound: sound of any length; one block is in memory at a time.

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
            # Sample by sample, all channels of each, so that the digest does not depend on the
            # lengths of the blocks.
            hashed.update(block_CS.T.contiguous().numpy().data)
    return hashed.hexdigest()


def digest_file(path: Path) -> str:
    """Compute a digest of all bytes of a file.

    Args:
        path: path of a file.

    Returns:
        Hexadecimal digits.

    Raises:
        OSError: if it cannot be read.
    """
    hashed = blake2b(digest_size=_DIGEST_BYTES)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
    return hashed.hexdigest()


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Compute a digest of names, types, shapes and evenly spread values of weights.

    Training, merging a LoRA and conversion each change some of these. Reading them takes a second;
    reading all values would take minutes.

    Args:
        weights: weights by name, always in the same order.

    Returns:
        Hexadecimal digits.
    """
    hashed = blake2b(digest_size=_DIGEST_BYTES)
    for name, weight in weights:
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // SAMPLES_PER_WEIGHT)
        hashed.update(f"{name} {digest(flat[::step])} {tuple(weight.shape)}".encode())
    return hashed.hexdigest()
