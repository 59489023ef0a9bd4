"""Takes: clips on disk, lossless, written chunk by chunk while later chunks are being made.

A take is a folder: ``chunk_00000.mkv``, … (FFV1, the exact bytes of the frames), ``sound.mka``
(the original recording, float32, untouched) and ``take.json``, which names them. Each file is
written under a temporary name and renamed when whole; ``take.json`` comes last, so what it names
exists. Memory never holds more than one chunk, whatever the length.

Axes: T frames, H height, W width, C channels, S samples.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from torch import Tensor

from ..errors import ChunkError, OutputError, TurboTalkError
from ..geometry import MAX_FRAMES
from ..trust import MAX_PIXELS, is_file, media_options, parse_json, read_small
from ..types import Waveform
from .files import reports_disk_errors, whole_file
from .writer import LOSSLESS, open_video

_INDEX = "take.json"
_SOUND = "sound.mka"
_SOUND_CODEC, _SAMPLE_BYTES = "pcm_f32le", 4  # floating point, as it is
_CHUNK = re.compile(r"chunk_[0-9]{5,8}\.mkv")  # no other file is opened, whatever the index says
_VERSION = 1
_BATCH = 16  # frames decoded at a time: 19 MB at 832x480


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeChunk:
    """One file of a take.

    Attributes:
        file: its name inside the folder.
        start: first frame in it, counted from the start of the take.
        stop: one past the last.
    """

    file: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """A finished clip on disk.

    Attributes:
        folder: where it lies.
        height: of the frames, pixels.
        width: of the frames, pixels.
        chunks: its files, in order.
    """

    folder: Path
    height: int
    width: int
    chunks: tuple[TakeChunk, ...]

    @classmethod
    def open(cls, folder: Path) -> Take:
        """Find a take on disk.

        Args:
            folder: the take's folder.

        Returns:
            The take; frames and sound are read when asked for.

        Raises:
            OutputError: the folder holds no take, its description is damaged, or one of its files
                is missing or no file of its own.
        """
        index = folder / _INDEX
        with reports_disk_errors(index):
            try:
                take, version = _parse_index(folder, read_small(index))
            except (ValueError, TypeError, LookupError) as error:
                raise OutputError(f"{index} is damaged ({error}); make the take again") from error
        if version != _VERSION:
            raise OutputError(
                f"{index} has version {version}, this program reads version {_VERSION}; "
                "make the take again"
            )
        _check_take(take, index)
        for name in (_SOUND, *(chunk.file for chunk in take.chunks)):
            # A take never has links; one that was handed on could lead anywhere.
            if not is_file(folder / name) or (folder / name).is_symlink():
                raise OutputError(f"{folder / name} is missing; make the take again")
        return take

    @property
    def num_frames(self) -> int:
        """Length of the clip."""
        return self.chunks[-1].stop

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Read frames in small batches.

        Args:
            start: first frame wanted.
            stop: one past the last frame wanted; None for the end.

        Yields:
            uint8 [T, H, W, 3], exactly what was written.

        Raises:
            ChunkError: frames are wanted that the take does not have.
            OutputError: a file cannot be read.
        """
        stop = self.num_frames if stop is None else stop
        if not 0 <= start < stop <= self.num_frames:
            raise ChunkError(
                f"got a wish for frames [{start}, {stop}); the take has frames "
                f"[0, {self.num_frames}), so ask for at least one of those"
            )
        for chunk in self.chunks:
            first, last = max(start, chunk.start), min(stop, chunk.stop)
            if first < last:
                yield from self._iterate_chunk(chunk, first - chunk.start, last - chunk.start)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Read frames into memory.

        Args:
            start: first frame wanted.
            stop: one past the last frame wanted; None for the end.

        Returns:
            uint8 [T, H, W, 3], exactly what was written.
        """
        return torch.cat(list(self.iterate(start, stop)))

    def read_waveform(self) -> Waveform:
        """Read the original recording, exactly as it was given.

        Returns:
            The sound of the take; it may be longer than the frames by less than one frame.

        Raises:
            OutputError: the file cannot be read.
        """
        path = self.folder / _SOUND
        with _open_media(path) as container:
            stream = container.streams.audio[0]
            # What the writer writes; another codec could unpack to more than memory holds.
            if stream.codec_context.name != _SOUND_CODEC:
                raise OutputError(f"{path} holds {stream.codec_context.name}; make the take again")
            parts = []
            room = path.stat().st_size // _SAMPLE_BYTES  # a container may be compressed, too
            for frame in container.decode(stream):
                parts.append(frame.to_ndarray().reshape(-1, stream.channels))
                room -= parts[-1].size
                if room < 0:
                    raise OutputError(f"{path} unpacks to more than it is; make the take again")
            samples_CS = torch.from_numpy(np.concatenate(parts).T.copy())
            return Waveform(samples_CS=samples_CS, sample_rate=stream.rate)

    def _iterate_chunk(self, chunk: TakeChunk, start: int, stop: int) -> Iterator[Tensor]:
        path = self.folder / chunk.file
        with _open_media(path) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            if (context.name, context.height, context.width) != ("ffv1", self.height, self.width):
                raise OutputError(
                    f"{path} holds {context.name} of {context.width}x{context.height}, the take is "
                    f"ffv1 of {self.width}x{self.height}; make the take again"
                )
            context.options = {"max_pixels": str(MAX_PIXELS)}
            frames = islice(container.decode(stream), start, stop)
            for position in range(start, stop, _BATCH):
                batch = [frame.to_ndarray(format="rgb24") for frame in islice(frames, _BATCH)]
                if len(batch) != min(_BATCH, stop - position):
                    raise OutputError(f"{path} ends too early; make the take again")
                yield torch.from_numpy(np.stack(batch))


def _parse_index(folder: Path, text: bytes) -> tuple[Take, object]:
    data = parse_json(text)
    version = data["version"]
    take = Take(
        folder=folder,
        height=data["height"],
        width=data["width"],
        chunks=tuple(TakeChunk(**chunk) for chunk in data["chunks"]),
    )
    return take, version


def _check_take(take: Take, index: Path) -> None:
    """Refuse a description that names other files, or frames that do not follow each other."""
    edge = 0
    for chunk in take.chunks:
        is_named = isinstance(chunk.file, str) and _CHUNK.fullmatch(chunk.file)
        if not is_named or chunk.start != edge or not _is_count(chunk.stop, edge + 1):
            raise OutputError(f"{index} is damaged (at {chunk}); make the take again")
        edge = chunk.stop
    has_size = _is_count(take.height, 1) and _is_count(take.width, 1)
    if not has_size or take.height * take.width > MAX_PIXELS or not 0 < edge <= MAX_FRAMES:
        raise OutputError(
            f"{index} is damaged ({edge} frames of {take.width}x{take.height}); make the take again"
        )


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@contextmanager
def _open_media(path: Path) -> Iterator[InputContainer]:
    """Open a file of a take, and nothing else that it may name."""
    try:
        with (
            reports_disk_errors(path),
            av.open(
                f"file:{path}",
                format="matroska",
                options=media_options("file"),
                metadata_errors="replace",
            ) as container,
        ):
            yield container
    except TurboTalkError:
        raise
    # What PyAV and numpy stumble over in damaged files.
    except (ValueError, LookupError, RuntimeError, AttributeError) as error:
        raise OutputError(f"{path} is damaged ({error}); make the take again") from error


class TakeWriter:
    """Takes the chunks of a clip; made by ``new_take``."""

    def __init__(self, folder: Path) -> None:
        """Prepare for the first chunk.

        Args:
            folder: of the take.
        """
        self._folder = folder
        self._chunks: list[TakeChunk] = []

    def write(self, frames_THWC: Tensor) -> None:
        """Add the next frames as one file.

        Args:
            frames_THWC: uint8 RGB, at least one frame, all of one size.

        Raises:
            GeometryError: a shape or a type that is not so.
            OutputError: the encoder or the disk refused.
        """
        start = self._chunks[-1].stop if self._chunks else 0
        name = f"chunk_{len(self._chunks):05}.mkv"
        with open_video(self._folder / name, LOSSLESS) as writer:
            writer.write(frames_THWC)
        num_frames, height, width, _ = frames_THWC.shape
        self._chunks.append(TakeChunk(file=name, start=start, stop=start + num_frames))
        index = {
            "version": _VERSION,
            "height": height,
            "width": width,
            "chunks": [asdict(chunk) for chunk in self._chunks],
        }
        path = self._folder / _INDEX
        with whole_file(path) as part, reports_disk_errors(path):
            part.write_text(json.dumps(index), encoding="utf-8")


@contextmanager
def new_take(folder: Path, waveform: Waveform) -> Iterator[TakeWriter]:
    """Make a take: there when the block ends well, gone when anything is raised in it.

    Args:
        folder: to make; must not exist yet.
        waveform: the original recording that the frames belong to.

    Yields:
        What takes the chunks.

    Raises:
        OutputError: the folder exists already or cannot be made, or the disk refused.
    """
    with reports_disk_errors(folder):
        folder.mkdir()
    try:
        _write_sound(folder / _SOUND, waveform)
        yield TakeWriter(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_sound(path: Path, waveform: Waveform) -> None:
    rate = waveform.sample_rate
    num_channels = waveform.samples_CS.shape[0]
    # "7C": seven channels, of which nobody says which loudspeaker is which
    layout = {1: "mono", 2: "stereo"}.get(num_channels, f"{num_channels}C")
    with (
        whole_file(path) as part,
        reports_disk_errors(path),
        av.open(str(part), "w") as container,
    ):
        stream = container.add_stream(_SOUND_CODEC, rate=rate, layout=layout)
        # a second at a time: one block of the whole recording would outgrow the container's limits
        for index, samples_CS in enumerate(waveform.samples_CS.float().split(rate, dim=1)):
            interleaved = samples_CS.T.contiguous().numpy().reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, index * rate, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
