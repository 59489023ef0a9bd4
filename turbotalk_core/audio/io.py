"""Input of sound from media files and from memory.

A file becomes a ``Sound`` that is decoded each time it is read, or a ``Waveform`` in memory;
samples of any type become a ``Waveform``. Separate because it alone decides what is done with
sounds that are late, damaged, out of range or one of several in a file.

Axes: C channels, S audio samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AudioError
from ..fingerprints import digest_file
from ..geometry import FPS, MAX_FRAMES, MAX_SAMPLES, SAMPLE_RATE, count_frames
from ..sound import BLOCK_SAMPLES, Note, Sound, log_note
from ..types import Waveform
from .decoder import Gap, decode, describe_stream, rank_streams, read_samples

MOST_LOST = Fraction(1, 2)  # of the samples; more damage makes a file useless
SILENT_PEAK = 1e-4  # -80 dB, under the noise of any recording
FULL_SCALE = 1.001  # peak up to which nothing is clipped, with room for rounding
OVERSHOOT = 1.5  # peak that decoders of lossy formats reach with loud music
# Floating-point samples with a higher peak, 24 dB over full scale, are integers of one of these
# ranges: many programs convert types without scaling.
MOST_OVER = 16.0
INTEGER_RANGES = (2.0**7, 2.0**15, 2.0**23, 2.0**31)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSound:
    """Sound of a file, decoded each time it is read; a ``Sound``, made by ``open_sound``.

    Attributes:
        path: media file; see ``open_sound``.
        sample_rate: sample rate, Hz.
        num_channels: number of channels in the file.
        num_samples: samples per channel; the file may be longer, but no more is read.
        stream: number of the stream among the audio streams of the file.
        num_silent: samples of silence before those of the file, if they begin late.
        full_scale: value in the file that becomes 1.
        first_second: time of the first sample of the file by its own timestamps, which rarely
            differs from that of the first picture; 0 if it has no timestamps.
    """

    path: Path
    sample_rate: int
    num_channels: int
    num_samples: int
    stream: int = 0
    num_silent: int = 0
    full_scale: float = 1.0
    first_second: Fraction = Fraction(0)

    @property
    def num_frames(self) -> int:
        """Whole video frames that this sound covers."""
        return count_frames(self.num_samples, self.sample_rate)

    def digest(self) -> str:
        """Return a digest of all bytes of the file and of the part that is read.

        Returns:
            Digest of the file, sample rate, channels and samples, separated by spaces; and the
            stream and the full scale if they are not the usual ones.

        Raises:
            AudioError: if the file cannot be read.
        """
        try:
            content = digest_file(self.path)
        except OSError as error:
            raise AudioError(
                f"cannot read {self.path}: {error.strerror}; give the path of a local file"
            ) from error
        digest = f"{content} {self.sample_rate} {self.num_channels} {self.num_samples}"
        if (self.stream, self.full_scale) != (0, 1.0):
            digest += f" {self.stream} {self.full_scale}"
        return digest

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the samples from ``start`` to the end; see ``Sound`` and ``decoder.decode``.

        Args:
            start: first sample.

        Yields:
            Blocks of samples, [C, S].

        Raises:
            AudioError: if the file changed since it was opened.
        """
        position, num_silent = start, min(self.num_silent, self.num_samples)
        while position < num_silent:
            block_CS = torch.zeros(self.num_channels, min(num_silent - position, BLOCK_SAMPLES))
            position += block_CS.shape[1]
            yield block_CS
        if position >= self.num_samples:
            return
        for part in decode(self.path, self.stream, position - num_silent):
            if isinstance(part, Gap):
                samples_CS = torch.zeros(self.num_channels, part.samples)
            else:
                samples_CS = _to_float(read_samples(part))
                if (part.sample_rate, len(samples_CS)) != (self.sample_rate, self.num_channels):
                    break
            samples_CS = samples_CS[:, : self.num_samples - position]
            position += samples_CS.shape[1]
            yield samples_CS if self.full_scale == 1 else samples_CS / self.full_scale
            if position == self.num_samples:
                return
        raise AudioError(f"{self.path} changed while it was in use; start again")


