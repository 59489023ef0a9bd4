"""Atomic writing of files, and disk errors that name the file.

A file is either whole or absent, and an older file of the same name is unchanged until the new one
is whole. Every program of the repository writes its results with this module.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError, TurboTalkError

# of an fsync of a folder, on file systems that have none
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def reports_disk_errors(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Raise every error of the system in a block as an ``OutputError`` that names the file.

    Args:
        path: the file being written or read, as the user named it.
        *kinds: further types of error that the block's library raises for disk errors, such as
            FFmpeg's, which are no ``OSError``.

    Yields:
        Nothing.

    Raises:
        OutputError: if the block failed with an ``OSError`` or an error of the given kinds.
    """
    try:
        yield
    except TurboTalkError:
        raise
    except (OSError, *kinds) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"got '{reason}' at {path}; {_advise(path, error)}") from error


def _advise(path: Path, error: Exception) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC:
        with suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            return f"{free / 1e6:.1f} MB are free there, so free more or choose another folder"
    return (
        "it needs an existing folder that may be written and enough free space, so free some or "
        "choose another folder"
    )


@contextmanager
def whole_file(path: Path, *, writer: str = "", folder: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path; rename it when the block ends well, delete it when the block fails.

    Args:
        path: path of the finished file; an older file there is replaced at the end.
        writer: name of this process, if several may write the same file at the same time; their
            temporary files then have different names. Without one, a temporary file that a killed
            process left is overwritten by the next attempt.
        folder: folder of the temporary file, on the same file system; None is that of the path.

    Yields:
        The temporary path to write to, with the same suffix.

    Raises:
        OutputError: if the folder is missing, may not be written or has no free space, or the path
            is a folder.
    """
    infix = f".{writer}.part" if writer else ".part"
    part = (folder or path.parent) / f".{path.stem}{infix}{path.suffix}"
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
        with suppress(OSError):  # the error of the block, if any, says more
            part.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Args:
        path: path of the file; replaced if it exists. Its folder must exist.
        data: its content.

    Raises:
        OutputError: if the file cannot be written.
    """
    with whole_file(path) as part, reports_disk_errors(path):
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all.

    Args:
        path: path of the file; replaced if it exists. Its folder must exist.
        text: its content.

    Raises:
        OutputError: if the file cannot be written.
    """
    with whole_file(path) as part, reports_disk_errors(path):
        part.write_text(text, encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, if they do not exist.

    Args:
        folder: folder to create.

    Raises:
        OutputError: if the folder cannot be created, or its path is a file.
    """
    with reports_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to disk, so that they survive a power cut.

    Does nothing on systems that cannot sync folders, or if the folder may not be read.

    Args:
        folder: folder in which files were created or renamed.
    """
    if os.name != "posix":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)
