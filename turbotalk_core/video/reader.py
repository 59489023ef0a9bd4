"""Reader of videos as sequences of pictures at 25 per second, decoded when they are accessed.

The video is a file on disk or in memory, with any frame rate, constant or variable. Separate
because it is the only module of this package that decodes files of other programs.

Axes: H height, W width, C channels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import av
import torch
from av.container import InputContainer
from av.error import FFmpegError
from torch import Tensor

from ..errors import ImageError, TurboTalkError
from ..fingerprints import digest_file
from ..geometry import FPS, MAX_FRAMES, count_frames
from ..safe_io.media import MAX_PIXELS, check_tables, media_options
from ..safe_io.paths import is_file

_ROUNDING = Fraction(1, 1000)  # seconds; Matroska rounds times to it, so durations may be short
_QUARTER = 90  # degrees


class VideoFrames(Sequence[Tensor]):
    """Pictures of a video resampled to 25 frames per second, each [H, W, 3], float32 in [0, 1].

    Picture i is the frame on the screen at i / 25 s, with the file's rotation applied. Their number
    is that of whole frames in the video's duration, give or take a millisecond, and at least one.
    Each picture is decoded when it is accessed, from the key frame before it. Memory holds the
    times of all frames and the last picture.

    Attributes:
        first_second: time of the file's first picture in seconds, which need not be 0.
    """

    def __init__(self, source: Path | BytesIO, *, every_frame: bool = False) -> None:
        """Read the times of all frames; nothing is decoded yet.

        Args:
            source: any codec that PyAV decodes, in a container of ``media.CONTAINERS``; a file is
                opened again for each picture, and must not be moved.
            every_frame: return every frame of the file, whatever its rate, as InfiniteTalk does;
                not those on the screen 25 times a second.

        Raises:
            ImageError: if the file is missing, damaged or no media file, it has no picture, or its
                duration exceeds ``MAX_FRAMES``.
        """
        self._source = source
        self._name = "the video" if isinstance(source, BytesIO) else str(source)
        self._check_tables()
        with self._open() as container:
            stream = container.streams.video[0]
            packets = sorted(
                (packet.pts, packet.duration or 0)
                for packet in container.demux(stream)
                if packet.pts is not None and not packet.is_discard
            )
            time_base, rate = stream.time_base, stream.average_rate
        if not packets or not time_base:
            raise ImageError(f"{self._name} shows no picture; give a video of at least one frame")
        self._times = [pts for pts, _ in packets]
        self.first_second = self._times[0] * time_base
        last_seconds = packets[-1][1] * time_base or 1 / (rate or Fraction(FPS))
        seconds = (self._times[-1] - self._times[0]) * time_base + last_seconds + _ROUNDING
        self._ticks_per_frame = None if every_frame else 1 / (FPS * time_base)
        self._last: tuple[int, Tensor] | None = None
        self._length = max(1, count_frames(seconds.numerator, seconds.denominator))
        if every_frame:
            self._length = len(self._times)
        if self._length > MAX_FRAMES:
            raise ImageError(
                f"{self._name} claims to last {float(seconds):.0f} s; at most "
                f"{MAX_FRAMES // FPS} s are read, so cut it or export it again"
            )

    def __len__(self) -> int:
        """Return the number of pictures."""
        return self._length

    # Single pictures only: a slice of a video could exceed the memory.
    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Decode a picture.

        Args:
            index: number of the picture; negative numbers count from the end.

        Returns:
            [H, W, 3], float32 in [0, 1]. Repeated access returns the same tensor: do not modify it.

        Raises:
            IndexError: if there are not so many pictures.
            ImageError: if the file is damaged or missing.
        """
        pts = self._find_time(range(len(self))[index])
        # The last picture is cached: size, regions and first chunk all need the same one.
        if self._last is None or self._last[0] != pts:
            self._last = pts, self._decode(pts)
        return self._last[1]

    def digest(self) -> str:
        """Return a digest of all bytes of the file and of the number and spacing of pictures.

        Returns:
            Hexadecimal digits.

        Raises:
            ImageError: if the file cannot be read.
        """
        hashed = blake2b(f"{self._length} {self._ticks_per_frame}".encode(), digest_size=16)
        if isinstance(self._source, BytesIO):
            hashed.update(self._source.getbuffer())
            return hashed.hexdigest()
        try:
            hashed.update(digest_file(self._source).encode())
        except OSError as error:
            raise ImageError(
                f"cannot read {self._name}: {error.strerror}; give the path of a local file"
            ) from error
        return hashed.hexdigest()

    def play(self, start: int, stop: int) -> Iterator[Tensor]:
        """Decode consecutive pictures in one pass, which is far faster than access to each.

        Args:
            start: first picture, 0 or more.
            stop: one past the last picture, at most the number of pictures.

        Yields:
            The pictures ``self[start]`` to ``self[stop - 1]``.

        Raises:
            ImageError: if the file is damaged or missing.
        """
        wanted = [self._find_time(index) for index in range(start, stop)]
        for seeks in (True, False) if wanted else ():
            with self._open() as container:
                stream = container.streams.video[0]
                if seeks:
                    with suppress(FFmpegError):
                        container.seek(wanted[0], stream=stream)
                frames = (frame for frame in container.decode(stream) if frame.pts is not None)
                following = next(frames, None)
                if following is None or (following.pts or 0) > wanted[0]:
                    continue
                pixels_HWC, pending = None, None
                for pts in wanted:
                    while following is not None and (following.pts or 0) <= pts:
                        pending, following = following, next(frames, None)
                    if pending is not None:
                        pixels_HWC, pending = _to_pixels(pending), None
                    assert pixels_HWC is not None  # the first frame came before the first picture
                    yield pixels_HWC
                return
        if wanted:
            raise ImageError(f"{self._name} is damaged; export it again")

    def _find_time(self, index: int) -> int:
        """Return the time of the frame that a picture shows, in the stream's time base."""
        if self._ticks_per_frame is None:
            return self._times[index]
        now = self._times[0] + index * self._ticks_per_frame
        return self._times[bisect_right(self._times, now) - 1]

    def _decode(self, pts: int) -> Tensor:
        """Decode the frame at a time, or the last before it if the file is damaged there."""
        for seeks in (True, False):  # some formats cannot seek, or seek to a later frame
            nearest = None
            with self._open() as container:
                stream = container.streams.video[0]
                if seeks:
                    with suppress(FFmpegError):
                        container.seek(pts, stream=stream)
                for frame in container.decode(stream):
                    if frame.pts is None or frame.pts > pts:
                        break
                    nearest = frame
                    if frame.pts == pts:
                        return _to_pixels(frame)
        if nearest is None:
            raise ImageError(f"{self._name} is damaged; export it again")
        return _to_pixels(nearest)

    def _check_tables(self) -> None:
        source = self._source
        try:
            if isinstance(source, BytesIO):
                check_tables(source)
            elif is_file(source):
                with source.open("rb") as file:
                    check_tables(file)
        except (OSError, ValueError) as error:
            raise ImageError(
                f"cannot read a video from {self._name}: {error}; export it again"
            ) from error

    @contextmanager
    def _open(self) -> Iterator[InputContainer]:
        source = self._source
        if isinstance(source, Path) and not is_file(source):
            raise ImageError(f"there is no video at {source}; give the path of a local file")
        # The allowed protocols keep a playlist on disk from opening a network address, and one in
        # memory from opening anything.
        if isinstance(source, BytesIO):
            source.seek(0)
            file, protocols = source, "none"
        else:
            file, protocols = f"file:{source}", "file"
        try:
            # Titles need not be UTF-8, and are not used.
            options = media_options(protocols)
            with av.open(file, "r", options=options, metadata_errors="replace") as container:
                if not container.streams.video:
                    raise ImageError(f"{self._name} has sound alone; give a video with a picture")
                context = container.streams.video[0].codec_context
                if context is None:
                    raise ImageError(f"{self._name} is in a format that cannot be decoded")
                context.options = {"max_pixels": options["max_pixels"]}  # for the decoder as well
                yield container
        except TurboTalkError:
            raise
        # FFmpeg's errors, and those that PyAV raises on damaged files.
        except (FFmpegError, ValueError, LookupError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, FFmpegError) else error
            raise ImageError(
                f"cannot read a video from {self._name}: {reason}; give an mp4, mov, mkv or webm "
                f"file of at most {MAX_PIXELS} pixels a frame"
            ) from error


def _to_pixels(frame: av.VideoFrame) -> Tensor:
    pixels_HWC = torch.from_numpy(frame.to_ndarray(format="rgb24")).float().div_(255)
    return pixels_HWC.rot90(round(frame.rotation / _QUARTER))
