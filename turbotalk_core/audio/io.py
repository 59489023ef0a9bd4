"""Input of sound from media files and from memory.

A file becomes a ``Sound`` that is decoded each time it is read, or a ``Waveform`` in memory;
samples of any type become a ``Waveform``. The only module of this package that decodes media.

Axes: C channels, S audio samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import torch
from av.container import InputContainer
from av.error import FFmpegError
from torch import Tensor

from ..errors import AudioError, TurboTalkError
from ..fingerprints import digest_file
from ..geometry import FPS, MAX_FRAMES, MAX_SAMPLE_RATE, MAX_SAMPLES, SAMPLE_RATE, count_frames
from ..safe_io.media import check_tables, open_arguments
from ..safe_io.paths import is_file
from ..sound import Sound
from ..types import Waveform


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSound:
    """Sound of a file, decoded each time it is read; a ``Sound``, made by ``open_sound``.

    Attributes:
        path: media file; see ``open_sound``.
        sample_rate: sample rate, Hz.
        num_channels: number of channels in the file.
        num_samples: samples per channel; the file may be longer, but no more is read.
    """

    path: Path
    sample_rate: int
    num_channels: int
    num_samples: int

    @property
    def num_frames(self) -> int:
        """Whole video frames that this sound covers."""
        return count_frames(self.num_samples, self.sample_rate)

    def digest(self) -> str:
        """Return a digest of all bytes of the file and of the part that is read.

        Returns:
            Digest of the file, sample rate, channels and samples, separated by spaces.

        Raises:
            AudioError: if the file cannot be read.
        """
        try:
            content = digest_file(self.path)
        except OSError as error:
            raise AudioError(
                f"cannot read {self.path}: {error.strerror}; give the path of a local file"
            ) from error
        return f"{content} {self.sample_rate} {self.num_channels} {self.num_samples}"

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the samples from ``start`` to the end; see ``Sound``.

        Everything before ``start`` is decoded too, and dropped. Seeking would be faster, but some
        formats would then yield other samples than when they are read from the beginning.

        Args:
            start: first sample.

        Yields:
            Blocks of samples, [C, S].

        Raises:
            AudioError: if the file changed since it was opened.
        """
        if (position := start) >= self.num_samples:
            return
        for frame in _decode(self.path, start):
            samples_CS = _read_frame(frame)[:, : self.num_samples - position]
            if (frame.sample_rate, samples_CS.shape[0]) != (self.sample_rate, self.num_channels):
                break
            position += samples_CS.shape[1]
            yield samples_CS
            if position == self.num_samples:
                return
        raise AudioError(f"{self.path} changed while it was in use; start again")


def open_sound(path: str | Path, end: Fraction | None = None) -> FileSound:
    """Open the first audio stream of a local file.

    The whole stream is decoded once, without keeping the samples: only this yields the exact length
    and proves that it can be decoded.

    Args:
        path: any codec that PyAV decodes, in a container of ``media.CONTAINERS``: wav, mp3,
            flac, m4a, ogg, opus, or the sound of mp4, mov, mkv, webm, and others.
        end: seconds after which nothing is needed; None for all.

    Returns:
        All channels at the file's own rate. Padding that the encoder added at the start or the end
        is dropped if the file declares it. Peaks of lossy formats may exceed 1 slightly.

    Raises:
        AudioError: if the file is missing, damaged or no media file, it has no audio stream, the
            stream is empty or longer than ``MAX_FRAMES``, or its samples are not finite.
    """
    kept, num_samples = None, 0
    for frame in _decode(path):
        # Integer samples are always finite, so the first block is enough to check their format.
        if kept is None or frame.format.name.startswith(("flt", "dbl")):
            Waveform(samples_CS=_read_frame(frame), sample_rate=frame.sample_rate)
        num_samples += frame.samples
        kept = FileSound(
            path=Path(path),
            sample_rate=frame.sample_rate,
            num_channels=frame.layout.nb_channels,
            num_samples=num_samples,
        )
        # Checked while decoding: a file of kilobytes can hold days of silence.
        if kept.num_frames > MAX_FRAMES:
            raise AudioError(
                f"{path} lasts longer than {MAX_FRAMES // FPS} s, which is all that is read; "
                "export a part of it"
            )
        if end is not None and num_samples >= (most := max(1, round(end * frame.sample_rate))):
            return replace(kept, num_samples=most)
    assert kept is not None  # for an empty stream _decode raises
    return kept


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


