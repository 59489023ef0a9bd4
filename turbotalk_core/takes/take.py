"""Takes: clips on disk, lossless, written chunk by chunk while later chunks are being made.

A take is a folder with these files: ``chunk_00000.mkv``, … (FFV1, the exact bytes of the frames);
``sound.mka`` (the original recording, float32, unchanged); ``take.journal`` (the cache key and the
finished chunks); and until the take is complete ``carry_00000.safetensors`` (the chunk state after
the last finished chunk). Each file is written under a temporary name and renamed when complete. The
journal is written last, so all files that it lists exist. However the program is stopped, the next
run continues after the last finished chunk. At most two chunks are in memory, whatever the length
of the video.

Axes: T frames, H height, W width, C channels, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..dependencies import required_for
from ..errors import ChunkError, MismatchError, OutputError, TurboTalkError
from ..geometry import MAX_FRAMES
from ..safe_io.atomic import reports_disk_errors, whole_file, write_bytes
from ..safe_io.media import MAX_PIXELS, media_options
from ..safe_io.paths import is_file
from ..sound import Sound, pieces
from ..types import ChunkState, FrameChunk
from ..video.background_worker import BackgroundWorker
from ..video.mux import quantize_frames
from ..video.writer import LOSSLESS, open_video
from .cache_key import CacheKey, describe_changes
from .host_memory import trim_host_memory
from .journal import Journal

_JOURNAL = "take.journal"
_SOUND = "sound.mka"
_LOCK = "take.lock"
_SOUND_CODEC = "pcm_f32le"  # floating point, uncompressed
_OWN_FILES = (_JOURNAL, _SOUND, "chunk_*.mkv", "carry_*.safetensors", ".*.part.*")
_VERSION = 2
_BATCH = 16  # frames decoded at a time: 19 MB at 832x480


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeChunk:
    """One file of a take.

    Attributes:
        file: name of the file inside the folder.
        start: first frame in it, counted from the start of the take.
        stop: one past the last frame.
    """

    file: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """A clip on disk.

    Attributes:
        folder: folder of the take.
        height: height of the frames, pixels.
        width: width of the frames, pixels.
        length: number of frames of the complete take.
        chunks: its finished files, in order.
        cache_key: the inputs that determine its frames.
    """

    folder: Path
    height: int
    width: int
    length: int
    chunks: tuple[TakeChunk, ...]
    cache_key: CacheKey

    @classmethod
    def open(cls, folder: Path) -> Take:
        """Open a take on disk.

        Args:
            folder: folder of the take.

        Returns:
            The take; frames and sound are read on access.

        Raises:
            OutputError: if the folder contains no take with a finished chunk, its journal is
                damaged, or one of its files is missing or a link.
        """
        path = folder / _JOURNAL
        if not _is_plain_file(path):
            raise OutputError(f"there is no {path}; make the take again")
        take = _read_take(folder, Journal(path).records)
        if not take.chunks:
            raise OutputError(f"{folder} has no finished chunk; make the take again")
        take.check_files()
        return take

    def check_files(self) -> None:
        """Check that the files of all finished chunks and of the sound exist.

        Raises:
            OutputError: if one is missing or a link.
        """
        for name in (_SOUND, *(chunk.file for chunk in self.chunks)):
            if not _is_plain_file(self.folder / name):
                raise OutputError(f"{self.folder / name} is missing; make the take again")

    @property
    def num_frames(self) -> int:
        """Number of finished frames."""
        return self.chunks[-1].stop if self.chunks else 0

    @property
    def is_whole(self) -> bool:
        """Whether all frames are finished."""
        return self.num_frames == self.length

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Read frames in small batches.

        Args:
            start: first frame to read.
            stop: one past the last frame to read; None for the end.

        Yields:
            uint8 [T, H, W, 3], exactly what was written.

        Raises:
            ChunkError: if the take does not have these frames.
            OutputError: if a file cannot be read.
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
            start: first frame to read.
            stop: one past the last frame to read; None for the end.

        Returns:
            uint8 [T, H, W, 3], exactly what was written.
        """
        return torch.cat(list(self.iterate(start, stop)))

    @property
    def sound_file(self) -> Path:
        """Path of the original recording, unchanged.

        Raises:
            OutputError: if the file is missing or has another format.
        """
        path = self.folder / _SOUND
        if not _is_plain_file(path):
            raise OutputError(f"{path} is missing; make the take again")
        with _open_media(path) as container:
            _find_sound(path, container)
        return path

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


