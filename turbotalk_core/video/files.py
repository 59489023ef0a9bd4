"""Files that are either whole or absent, and one voice for everything that can go wrong on disk.

Separate because takes and finished videos need exactly the same promise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from av.error import FFmpegError

from ..errors import OutputError, TurboTalkError


@contextmanager
def reports_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system or FFmpeg says about a file into an ``OutputError`` that names it.

    Args:
        path: the file being written or read, as the user knows it.

    Yields:
        Nothing.

    Raises:
        OutputError: the block failed with an error of the system or of FFmpeg.
    """
    try:
        yield
    except TurboTalkError:
        raise
    except (OSError, FFmpegError) as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"got '{reason}' at {path}; it needs an existing folder that may be written and "
            "enough free space, so free some or choose another folder"
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside a path; rename when the block ends well, delete when it fails.

    Args:
        path: where the finished file shall lie; an older file there is replaced at the end.

    Yields:
        The temporary path to write to, with the same suffix.

    Raises:
        OutputError: the folder is missing or may not be written.
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    with reports_disk_errors(path):
        part.touch()
    try:
        yield part
        with reports_disk_errors(path):
            with part.open("rb+") as file:  # else a power cut may leave the name without the bytes
                os.fsync(file.fileno())
            part.replace(path)
            sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut, where the system can promise it.

    Args:
        folder: in which files were made or renamed.
    """
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
