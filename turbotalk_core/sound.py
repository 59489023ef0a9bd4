"""Sounds of any length, read block by block: in memory, on disk, cut, or padded with silence.

Separate from the values in types.py because nothing here stores samples, and outside of the
packages because ``audio`` reads sounds and ``video`` writes them.

Axes: C channels, S audio samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from logging import getLogger
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import AudioError

BLOCK_SAMPLES = 65_536  # default block length: a second or more at common sample rates

Note = Callable[[str], None]  # receiver of remarks on a sound that do not stop the work
_log = getLogger(__name__)


def log_note(text: str) -> None:
    """Write a note to the log as a warning.

    Args:
        text: sentence without a full stop.
    """
    _log.warning("%s", text)


class Sound(Protocol):
    """Sound that can be read any number of times, with the same samples each time.

    An implementation keeps no more of the sound in memory than it was given, plus one block.
    """

    @property
    def sample_rate(self) -> int:
        """Sample rate, Hz."""
        ...

    @property
    def num_channels(self) -> int:
        """Number of channels, at least one."""
        ...

    @property
    def num_samples(self) -> int:
        """Length in samples per channel, at least one."""
        ...

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the samples from ``start`` to the end, float32 [C, S] in blocks of any lengths."""
        ...


class SoundReader:
    """Reader of stretches of a sound.

    Reading forwards is cheap; reading backwards opens the sound again. Memory holds the stretch
    read last and one block.
    """

    def __init__(self, sound: Sound) -> None:
        """Store the sound; nothing is read yet.

        Args:
            sound: sound to read.
        """
        self._sound = sound
        self._blocks: Iterator[Tensor] | None = None
        self._held: deque[Tensor] = deque()
        self._start = self._stop = 0  # range of the samples in memory

    def read(self, start: int, stop: int) -> Tensor:
        """Read a stretch.

        Args:
            start: first sample; may be before the sound, so negative.
            stop: one past the last sample, at least start; may be after the end of the sound.

        Returns:
            [C, stop - start]; zeros before and after the sound.
        """
        first, last = max(0, start), max(0, stop)
        if self._blocks is None or first < self._start:
            self._blocks = self._sound.blocks(first)
            self._held.clear()
            self._start = self._stop = first
        try:
            while self._stop < last and (block_CS := next(self._blocks, None)) is not None:
                self._held.append(block_CS)
                self._stop += block_CS.shape[1]
                self._drop(first)
        except BaseException:
            self._blocks = None  # otherwise a second read would return silence for what failed
            raise
        self._drop(first)
        held_CS = torch.cat([torch.zeros(self._sound.num_channels, 0), *self._held], dim=1)
        found_CS = held_CS[:, max(0, first - self._start) : max(0, last - self._start)]
        before = min(first, stop) - start
        return pad(found_CS, (before, stop - start - before - found_CS.shape[1]))

    def _drop(self, first: int) -> None:
        while self._held and self._start + self._held[0].shape[1] <= first:
            self._start += self._held.popleft().shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Span of a sound, padded with silence outside the sound; a ``Sound``.

    Attributes:
        sound: sound that the span is taken from.
        start: first sample of the span; if negative, the span begins with -start samples of
            silence.
        num_samples: length of the span, at least 1.
    """

    sound: Sound
    start: int
    num_samples: int

    @property
    def sample_rate(self) -> int:
        """Sample rate, Hz."""
        return self.sound.sample_rate

    @property
    def num_channels(self) -> int:
        """Number of channels of the sound."""
        return self.sound.num_channels

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the samples from ``start`` to the end; see ``Sound``."""
        position = start
        entry = min(-self.start, self.num_samples)
        yield from self._silence(entry - position)
        position = max(position, entry)
        if position < self.num_samples and self.start + position < self.sound.num_samples:
            for block_CS in self.sound.blocks(self.start + position):
                kept_CS = block_CS[:, : self.num_samples - position]
                position += kept_CS.shape[1]
                yield kept_CS
                if position == self.num_samples:
                    return
        yield from self._silence(self.num_samples - position)

    def _silence(self, num_samples: int) -> Iterator[Tensor]:
        while num_samples > 0:
            yield torch.zeros(self.num_channels, min(num_samples, BLOCK_SAMPLES))
            num_samples -= BLOCK_SAMPLES


def cut(sound: Sound, start: Fraction, end: Fraction | None = None) -> Sound:
    """Cut a sound to the span between two times.

    Args:
        sound: sound of any length.
        start: seconds from its beginning, not negative.
        end: seconds from its beginning; None or a time after its end keeps all that follows.

    Returns:
        The span; the sound itself if nothing is cut off.

    Raises:
        AudioError: if nothing is left.
    """
    first = round(start * sound.sample_rate)
    last = sound.num_samples
    if end is not None:
        last = min(last, round(end * sound.sample_rate))
    if not 0 <= first < last:
        wanted = f"from {float(start):g} s" + (f" to {float(end):g} s" if end is not None else "")
        raise AudioError(
            f"nothing is left of {sound.num_samples / sound.sample_rate:g} s of sound {wanted}; "
            "let the start be 0 or later, before the end, and before the sound is over"
        )
    if (first, last) == (0, sound.num_samples):
        return sound
    return Span(sound=sound, start=first, num_samples=last - first)


def pieces(sound: Sound, num_samples: int) -> Iterator[Tensor]:
    """Read a whole sound in pieces of equal length.

    Args:
        sound: sound of any length.
        num_samples: length of each piece but the last.

    Yields:
        [C, num_samples]; the last piece may be shorter.
    """
    reader = SoundReader(sound)
    for start in range(0, sound.num_samples, num_samples):
        yield reader.read(start, min(start + num_samples, sound.num_samples))
