"""Sounds in blocks of any lengths against slices of one tensor."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from weakref import ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from turbotalk_core.errors import AudioError
from turbotalk_core.sound import Sound, SoundReader, Span, cut, pieces
from turbotalk_core.types import Waveform

LENGTH = 40


@dataclass(frozen=True)
class Chopped:
    """A ``Sound`` whose blocks have the lengths it is told, over and over."""

    samples_CS: Tensor
    lengths: tuple[int, ...]
    sample_rate: int = 10
    starts: list[int] = field(default_factory=list)

    @property
    def num_channels(self) -> int:
        return self.samples_CS.shape[0]

    @property
    def num_samples(self) -> int:
        return self.samples_CS.shape[1]

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        self.starts.append(start)
        while start < self.num_samples:
            for length in self.lengths:
                yield self.samples_CS[:, start : start + length]
                start += length


def read(sound: Sound, start: int = 0) -> Tensor:
    """All samples from one on."""
    return torch.cat([torch.zeros(sound.num_channels, 0), *sound.blocks(start)], dim=1)


@st.composite
def chopped(draw: st.DrawFn) -> Chopped:
    samples_CS = 1 + torch.arange(2 * LENGTH, dtype=torch.float32).view(2, LENGTH)
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
    return Chopped(samples_CS, tuple(lengths))


def _slice(samples_CS: Tensor, start: int, stop: int) -> Tensor:
    """What lies between two moments, silence where there is no sound."""
    wide_CS = torch.nn.functional.pad(samples_CS, (100, 100))
    return wide_CS[:, 100 + start : 100 + stop]


@given(chopped(), st.lists(st.tuples(st.integers(-20, 60), st.integers(0, 30)), max_size=8))
def test_any_stretches_in_any_order_are_slices(
    sound: Chopped, wanted: list[tuple[int, int]]
) -> None:
    reader = SoundReader(sound)
    for start, length in wanted:
        stretch_CS = reader.read(start, start + length)
        assert torch.equal(stretch_CS, _slice(sound.samples_CS, start, start + length))


def test_going_on_reads_a_sound_once() -> None:
    sound = Chopped(torch.ones(1, LENGTH), (7,))
    reader = SoundReader(sound)
    for start in range(0, LENGTH, 3):
        reader.read(start, start + 5)  # overlapping, as sections do
    assert sound.starts == [0]
    reader.read(0, 1)
    assert sound.starts == [0, 0]


@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 12))
def test_a_reader_holds_what_was_asked_for_and_one_block(
    block: int, length: int, step: int
) -> None:
    class Watched(Chopped):
        def blocks(self, start: int = 0) -> Iterator[Tensor]:
            for block_CS in super().blocks(start):
                copy_CS = block_CS.clone()
                held.append(ref(copy_CS))
                yield copy_CS

    def count(block: ref[Tensor]) -> int:
        block_CS = block()
        return 0 if block_CS is None else block_CS.shape[1]

    held: list[ref[Tensor]] = []
    reader = SoundReader(Watched(torch.ones(1, 4 * LENGTH), (block,)))
    for start in range(0, 4 * LENGTH, step):
        reader.read(start, start + length)
        assert sum(map(count, held)) <= length + 2 * block


def test_after_an_error_a_sound_is_read_anew() -> None:
    class Failing(Chopped):
        def blocks(self, start: int = 0) -> Iterator[Tensor]:
            for block_CS in super().blocks(start):
                if len(self.starts) == 1:
                    raise AudioError("the file is gone")
                yield block_CS

    reader = SoundReader(Failing(torch.ones(1, LENGTH), (7,)))
    with pytest.raises(AudioError, match="is gone"):
        reader.read(0, 9)
    assert torch.equal(reader.read(0, 9), torch.ones(1, 9))


@given(chopped(), st.integers(-15, 50), st.integers(1, 70), st.integers(0, 70))
def test_a_span_is_a_slice_from_wherever_it_is_read(
    sound: Chopped, start: int, num_samples: int, begin: int
) -> None:
    span = Span(sound=sound, start=start, num_samples=num_samples)
    assert (span.num_channels, span.sample_rate) == (2, 10)
    expected_CS = _slice(sound.samples_CS, start, start + num_samples)
    assert torch.equal(read(span), expected_CS)
    begin = min(begin, num_samples)
    assert torch.equal(read(span, begin), expected_CS[:, begin:])


def test_silence_of_hours_comes_in_blocks() -> None:
    span = Span(sound=Chopped(torch.ones(1, 2), (1,)), start=-(10**7), num_samples=2 * 10**7)
    assert max(block_CS.shape[1] for block_CS in span.blocks()) < 10**5
    assert sum(block_CS.sum().item() for block_CS in span.blocks()) == 2


@given(chopped(), st.integers(1, 50))
def test_pieces_tile_a_sound(sound: Chopped, num_samples: int) -> None:
    parts = list(pieces(sound, num_samples))
    assert all(part_CS.shape[1] == num_samples for part_CS in parts[:-1])
    assert torch.equal(torch.cat(parts, dim=1), sound.samples_CS)


@given(st.integers(1, 200_000), st.integers(0, 200_000))
def test_a_waveform_is_a_sound(num_samples: int, start: int) -> None:
    samples_CS = torch.arange(2 * num_samples, dtype=torch.float32).view(2, -1)
    waveform = Waveform(samples_CS=samples_CS, sample_rate=10)
    assert (waveform.num_channels, waveform.num_samples) == (2, num_samples)
    assert torch.equal(read(waveform, start), samples_CS[:, start:])
    assert all(block_CS._is_view() for block_CS in waveform.blocks())


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ("0", None, (0, 40)),
        ("0", "9", (0, 40)),
        ("1.5", None, (15, 40)),
        ("0.25", "0.35", (2, 4)),  # to the nearest sample, in case of doubt the even one
        ("3.9", "4", (39, 40)),
    ],
)
def test_a_cut_keeps_what_lies_between(
    start: str, end: str | None, expected: tuple[int, int]
) -> None:
    sound = Chopped(torch.arange(40.0)[None], (3,))
    kept = cut(sound, Fraction(start), None if end is None else Fraction(end))
    assert torch.equal(read(kept), sound.samples_CS[:, slice(*expected)])
    assert (kept is sound) == (expected == (0, 40))


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [("4", None, "4 s of sound from 4 s;"), ("2", "2", "from 2 s to 2 s"), ("-1", None, "from -1")],
)
def test_a_cut_that_leaves_nothing_is_refused(start: str, end: str | None, message: str) -> None:
    sound = Chopped(torch.zeros(1, 40), (3,))
    with pytest.raises(AudioError, match=message):
        cut(sound, Fraction(start), None if end is None else Fraction(end))
