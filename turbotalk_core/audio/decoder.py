"""Decoding of the audio streams of media files.

Input: a local file, perhaps damaged or malicious. Output: frames, and gaps where packets could not
be decoded. The only module of this package that imports PyAV.

Axes: C channels, S audio samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from torch import Tensor

from ..errors import AudioError, TurboTalkError
from ..geometry import FPS, MAX_SAMPLE_RATE
from ..safe_io.media import check_tables, open_arguments
from ..safe_io.paths import is_file

_IN_STEP = Fraction(1, FPS)  # seconds by which sound and picture may be apart and begin together
_MOST_LATE = 60  # seconds; a later time is a place in a longer stream, not a late start
_MOST_LOST = Fraction(1)  # seconds per damaged packet, whose duration is not to be trusted
_STILL = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFacts:
    """Properties of an audio stream that its frames do not have.

    Attributes:
        is_pcm: whether samples are stored as they are, uncompressed.
        first_second: time of the first sample by the file's own timestamps; 0 if it has none.
        late_seconds: time for which a player plays silence before it.
    """

    is_pcm: bool
    first_second: Fraction
    late_seconds: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Samples that could not be decoded.

    Attributes:
        samples: their number, at most about a second of them.
    """

    samples: int


def rank_streams(path: str | Path) -> list[int]:
    """List the audio streams of a file that can be decoded, the one that players take first.

    Args:
        path: media file; see ``io.open_sound``.

    Returns:
        Numbers of the streams, counted from 0 among the audio streams: those with the default flag,
        then the others.

    Raises:
        AudioError: if the file is missing, damaged or no media file, or has no audio stream that
            can be decoded.
    """
    with _open(path) as container:
        streams = container.streams.audio
        # Without a decoder PyAV 16 crashes when it decodes.
        numbers = [n for n, stream in enumerate(streams) if stream.codec_context is not None]
        if not numbers:
            raise AudioError(
                f"the sound of {path} is in a format that cannot be decoded here; re-export it as "
                "wav, mp3, flac or m4a"
            )
        return sorted(numbers, key=lambda n: not streams[n].disposition & Disposition.default)


def describe_stream(path: str | Path, number: int) -> StreamFacts:
    """Find how the sound of a file is stored and when it begins.

    The sound of a video is late if it begins after the first picture, by a frame or more. Without
    a picture only mp4 and mov have a time at which playing begins, zero; other files may be parts
    of a longer stream.

    Args:
        path: media file; see ``io.open_sound``.
        number: number of the audio stream.

    Returns:
        The facts.

    Raises:
        AudioError: if the file is missing or damaged, or has no such stream.

    Source: ISO/IEC 14496-12, 8.6.6 (an empty edit delays a track).
    """
    with _open(path) as container:
        is_pcm = container.streams.audio[number].codec_context.name.startswith("pcm_")
        frame, lost_seconds = next(_decode_packets(container, number))
        first_second = late_seconds = Fraction(0)
        if frame is None or frame.pts is None or frame.time_base is None:
            return StreamFacts(is_pcm=is_pcm, first_second=first_second, late_seconds=late_seconds)
        first_second = frame.pts * frame.time_base - lost_seconds
        pictures = [s for s in container.streams.video if not s.disposition & _STILL]
        if pictures and pictures[0].start_time is not None and pictures[0].time_base is not None:
            late_seconds = first_second - pictures[0].start_time * pictures[0].time_base
        elif not pictures and "mp4" in container.format.name.split(","):
            late_seconds = first_second
        if not _IN_STEP <= late_seconds <= _MOST_LATE:
            late_seconds = Fraction(0)
        return StreamFacts(is_pcm=is_pcm, first_second=first_second, late_seconds=late_seconds)


def decode(path: str | Path, number: int, start: int = 0) -> Iterator[av.AudioFrame | Gap]:
    """Decode an audio stream from a sample on.

    Everything before ``start`` is decoded too, and dropped. Seeking would be faster, but some
    formats would then yield other samples than when they are read from the beginning.

    Args:
        path: media file; see ``io.open_sound``.
        number: number of the audio stream.
        start: first sample.

    Yields:
        Frames of about a second, all of one rate, layout and format; a gap for samples that could
        not be decoded. A gap may come before the first frame.

    Raises:
        AudioError: if the file is missing, damaged from beginning to end, changes its format, has
            no samples or no such stream, or claims a rate above ``MAX_SAMPLE_RATE``.
    """
    fifo, kinds, position, rate = av.AudioFifo(), set(), 0, 0
    with _open(path) as container:
        for frame, lost_seconds in _decode_packets(container, number):
            rate = rate if frame is None else frame.sample_rate
            if rate > MAX_SAMPLE_RATE:  # one second could take gigabytes
                raise AudioError(
                    f"{path} claims {rate} Hz; at most {MAX_SAMPLE_RATE} are read, so re-export it "
                    "at its true rate"
                )
            if lost_seconds:
                yield from _empty(fifo)
            for samples in _split(round(lost_seconds * rate), rate):
                position += samples
                if position > start:
                    yield Gap(samples=min(samples, position - start))
            if frame is None:
                break
            kinds.add((rate, frame.layout.nb_channels, frame.format.name))
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
            if fifo.samples >= rate:
                yield from _empty(fifo)
        yield from _empty(fifo)
    if not kinds:
        raise AudioError(f"the audio stream of {path} is empty; give at least 40 ms of sound")


def read_samples(frame: av.AudioFrame) -> Tensor:
    """Return the samples of a frame.

    Args:
        frame: frame of ``decode``.

    Returns:
        [C, S], in the type of the file.

    Raises:
        AudioError: if its type cannot be read.
    """
    try:
        samples = torch.from_numpy(frame.to_ndarray())
    except ValueError as error:
        raise AudioError(
            f"got samples of format {frame.format.name}, which cannot be read; re-export the audio "
            "with 16, 24 or 32 bits or floating point"
        ) from error
    if not frame.format.is_planar:  # one row of interleaved channels
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    return samples


@contextmanager
def _open(path: str | Path) -> Iterator[InputContainer]:
    """Open a local file that has sound; errors while it is open are raised as AudioError too."""
    if not is_file(Path(path)):
        raise AudioError(f"there is no audio file at {path}; give the path of a local file")
    try:
        with Path(path).open("rb") as file:
            check_tables(file)
        # "file:" and the allowed protocols keep a playlist from opening a network address, and a
        # file name with a colon from being taken for a protocol. Titles need not be UTF-8, and are
        # not used.
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


def _decode_packets(
    container: InputContainer, number: int
) -> Iterator[tuple[av.AudioFrame | None, Fraction]]:
    """Yield each frame, last None, with the seconds of damaged packets since the one before."""
    stream = container.streams.audio[number]
    lost_seconds, frame_seconds = Fraction(0), Fraction(0)
    last_error: FFmpegError | None = None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except FFmpegError as error:
            last_error = error
            seconds = (packet.duration or 0) * (packet.time_base or 0) or frame_seconds
            lost_seconds += min(Fraction(seconds), _MOST_LOST)
            continue
        for frame in frames:
            yield frame, lost_seconds
            lost_seconds, frame_seconds = Fraction(0), Fraction(frame.samples, frame.sample_rate)
    if last_error is not None and not frame_seconds:
        raise last_error
    yield None, lost_seconds


def _split(samples: int, most: int) -> Iterator[int]:
    while samples > 0:
        yield min(samples, most)
        samples -= most


def _empty(fifo: av.AudioFifo) -> Iterator[av.AudioFrame]:
    if fifo.samples and (frame := fifo.read()) is not None:
        yield frame