def read_first_second(path: str | Path) -> Fraction:
    """Return the time at which the sound of a file begins, by the file's own timestamps.

    In a video file it rarely differs from the time of the first picture.

    Args:
        path: media file; see ``open_sound``.

    Returns:
        Time of the first sample that ``open_sound`` reads, in seconds; 0 if the file has no
        timestamps.

    Raises:
        AudioError: if the file is missing or damaged, or has no audio stream.
    """
    with _open(path) as container:
        first = next(container.decode(audio=0), None)
        if first is None or first.pts is None or first.time_base is None:
            return Fraction(0)
        return first.pts * first.time_base


def from_samples(samples: Tensor, sample_rate: int) -> Waveform:
    """Convert samples in memory to a waveform.

    Args:
        samples: [S], [C, S] or [1, C, S]; floating point in [-1, 1], or integers, for which the
            range of their type is scaled to [-1, 1] (for unsigned types, with zero in the middle).
        sample_rate: sample rate, Hz.

    Returns:
        The waveform, float32 on the CPU.

    Raises:
        AudioError: if the shape (such as a batch) or the type is another, there are no samples, or
            a sample is not finite.
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
    return Waveform(samples_CS=_to_float(samples), sample_rate=sample_rate)


@contextmanager
def _open(path: str | Path) -> Iterator[InputContainer]:
    """Open a local file that has sound; errors while it is open are raised as AudioError too."""
    if not is_file(Path(path)):
        raise AudioError(f"there is no audio file at {path}; give the path of a local file")
    try:
        with Path(path).open("rb") as file:
            check_tables(file)
        # "file:" and the allowed protocols keep a playlist from opening a network address, and a
        # file name with a colon from being taken for a protocol.
        with av.open(f"file:{path}", **open_arguments("file")) as container:
            if not container.streams.audio:
                raise AudioError(
                    f"{path} has no audio stream; give a recording, or a video with sound"
                )
            yield container
    except TurboTalkError:
        raise
    # FFmpeg's errors, and those that PyAV raises on damaged files.
    except (FFmpegError, OSError, ValueError, LookupError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, FFmpegError) else error
        raise AudioError(
            f"{path} cannot be decoded as audio ({reason}); re-export it as wav, mp3, flac or m4a"
        ) from error


def _decode(path: str | Path, start: int = 0) -> Iterator[av.AudioFrame]:
    """Decode from a sample on, in frames of about a second with one rate, layout and format."""
    fifo, kinds, position = av.AudioFifo(), set(), 0
    with _open(path) as container:
        for frame in container.decode(audio=0):
            kinds.add((frame.sample_rate, frame.layout.nb_channels, frame.format.name))
            if frame.sample_rate > MAX_SAMPLE_RATE:  # one second could take gigabytes
                raise AudioError(
                    f"{path} claims {frame.sample_rate} Hz; at most {MAX_SAMPLE_RATE} are read, so "
                    "re-export it at its true rate"
                )
            if len(kinds) > 1:
                raise AudioError(
                    f"{path} changes its sample rate, channel count or sample format on the way: "
                    f"they are {sorted(kinds)}; re-export it with one of them"
                )
            skipped = start - position
            position += frame.samples
            if position <= start:
                continue
            frame.pts = None  # with times, the queue refuses gaps between frames
            fifo.write(frame)
            if skipped > 0:
                fifo.read(skipped)
            if fifo.samples >= frame.sample_rate:
                yield from _empty(fifo)
        yield from _empty(fifo)
    if not kinds:
        raise AudioError(f"the audio stream of {path} is empty; give at least 40 ms of sound")


def _empty(fifo: av.AudioFifo) -> Iterator[av.AudioFrame]:
    if fifo.samples and (frame := fifo.read()) is not None:
        yield frame


def _read_frame(frame: av.AudioFrame) -> Tensor:
    """Return the samples of a frame, float32 [C, S]."""
    try:
        samples = torch.from_numpy(frame.to_ndarray())
    except ValueError as error:
        raise AudioError(
            f"got samples of format {frame.format.name}, which cannot be read; re-export the audio "
            "with 16, 24 or 32 bits or floating point"
        ) from error
    if not frame.format.is_planar:  # one row of interleaved channels
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    return _to_float(samples)


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