def _is_plain_file(path: Path) -> bool:
    """Check that a path is a file and no link; links could point outside of the take."""
    return is_file(path) and not path.is_symlink()


@contextmanager
def _open_media(path: Path) -> Iterator[InputContainer]:
    """Open a file of a take, but no other file that it refers to."""
    try:
        with (
            reports_disk_errors(path, FFmpegError),
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
    # Errors that PyAV and numpy raise for damaged files.
    except (ValueError, LookupError, RuntimeError, AttributeError) as error:
        raise OutputError(f"{path} is damaged ({error}); make the take again") from error


def _find_sound(path: Path, container: InputContainer) -> AudioStream:
    stream = container.streams.audio[0]
    # Only the writer's codec: another one could decompress to more than fits into memory.
    if stream.codec_context.name != _SOUND_CODEC:
        raise OutputError(f"{path} holds {stream.codec_context.name}; make the take again")
    return stream


class TakeWriter:
    """Writer of the chunks of a take; made by ``open_take``.

    Attributes:
        take: the take with the chunks that are on disk so far.
        chunk_state: state after the last finished chunk; None before the first, or if the take is
            complete.
        changes: why an unfinished take in the folder was not continued; empty if there was none,
            or if it was continued.
    """

    def __init__(
        self,
        take: Take,
        journal: Journal,
        background: BackgroundWorker,
        chunk_state: ChunkState | None,
        changes: tuple[str, ...],
    ) -> None:
        """Start after the last finished chunk."""
        self.take = take
        self.chunk_state = chunk_state
        self.changes = changes
        self._journal = journal
        self._background = background
        self._num_frames = take.num_frames
        self._num_chunks = len(take.chunks)

    def write(self, finished: FrameChunk) -> Tensor:
        """Write the next chunk as one file, in the background.

        Args:
            finished: the next chunk, with its chunk state.

        Returns:
            Its frames as the file contains them, uint8 [T, H, W, 3].

        Raises:
            ChunkError: if it is not the next chunk, or has no chunk state.
            MismatchError: if the frames have another size.
            OutputError: if this chunk or the one before cannot be encoded or written.
        """
        chunk = finished.chunk
        is_next = (chunk.index, chunk.keep_start) == (self._num_chunks, self._num_frames)
        if not is_next or chunk.keep_stop > self.take.length or finished.chunk_state is None:
            raise ChunkError(
                f"got chunk {chunk.index} from frame {chunk.keep_start}; the take needs chunk "
                f"{self._num_chunks} from frame {self._num_frames}, with what it hands on"
            )
        frames_THWC = quantize_frames(finished.frames_BCTHW)
        if frames_THWC.shape[1:3] != (self.take.height, self.take.width):
            raise MismatchError(
                f"got frames of shape {tuple(frames_THWC.shape)} for a take of "
                f"{self.take.width}x{self.take.height}"
            )
        self._background.do(self._write, frames_THWC, finished.chunk_state)
        self._num_chunks, self._num_frames = chunk.index + 1, chunk.keep_stop
        return frames_THWC

    def _write(self, frames_THWC: Tensor, chunk_state: ChunkState) -> None:
        folder, start = self.take.folder, self.take.num_frames
        index = len(self.take.chunks)
        with open_video(folder / _name_chunk(index), LOSSLESS) as writer:
            writer.write(frames_THWC)
        _write_chunk_state(folder, chunk_state)
        chunk = TakeChunk(file=_name_chunk(index), start=start, stop=start + frames_THWC.shape[0])
        self._journal.append({"start": chunk.start, "stop": chunk.stop})
        self.take = replace(self.take, chunks=(*self.take.chunks, chunk))
        self.chunk_state = chunk_state
        if index > 0:
            _name_chunk_state(folder, index).unlink(missing_ok=True)
        trim_host_memory()  # memory that this chunk used


@contextmanager
def open_take(
    folder: Path,
    waveform: Sound,
    *,
    height: int,
    width: int,
    length: int,
    cache_key: CacheKey,
) -> Iterator[TakeWriter]:
    """Create a take, or continue an unfinished one.

    Finished chunks are kept whatever the block raises. A take with another cache key in the same
    folder is deleted first. If no chunk is finished, all files are deleted.

    Args:
        folder: folder of the take; created if it does not exist.
        waveform: the original recording that the frames belong to.
        height: height of the frames, pixels.
        width: width of the frames, pixels.
        length: number of frames of the complete take.
        cache_key: cache key of the video.

    Yields:
        A writer for the missing chunks.

    Raises:
        OutputError: if the folder contains other files, another program is writing to it, or the
            disk cannot be written.
        MissingToolError: if filelock is not installed.
    """
    with required_for("a take on disk"):
        from filelock import FileLock, Timeout

    with reports_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if unknown := _find_unknown_files(folder):
            raise OutputError(
                f"{folder} holds {unknown[0].name}, which is of no take; choose another folder"
            )
    lock = FileLock(folder / _LOCK)
    with reports_disk_errors(folder):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise OutputError(
                f"another program is making the take {folder}; wait for it or stop it"
            ) from error
    header = {
        "version": _VERSION,
        "height": height,
        "width": width,
        "length": length,
        "identity": cache_key.to_json(),
    }
    journal = writer = None
    try:
        journal, take, chunk_state, changes = _resume(folder, header)
        if take is None:
            _write_sound(folder / _SOUND, waveform)
            journal.append(header)
            take = _read_take(folder, journal.records)
        with BackgroundWorker() as background:
            writer = TakeWriter(take, journal, background, chunk_state, changes)
            yield writer
    finally:
        if writer is not None and writer.take.is_whole:
            _clear(folder, "carry_*.safetensors")
        is_empty = journal is not None and len(journal.records) < 2
        if is_empty:
            _clear(folder)
        lock.release()
        if is_empty:
            (folder / _LOCK).unlink(missing_ok=True)
            _remove_if_empty(folder)


def delete_take(folder: Path) -> None:
    """Delete a take that is not needed any more.

    Args:
        folder: folder of the take; other files in it are kept.
    """
    _clear(folder, *_OWN_FILES, _LOCK)
    _remove_if_empty(folder)


def _resume(
    folder: Path, header: dict[str, Any]
) -> tuple[Journal, Take | None, ChunkState | None, tuple[str, ...]]:
    """Read the take if it may be continued; else delete it and return the reasons."""
    journal = Journal(folder / _JOURNAL)
    if len(journal.records) < 2:  # no chunk was finished
        _clear(folder)
        return Journal(folder / _JOURNAL), None, None, ()
    changes = _find_changes(journal.records[0], header)
    take = chunk_state = None
    if not changes:
        try:
            take = _read_take(folder, journal.records)
            take.check_files()
            if not take.is_whole:
                chunk_state = _read_chunk_state(folder, len(take.chunks))
        except OutputError as error:
            changes = (str(error),)
    if changes:
        _clear(folder)
        return Journal(folder / _JOURNAL), None, None, changes
    return journal, take, chunk_state, ()


def _find_changes(before: Mapping[str, Any], header: Mapping[str, Any]) -> tuple[str, ...]:
    if before.get("version") != header["version"] or not isinstance(before.get("identity"), dict):
        return ("it was made by another version of this program",)
    sizes = ("height", "width", "length")
    old = {**{name: before.get(name) for name in sizes}, **before["identity"]}
    now = {**{name: header[name] for name in sizes}, **header["identity"]}
    return describe_changes(CacheKey.from_json(old), CacheKey.from_json(now))


def _read_take(folder: Path, records: list[dict[str, Any]]) -> Take:
    path = folder / _JOURNAL
    try:
        header, *rest = records
        if header["version"] != _VERSION:
            raise OutputError(
                f"{path} has version {header['version']}, this program reads version {_VERSION}; "
                "make the take again"
            )
        take = Take(
            folder=folder,
            height=header["height"],
            width=header["width"],
            length=header["length"],
            chunks=tuple(
                TakeChunk(file=_name_chunk(index), start=span["start"], stop=span["stop"])
                for index, span in enumerate(rest)
            ),
            cache_key=CacheKey.from_json(header["identity"]),
        )
        _check_numbers(take)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(f"{path} is damaged ({error}); make the take again") from error
    return take


def _check_numbers(take: Take) -> None:
    """Raise ValueError for impossible sizes and for chunks that leave gaps or overlap."""
    sizes = take.height, take.width, take.length
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{take.length} frames of {take.width}x{take.height}")
    if take.height * take.width > MAX_PIXELS or take.length > MAX_FRAMES:
        raise ValueError(f"{take.length} frames of {take.width}x{take.height}")
    edge = 0
    for chunk in take.chunks:
        is_whole = type(chunk.start) is int and type(chunk.stop) is int
        if not is_whole or not chunk.start == edge < chunk.stop <= take.length:
            raise ValueError(f"{chunk.file} spans [{chunk.start}, {chunk.stop})")
        edge = chunk.stop


def _name_chunk(index: int) -> str:
    return f"chunk_{index:05}.mkv"


def _name_chunk_state(folder: Path, num_chunks: int) -> Path:
    return folder / f"carry_{num_chunks - 1:05}.safetensors"


def _write_chunk_state(folder: Path, chunk_state: ChunkState) -> None:
    path = _name_chunk_state(folder, chunk_state.num_chunks)
    tensors = {
        "motion_frames": chunk_state.motion_frames_BCTHW.contiguous(),
        "noise_state": chunk_state.noise_state_S.contiguous(),
    }
    write_bytes(path, save(tensors))


def _read_chunk_state(folder: Path, num_chunks: int) -> ChunkState:
    path = _name_chunk_state(folder, num_chunks)
    if not _is_plain_file(path):
        raise OutputError(f"{path} is missing; make the take again")
    with reports_disk_errors(path):
        content = path.read_bytes()
    try:
        tensors = load(content)
        return ChunkState(
            num_chunks=num_chunks,
            motion_frames_BCTHW=tensors["motion_frames"],
            noise_state_S=tensors["noise_state"],
        )
    except (SafetensorError, KeyError, MismatchError) as error:
        raise OutputError(f"{path} is damaged ({error}); make the take again") from error


def _find_unknown_files(folder: Path) -> list[Path]:
    own = {path for pattern in (*_OWN_FILES, _LOCK) for path in folder.glob(pattern)}
    return sorted(set(folder.iterdir()) - own)


def _clear(folder: Path, *patterns: str) -> None:
    for pattern in patterns or _OWN_FILES:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write_sound(path: Path, waveform: Sound) -> None:
    rate = waveform.sample_rate
    num_channels = waveform.num_channels
    # "7C": seven channels, without their places of loudspeakers
    layout = {1: "mono", 2: "stereo"}.get(num_channels, f"{num_channels}C")
    with (
        whole_file(path) as part,
        reports_disk_errors(path, FFmpegError),
        av.open(str(part), "w") as container,
    ):
        stream = container.add_stream(_SOUND_CODEC, rate=rate, layout=layout)
        # one second at a time: one block of the whole recording would exceed the container's limits
        for index, samples_CS in enumerate(pieces(waveform, rate)):
            interleaved = samples_CS.T.contiguous().numpy().reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, index * rate, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