def open_sound(
    path: str | Path, end: Fraction | None = None, *, on_note: Note = log_note
) -> FileSound:
    """Open the sound of a local file, as a player plays it.

    Of several audio streams this is the one with the default flag, else the first; one that is
    silent is left out if another is not. A sound that begins after the first picture has silence
    before it, and so have packets that cannot be decoded. Floating-point samples in the range of
    integers are scaled to [-1, 1]. A note says so in each case.

    The whole stream is decoded once, without keeping the samples: only this yields the exact length
    and proves that it can be decoded.

    Args:
        path: any codec that PyAV decodes, in a container of ``media.CONTAINERS``: wav, mp3,
            flac, m4a, ogg, opus, or the sound of mp4, mov, mkv, webm, and others.
        end: seconds after which nothing is needed; None for all.
        on_note: called with each note.

    Returns:
        All channels at the file's own rate. Padding that the encoder added at the start or the end
        is dropped if the file declares it. Peaks of lossy formats may exceed 1 slightly.

    Raises:
        AudioError: if the file is missing, damaged for the most part or no media file, it has no
            audio stream that can be decoded, the stream is empty or longer than ``MAX_FRAMES``, or
            its samples are not finite or in no known range.
    """
    numbers = rank_streams(path)
    if len(numbers) == 1:
        scan = _scan(path, numbers[0], end)
    else:
        scan = _find_audible(_scan(path, number, end, measures_all=True) for number in numbers)
        on_note(
            f"{path} has {len(numbers)} audio streams, of which number {scan.sound.stream + 1} is "
            + ("used; " if scan.sound.stream == numbers[0] else "used, as others are silent; ")
            + "to use another, export it alone"
        )
    sound = scan.sound
    if sound.num_silent:
        on_note(
            f"the sound of {path} begins late: before it there are "
            f"{sound.num_silent / sound.sample_rate:.2f} s of silence, as in a player"
        )
    _note_gaps(scan, on_note)
    limit = FULL_SCALE if scan.is_pcm else OVERSHOOT
    full_scale = _find_full_scale(scan.peak, limit, str(path), on_note)
    return replace(sound, full_scale=full_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scan:
    """A sound, and what was found when all of it was decoded.

    Attributes:
        sound: the sound, with the full scale of ordinary files.
        peak: largest absolute sample; of integers only if it was asked for.
        is_pcm: whether the samples are stored as they are.
        gaps: first sample and length of each gap.
    """

    sound: FileSound
    peak: float
    is_pcm: bool
    gaps: list[tuple[int, int]]


def _find_audible(scans: Iterable[_Scan]) -> _Scan:
    """Return the first scan that is not of a silent sound; the first of all if all are silent."""
    first = None
    for scan in scans:
        if scan.peak > SILENT_PEAK:
            return scan
        first = first or scan
    assert first is not None  # there are several
    return first


def _scan(
    path: str | Path, number: int, end: Fraction | None, *, measures_all: bool = False
) -> _Scan:
    facts = describe_stream(path, number)
    sound, peak, num_samples = None, 0.0, 0
    gaps: list[tuple[int, int]] = []
    for part in decode(path, number):
        if isinstance(part, Gap):
            gaps.append((num_samples, part.samples))
        # Integer samples are always finite, so the first block is enough to check their format.
        elif sound is None or measures_all or part.format.name.startswith(("flt", "dbl")):
            samples_CS = _to_float(read_samples(part))
            Waveform(samples_CS=samples_CS, sample_rate=part.sample_rate)
            peak = max(peak, _find_peak(samples_CS))
            sound = sound or FileSound(
                path=Path(path),
                sample_rate=part.sample_rate,
                num_channels=samples_CS.shape[0],
                num_samples=0,
                stream=number,
                num_silent=round(facts.late_seconds * part.sample_rate),
                first_second=facts.first_second,
            )
        num_samples += part.samples
        if sound is None:  # damaged from the start on
            continue
        sound = replace(sound, num_samples=sound.num_silent + num_samples)
        # Checked while decoding: a file of kilobytes can hold days of silence.
        if sound.num_frames > MAX_FRAMES:
            raise AudioError(
                f"{path} lasts longer than {MAX_FRAMES // FPS} s, which is all that is read; "
                "export a part of it"
            )
        if end is not None and sound.num_samples >= (most := round(end * sound.sample_rate)):
            sound = replace(sound, num_samples=max(1, most))
            break
    assert sound is not None  # for an empty stream decode raises
    if sum(samples for _, samples in gaps) > MOST_LOST * num_samples:
        raise AudioError(
            f"more than half of the sound of {path} is damaged; get another copy of it"
        )
    return _Scan(sound=sound, peak=peak, is_pcm=facts.is_pcm, gaps=gaps)


def _note_gaps(scan: _Scan, on_note: Note) -> None:
    if not scan.gaps:
        return
    rate, ends = scan.sound.sample_rate, {sum(gap) for gap in scan.gaps}
    places = [start for start, _ in scan.gaps if start not in ends]
    first_second = (scan.sound.num_silent + places[0]) / rate
    num_lost = sum(samples for _, samples in scan.gaps)
    on_note(
        f"{scan.sound.path} is damaged: {num_lost / rate:.2f} s of it are silence, "
        + (f"in {len(places)} places, the first " if len(places) > 1 else "")
        + f"at {first_second:.2f} s"
    )


def read_audio(path: str | Path) -> Waveform:
    """Decode the first audio stream of a local file into memory.

    Args:
        path: media file; see ``open_sound``.

    Returns:
        All channels at the file's own rate; see ``open_sound``.

    Raises:
        AudioError: as for ``open_sound`` and ``to_waveform``.
    """
    return to_waveform(open_sound(path))


def to_waveform(sound: Sound) -> Waveform:
    """Load a whole sound into memory.

    Args:
        sound: sound of at most ``MAX_SAMPLES`` samples, all channels together, at 16 kHz or at its
            own rate, whichever is higher.

    Returns:
        The samples; the sound itself if it is in memory already.

    Raises:
        AudioError: if the sound is longer.
    """
    if isinstance(sound, Waveform):
        return sound
    num_all = sound.num_samples * sound.num_channels * max(1, SAMPLE_RATE // sound.sample_rate)
    if num_all > MAX_SAMPLES:
        raise AudioError(
            f"got more than {MAX_SAMPLES} samples, {sound.sample_rate} a second in "
            f"{sound.num_channels} channels; more is not held in memory, so let it be heard in "
            "sections, or export a part of it or fewer channels"
        )
    return Waveform(
        samples_CS=torch.cat(list(sound.blocks()), dim=1), sample_rate=sound.sample_rate
    )


def from_samples(samples: Tensor, sample_rate: int, *, on_note: Note = log_note) -> Waveform:
    """Convert samples in memory to a waveform.

    Floating-point samples in the range of integers are scaled to [-1, 1], as ``open_sound`` does.

    Args:
        samples: [S], [C, S] or [1, C, S]; floating point in [-1, 1], or integers, for which the
            range of their type is scaled to [-1, 1] (for unsigned types, with zero in the middle).
        sample_rate: sample rate, Hz.
        on_note: called with each note.

    Returns:
        The waveform, float32 on the CPU.

    Raises:
        AudioError: if the shape (such as a batch) or the type is another, there are no samples, or
            a sample is not finite or in no known range.
    """
    shape = tuple(samples.shape)
    if samples.ndim == 3 and shape[0] == 1:
        samples = samples[0]
    elif samples.ndim == 1:
        samples = samples[None]
    if samples.ndim != 2:
        raise AudioError(
            f"got samples of shape {shape}; one sound is [samples], [channels, samples] or "
            "[1, channels, samples], so pass a batch one by one"
        )
    waveform = Waveform(samples_CS=_to_float(samples), sample_rate=sample_rate)
    peak = _find_peak(waveform.samples_CS)
    full_scale = _find_full_scale(peak, OVERSHOOT, "the audio", on_note)
    if full_scale == 1:
        return waveform
    return replace(waveform, samples_CS=waveform.samples_CS / full_scale)


def _to_float(samples: Tensor) -> Tensor:
    if samples.is_floating_point():
        return samples.detach().to("cpu", torch.float32)
    if samples.dtype == torch.bool or samples.is_complex():
        raise AudioError(
            f"got samples of type {samples.dtype}; floating point or integer samples are allowed"
        )
    info = torch.iinfo(samples.dtype)
    half_range = 2.0 ** (info.bits - 1)
    middle = 1.0 if info.min == 0 else 0.0
    return samples.to("cpu", torch.float32) / half_range - middle


def _find_peak(samples_CS: Tensor) -> float:
    return max(abs(float(edge)) for edge in samples_CS.aminmax())


def _find_full_scale(peak: float, limit: float, name: str, on_note: Note) -> float:
    """Return the value that is full scale in a sound with this peak; note if it is clipped."""
    if peak <= limit:
        return 1.0
    if peak <= MOST_OVER:
        on_note(
            f"{name} reaches {peak:.2f}, where 1 is full scale: what is louder is clipped when "
            "the video is played; export it at a lower level"
        )
        return 1.0
    for full_scale in INTEGER_RANGES:
        if peak <= full_scale:
            on_note(
                f"{name} has floating-point samples up to {peak:.0f}, where 1 is full scale: they "
                f"are divided by {full_scale:.0f}, as integers in floating point"
            )
            return full_scale
    raise AudioError(
        f"{name} has samples up to {peak:.3g}, where 1 is full scale; re-export it from its editor"
    )
