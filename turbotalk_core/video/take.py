"""Takes: clips on disk, lossless, written chunk by chunk while later chunks are being made.

A take is a folder: ``chunk_00000.mkv``, … (FFV1, the exact bytes of the frames), ``sound.mka``
(the original recording, float32, untouched) and ``take.json``, which names them. Each file is
written under a temporary name and renamed when whole; ``take.json`` comes last, so what it names
exists. Memory never holds more than one chunk, whatever the length.

Axes: T frames, H height, W width, C channels, S samples.
"""

from __future__ import annotations

import json
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
from torch import Tensor

from ..errors import ChunkError, OutputError
from ..sound import Sound, pieces
from ..types import Waveform
from .files import reports_disk_errors, whole_file
from .writer import LOSSLESS, open_video

_INDEX = "take.json"
_SOUND = "sound.mka"
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
            OutputError: the folder holds no take, or one of its files is missing.
        """
        index = folder / _INDEX
        with reports_disk_errors(index):
            text = index.read_text(encoding="utf-8")
        try:
            data = json.loads(text)
            version = data["version"]
            take = cls(
                folder=folder,
                height=data["height"],
                width=data["width"],
                chunks=tuple(TakeChunk(**chunk) for chunk in data["chunks"]),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(f"{index} is damaged ({error}); make the take again") from error
        if version != _VERSION:
            raise OutputError(
                f"{index} has version {version}, this program reads version {_VERSION}; "
                "make the take again"
            )
        for name in (_SOUND, *(chunk.file for chunk in take.chunks)):
            if not (folder / name).is_file():
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

    @property
    def sound_file(self) -> Path:
        """Where the original recording lies, exactly as it was given.

        Raises:
            OutputError: it does not lie there any more.
        """
        path = self.folder / _SOUND
        if not path.is_file():
            raise OutputError(f"{path} is missing; make the take again")
        return path

    def read_waveform(self) -> Waveform:
        """Read the original recording into memory, exactly as it was given.

        Returns:
            The sound of the take; it may be longer than the frames by less than one frame.

        Raises:
            OutputError: the file cannot be read.
        """
        path = self.folder / _SOUND
        with reports_disk_errors(path), av.open(str(path)) as container:
            stream = container.streams.audio[0]
            parts = [
                frame.to_ndarray().reshape(-1, stream.channels)
                for frame in container.decode(stream)
            ]
            samples_CS = torch.from_numpy(np.concatenate(parts).T.copy())
            return Waveform(samples_CS=samples_CS, sample_rate=stream.rate)

    def _iterate_chunk(self, chunk: TakeChunk, start: int, stop: int) -> Iterator[Tensor]:
        path = self.folder / chunk.file
        with reports_disk_errors(path):
            container = av.open(str(path))
        with container:
            frames = islice(container.decode(video=0), start, stop)
            for position in range(start, stop, _BATCH):
                with reports_disk_errors(path):
                    batch = [frame.to_ndarray(format="rgb24") for frame in islice(frames, _BATCH)]
                if len(batch) != min(_BATCH, stop - position):
                    raise OutputError(f"{path} ends too early; make the take again")
                yield torch.from_numpy(np.stack(batch))


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
def new_take(folder: Path, waveform: Sound) -> Iterator[TakeWriter]:
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


def _write_sound(path: Path, waveform: Sound) -> None:
    rate = waveform.sample_rate
    num_channels = waveform.num_channels
    # "7C": seven channels, of which nobody says which loudspeaker is which
    layout = {1: "mono", 2: "stereo"}.get(num_channels, f"{num_channels}C")
    with (
        whole_file(path) as part,
        reports_disk_errors(path),
        av.open(str(part), "w") as container,
    ):
        stream = container.add_stream("pcm_f32le", rate=rate, layout=layout)
        # a second at a time: one block of the whole recording would outgrow the container's limits
        for index, samples_CS in enumerate(pieces(waveform, rate)):
            interleaved = samples_CS.T.contiguous().numpy().reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, index * rate, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
