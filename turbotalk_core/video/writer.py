"""Writer of video files from batches of frames and a sound.

The sound has any rate and number of channels and is read along with the frames. In the file, video
and sound are equally long. The file is complete or does not exist. Separate so that lossless takes
and finished videos share one encoder.

Axes: T frames, H height, W width, C channels, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from logging import getLogger
from pathlib import Path
from typing import cast

import av
import torch
from av import AudioStream, VideoStream
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from ..errors import GeometryError
from ..geometry import FPS, count_samples
from ..safe_io.atomic import reports_disk_errors, whole_file
from ..sound import Sound, SoundReader, pieces

_log = getLogger(__name__)

# AAC, ISO/IEC 14496-3 table 1.18 (rates, Hz) and 1.19 (channel configurations)
_AAC_RATES = (
    7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000
)  # fmt: skip
_AAC_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}
_AAC_BITS_PER_CHANNEL = 96_000  # per second; transparent for speech and music
_AAC_BITS_PER_SAMPLE = 6  # limit of the format: 6144 bits in 1024 samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Encoding of frames to a video stream.

    Attributes:
        encoder: FFmpeg's name of the encoder.
        pixel_format: FFmpeg's name of the pixel format.
        options: private options of the encoder.
        tag: four characters that name the codec in the file, if players need a certain one.
        fps: frames per second of the stream.
    """

    encoder: str
    pixel_format: str
    options: Mapping[str, str] = field(default_factory=dict)
    tag: str | None = None
    fps: Fraction = Fraction(FPS)

    @property
    def is_rgb(self) -> bool:
        """Whether colours are stored as RGB, without conversion to luma and chroma."""
        return av.VideoFormat(self.pixel_format).is_rgb


LOSSLESS = Encoding(encoder="ffv1", pixel_format="bgr0", options={"level": "3", "slicecrc": "1"})


@contextmanager
def open_video(
    path: Path,
    encoding: Encoding,
    *,
    waveform: Sound | None = None,
    metadata: Mapping[str, str] | None = None,
    part_folder: Path | None = None,
) -> Iterator[VideoWriter]:
    """Create a video file; an exception in the ``with`` block deletes it.

    Args:
        path: file to create; its suffix determines the container.
        encoding: encoding of the frames.
        waveform: sound of the video, cut or padded with silence to the length of the frames.
        metadata: container tags.
        part_folder: folder of the unfinished file, on the same file system; None is that of the
            path.

    Yields:
        The writer of the frames.

    Raises:
        GeometryError: if the block wrote no frame.
        OutputError: if the encoder fails or the file cannot be written.
    """
    with whole_file(path, folder=part_folder) as part:
        with reports_disk_errors(path, FFmpegError):
            # use_metadata_tags: without it mp4 drops every tag but a few known ones
            options = {"movflags": "use_metadata_tags+faststart"} if path.suffix == ".mp4" else {}
            container = av.open(str(part), "w", options=options)
        try:
            container.metadata.update(metadata or {})
            writer = VideoWriter(path, container, encoding, waveform)
            yield writer
            writer.finish()
        except BaseException:
            # the file is about to be deleted: errors on closing do not matter
            with suppress(OSError, FFmpegError):
                container.close()
            raise
        with reports_disk_errors(path, FFmpegError):
            container.close()


