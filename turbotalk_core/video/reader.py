"""Reader of videos as sequences of pictures at 25 per second, decoded when they are accessed.

The video is a file on disk or in memory, with any frame rate, constant or variable. Separate
because it is the only module of this package that opens files of other programs.

Axes: H height, W width, C channels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from hashlib import blake2b
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from typing import cast

import av
from av import VideoStream
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from torch import Tensor

from ..errors import ImageError, TurboTalkError
from ..fingerprints import digest_file
from ..geometry import FPS, MAX_FRAMES, count_frames
from ..safe_io.media import MAX_PIXELS, check_tables, media_options, open_arguments
from ..safe_io.paths import is_file
from .pixels import BT601, Appearance, guess_matrix

_ROUNDING = Fraction(1, 1000)  # seconds; Matroska rounds times to it, so durations may be short
MAX_ASPECT = 8  # of a pixel, or its inverse; no camera or format exceeds 3
_PROBED = 33  # frames; twice as many as H.264 and H.265 reorder, and one
# Brands of pictures in a file like mp4: HEIF with HEVC or AV1, ISO/IEC 23008-12.
_PHOTO_BRANDS = ("mif1", "mif2", "msf1", "miaf", "heic", "heix", "heim", "heis", "avif", "avis")
_EXTRAS = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
# MPEG program streams and bare streams state few times or none. FFmpeg counts on from the last one,
# and is wrong after seeking.
_COUNTED = ("mpeg", "mpegvideo", "m4v")
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own ignore transparency


class VideoFrames(Sequence[Tensor]):
    """Pictures of a video resampled to 25 frames per second, each [H, W, 3], float32 in [0, 1].

    Picture i is the frame on the screen at i / 25 s as a player shows it: turned, mirrored, with
    square pixels, in the colours that the file states, on white where it is transparent. Their
    number is that of whole frames in the video's duration, give or take a millisecond, and at least
    one. Each picture is decoded when it is accessed, from the key frame before it. Memory holds the
    times of all frames and the last picture.

    Of several video streams the one is read that players choose: the first that is marked as
    default, or the first. Cover pictures and thumbnails are not video.

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
        with self._open() as (container, stream):
            packets = [
                (packet.pts, packet.duration or 0)
                for packet in container.demux(stream)
                if packet.pts is not None and not packet.is_discard
            ]
            time_base, rate = stream.time_base, stream.average_rate
            may_reorder = bool(stream.codec_context.has_b_frames)
            may_seek = container.format.name not in _COUNTED
            self._appearance = self._find_appearance(container, stream)
        is_in_order = all(now <= later for now, later in pairwise(packets))
        packets.sort()
        if not packets or not time_base:
            raise ImageError(f"{self._name} shows no picture; give a video of at least one frame")
        # AVI stores no times. FFmpeg then gives the n-th packet the n-th time, and frames that are
        # stored in another order than shown come out with times out of order.
        self._lacks_times = False
        self._lacks_times = may_reorder and is_in_order and self._are_times_mixed_up()
        self._may_seek = may_seek and not self._lacks_times
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
            self._last = pts, next(self._show([pts]))
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
        if wanted:
            yield from self._show(wanted)

    def _find_time(self, index: int) -> int:
        """Return the time of the frame that a picture shows, in the stream's time base."""
        if self._ticks_per_frame is None:
            return self._times[index]
        now = self._times[0] + index * self._ticks_per_frame
        return self._times[bisect_right(self._times, now) - 1]

    def _show(self, wanted: Sequence[int]) -> Iterator[Tensor]:
        """Decode the frames at rising times, or the last before each if the file is damaged there.

        Decoding starts at the key frame before the first time, or at the beginning if the frame of
        that time is not found so: some formats cannot seek, or seek to a later frame.
        """
        for seeks in (True, False) if self._may_seek else (False,):
            with self._open() as (container, stream):
                if seeks:
                    with suppress(FFmpegError):
                        container.seek(wanted[0], stream=stream)
                frames = self._decode(container, stream)
                current = following = pixels_HWC = None
                for pts in wanted:
                    while current is None or current[0] < pts:
                        following = following or next(frames, None)
                        if following is None or following[0] > pts:
                            break
                        current, following, pixels_HWC = following, None, None
                    if current is None or (seeks and pts == wanted[0] and current[0] != pts):
                        break
                    if pixels_HWC is None:
                        pixels_HWC = self._appearance.to_pixels(current[1])
                    yield pixels_HWC
                else:
                    return
        raise ImageError(f"{self._name} is damaged; export it again")

    def _decode(
        self, container: InputContainer, stream: VideoStream
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decode a stream from the current position on; yield frames with their times."""
        frames = _decode_frames(container, stream)
        if self._lacks_times:
            return zip(self._times, frames, strict=False)
        return ((frame.pts, frame) for frame in frames if frame.pts is not None)

    def _are_times_mixed_up(self) -> bool:
        """Check whether the first frames are decoded with falling times."""
        times: list[int] = []
        # Damage is reported when the picture is needed.
        with suppress(ImageError), self._open() as (container, stream):
            times.extend(pts for pts, _ in islice(self._decode(container, stream), _PROBED))
        return any(now > later for now, later in pairwise(times))

    def _find_appearance(self, container: InputContainer, stream: VideoStream) -> Appearance:
        """Find how frames of a stream are shown, and check that they can be."""
        context = stream.codec_context
        aspect = stream.sample_aspect_ratio or Fraction(1)  # 0 or none means unknown
        width, height = context.width, context.height
        if not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
            raise ImageError(
                f"{self._name} claims that its pixels are {float(aspect):g} times as wide as high; "
                f"at most {MAX_ASPECT} are allowed, so export it again with square pixels"
            )
        if width * height * max(aspect, 1 / aspect) > MAX_PIXELS:
            raise ImageError(
                f"{self._name} has {width}x{height} pixels, each {float(aspect):g} times as wide "
                f"as high; at most {MAX_PIXELS} square ones are read, so make it smaller"
            )
        matrix = BT601 if _is_photo(container) else guess_matrix(width, height)
        return Appearance(aspect=aspect, transfer=context.color_trc, matrix=matrix)

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
    def _open(self) -> Iterator[tuple[InputContainer, VideoStream]]:
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
            with av.open(file, "r", **open_arguments(protocols)) as container:
                stream = self._choose_stream(container)
                # for the decoder as well
                max_pixels = media_options(protocols)["max_pixels"]
                stream.codec_context.options = {"max_pixels": max_pixels}
                yield container, stream
        except TurboTalkError:
            raise
        # FFmpeg's errors, and those that PyAV raises on damaged files.
        except (FFmpegError, ValueError, LookupError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, FFmpegError) else error
            raise ImageError(
                f"cannot read a video from {self._name}: {reason}; give an mp4, mov, mkv or webm "
                f"file of at most {MAX_PIXELS} pixels a frame"
            ) from error

    def _choose_stream(self, container: InputContainer) -> VideoStream:
        """Return the video stream that a player shows."""
        shown = [stream for stream in container.streams.video if not stream.disposition & _EXTRAS]
        default = [stream for stream in shown if stream.disposition & Disposition.default]
        if _is_photo(container) and not default:
            # The streams are tiles, or parts of a picture that is made from several.
            raise ImageError(
                f"{self._name} is a photo in tiles (HEIC or AVIF), as phones save them, which "
                "cannot be put together here; convert it to JPEG or PNG"
            )
        if not shown and container.streams.audio:
            raise ImageError(f"{self._name} has sound alone; give a video with a picture")
        for stream in (*default, *shown):
            # PyAV opens no decoder for codecs that it does not know, and its methods then crash.
            if stream.codec_context is not None:
                return stream
        raise ImageError(
            f"{self._name} is in a format that cannot be decoded; export it as H.264, H.265, VP9 "
            "or AV1"
        )


def _is_photo(container: InputContainer) -> bool:
    brands = container.metadata.get("major_brand", "") + container.metadata.get(
        "compatible_brands", ""
    )
    return any(brand in brands for brand in _PHOTO_BRANDS)


def _decode_frames(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Decode a stream from the current position on, with its transparency."""
    name = _ALPHA_DECODERS.get(stream.codec_context.name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        yield from container.decode(stream)
        return
    decoder = cast(av.VideoCodecContext, av.CodecContext.create(name, "r"))
    decoder.options = stream.codec_context.options
    for packet in container.demux(stream):
        yield from decoder.decode(packet)