class VideoWriter:
    """Writer of frames and of the sound that belongs to them; made by ``open_video``."""

    def __init__(
        self,
        path: Path,
        container: OutputContainer,
        encoding: Encoding,
        waveform: Sound | None,
    ) -> None:
        """Prepare; the first frames open the streams, as they determine the size.

        Args:
            path: final path of the file, for error messages.
            container: open container for the packets.
            encoding: encoding of the frames.
            waveform: sound of the video.
        """
        self._path = path
        self._container = container
        self._encoding = encoding
        self._waveform = None if waveform is None else _fit_to_aac(waveform)
        self._reader = None if self._waveform is None else SoundReader(self._waveform)
        self._video: VideoStream
        self._sound: AudioStream
        self._size: tuple[int, int] | None = None
        self._num_frames = 0
        self._num_samples = 0

    @property
    def num_frames(self) -> int:
        """Number of frames written so far."""
        return self._num_frames

    def write(self, frames_THWC: Tensor) -> None:
        """Encode a batch of frames and the sound that belongs to them.

        Args:
            frames_THWC: uint8 RGB frames, with the same height and width in every call.

        Raises:
            GeometryError: if shape or type are others, or the pixel format does not allow the size.
            OutputError: if the encoder fails or the file cannot be written.
        """
        self._check(frames_THWC)
        with reports_disk_errors(self._path, FFmpegError):
            if self._size is None:
                self._open_streams(frames_THWC.shape[1], frames_THWC.shape[2])
            for frame_HWC in frames_THWC:
                self._encode_frame(frame_HWC)
            self._encode_sound()

    def finish(self) -> None:
        """Flush the encoders.

        Raises:
            GeometryError: if no frame was written.
            OutputError: if an encoder fails or the file cannot be written.
        """
        if self._size is None:
            raise GeometryError(f"got no frames for {self._path}; a video needs at least one")
        with reports_disk_errors(self._path, FFmpegError):
            self._container.mux(self._video.encode(None))
            if self._waveform is not None:
                self._container.mux(self._sound.encode(None))

    def _check(self, frames_THWC: Tensor) -> None:
        shape = tuple(frames_THWC.shape)
        is_film = len(shape) == 4 and shape[0] > 0 and shape[3] == 3
        if not is_film or frames_THWC.dtype != torch.uint8:
            raise GeometryError(
                f"got frames of shape {shape} and type {frames_THWC.dtype}; a video is written "
                "from at least one uint8 frame, [frames, height, width, 3]"
            )
        size = (shape[1], shape[2])
        if self._size not in (None, size):
            raise GeometryError(
                f"got frames of {size[1]}x{size[0]} after frames of "
                f"{self._size[1]}x{self._size[0]}; all frames of a video have one size"
            )
        if "420" in self._encoding.pixel_format and (size[0] % 2 or size[1] % 2):
            raise GeometryError(
                f"got frames of {size[1]}x{size[0]}; {self._encoding.pixel_format} takes even "
                "sizes only, so crop a row or a column, or choose yuv444p"
            )

    def _open_streams(self, height: int, width: int) -> None:
        encoding = self._encoding
        video = cast(
            VideoStream,
            self._container.add_stream(
                encoding.encoder, rate=encoding.fps, options=dict(encoding.options)
            ),
        )
        video.width, video.height, video.pix_fmt = width, height, encoding.pixel_format
        if encoding.tag is not None:
            video.codec_tag = encoding.tag
        if not encoding.is_rgb:
            # declared in the file too: otherwise players guess the matrix from the picture's height
            video.codec_context.colorspace = Colorspace.ITU709
            video.codec_context.color_primaries = 1  # ITU-R BT.709, ISO/IEC 23091-2 table 2
            video.codec_context.color_trc = 1
            video.codec_context.color_range = ColorRange.MPEG
        self._video = video
        if self._waveform is not None:
            num_channels, rate = self._waveform.num_channels, self._waveform.sample_rate
            sound = self._container.add_stream("aac", rate=rate, layout=_AAC_LAYOUTS[num_channels])
            self._sound = cast(AudioStream, sound)
            self._sound.bit_rate = num_channels * min(
                _AAC_BITS_PER_CHANNEL, _AAC_BITS_PER_SAMPLE * rate
            )
        self._size = (height, width)

    def _encode_frame(self, frame_HWC: Tensor) -> None:
        frame = av.VideoFrame.from_ndarray(frame_HWC.contiguous().numpy(), format="rgb24")
        if self._encoding.is_rgb:
            frame = frame.reformat(format=self._encoding.pixel_format)
        else:
            frame = frame.reformat(
                format=self._encoding.pixel_format,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
        frame.pts, frame.time_base = self._num_frames, 1 / self._encoding.fps
        self._container.mux(self._video.encode(frame))
        self._num_frames += 1

    def _encode_sound(self) -> None:
        """Encode the sound up to the time of the last frame, as files interleave the two."""
        if self._waveform is None or self._reader is None:
            return
        rate = self._waveform.sample_rate
        start = self._num_samples
        stop = count_samples(self._num_frames, rate, self._encoding.fps)
        if start == stop:
            return
        samples_CS = self._reader.read(start, stop)
        frame = av.AudioFrame.from_ndarray(
            samples_CS.contiguous().numpy(),
            format="fltp",
            layout=_AAC_LAYOUTS[samples_CS.shape[0]],
        )
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        self._container.mux(self._sound.encode(frame))
        self._num_samples = stop


def _fit_to_aac(sound: Sound) -> Sound:
    """Return the sound itself, or converted to the nearest rate and channels that AAC supports."""
    num_channels, rate = sound.num_channels, sound.sample_rate
    if num_channels in _AAC_LAYOUTS and rate in _AAC_RATES:
        return sound
    fitting = next((known for known in _AAC_RATES if known >= rate), _AAC_RATES[-1])
    fitted = _Fitted(sound=sound, sample_rate=fitting)
    _log.warning(
        "AAC cannot hold %d channels at %d Hz; the video gets %s at %d Hz instead",
        num_channels,
        rate,
        _AAC_LAYOUTS[fitted.num_channels],
        fitting,
    )
    return fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitted:
    """Sound converted while it is read to a rate and channels that AAC supports; a ``Sound``.

    FFmpeg's resampler has a short filter even for odd rates such as 44101 Hz. It always starts at
    the beginning, and may end a few samples early or late; the end is cut or padded with silence.
    """

    sound: Sound
    sample_rate: int

    @property
    def num_channels(self) -> int:
        # for other numbers of channels the assignment to loudspeakers is not known
        return self.sound.num_channels if self.sound.num_channels in _AAC_LAYOUTS else 1

    @property
    def num_samples(self) -> int:
        return -(-self.sound.num_samples * self.sample_rate // self.sound.sample_rate)

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        position = 0
        for block_CS in self._convert():
            first, last = max(0, start - position), max(0, self.num_samples - position)
            position += block_CS.shape[1]
            yield block_CS[:, first:last]
        yield torch.zeros(self.num_channels, max(0, self.num_samples - max(start, position)))

    def _convert(self) -> Iterator[Tensor]:
        rate, layout = self.sound.sample_rate, _AAC_LAYOUTS[self.num_channels]
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=self.sample_rate)
        for index, samples_CS in enumerate(pieces(self.sound, rate)):
            if samples_CS.shape[0] != self.num_channels:
                samples_CS = samples_CS.mean(dim=0, keepdim=True)
            frame = av.AudioFrame.from_ndarray(
                samples_CS.contiguous().numpy(), format="fltp", layout=layout
            )
            frame.sample_rate, frame.pts, frame.time_base = rate, index * rate, Fraction(1, rate)
            for resampled in resampler.resample(frame):
                yield torch.from_numpy(resampled.to_ndarray())
        for resampled in resampler.resample(None):
            yield torch.from_numpy(resampled.to_ndarray())
