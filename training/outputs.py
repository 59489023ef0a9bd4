"""Places that a command writes to: checked and locked before the work begins.

A lock belongs to one process and ends with it, however the process ends. Its file may stay, and
means nothing by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image

from turbotalk_core.errors import OutputError, RequestError
from turbotalk_core.safe_io.atomic import make_folder, reports_disk_errors, whole_file
from turbotalk_core.safe_io.paths import is_folder


@contextmanager
def hold(path: Path, what: str, *, seconds: float = 0) -> Iterator[None]:
    """Hold a lock that no other process can hold at the same time.

    Args:
        path: lock file; its folder must exist.
        what: what the holder of the lock does, for the message.
        seconds: how long to wait for another holder.

    Yields:
        Nothing.

    Raises:
        OutputError: if another process holds the lock, or the file cannot be written.
    """
    lock = FileLock(path)
    with reports_disk_errors(path):
        try:
            lock.acquire(timeout=seconds)
        except Timeout as error:
            raise OutputError(
                f"another process {what}; wait until it ends, or stop it first"
            ) from error
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Check whether another process holds a lock.

    Args:
        path: lock file; it must exist.

    Returns:
        True if it is held.

    Raises:
        OutputError: if the file cannot be opened.
    """
    lock = FileLock(path)
    with reports_disk_errors(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
    lock.release()
    return False


def check_letters(folder: Path) -> None:
    """Check that safetensors can open files in a folder, whose path must be UTF-8.

    Args:
        folder: folder for weights or samples.

    Raises:
        OutputError: if it cannot.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            f"the path {folder} is not UTF-8, and safetensors opens no file there; rename it, or "
            "give another folder"
        ) from error


@contextmanager
def hold_files(*paths: Path | None, picture: Path | None = None) -> Iterator[None]:
    """Hold the files that a command writes at its end, and check that it can.

    Args:
        *paths: files; their folders are created if they do not exist. None is passed over.
        picture: another file, whose suffix names a format of pictures.

    Yields:
        Nothing.

    Raises:
        RequestError: if the suffix of the picture is of no format.
        OutputError: if a path is a folder, its folder cannot be written, or another process holds
            it.
    """
    if picture is not None and picture.suffix.lower() not in _list_picture_suffixes():
        raise RequestError(f"got the picture {picture}; its name must end in .png or .webp")
    with ExitStack() as stack:
        for path in dict.fromkeys(path for path in (*paths, picture) if path is not None):
            if is_folder(path):
                raise OutputError(f"{path} is a folder; give the path of a file to write")
            make_folder(path.parent)
            lock = path.with_name(f".{path.name}.lock")
            stack.enter_context(hold(lock, f"is making {path}"))
            stack.callback(lock.unlink, missing_ok=True)
        yield


def _list_picture_suffixes() -> set[str]:
    formats = Image.registered_extensions()
    return {suffix for suffix, name in formats.items() if name in Image.SAVE}


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture whole or not at all, in the format of its suffix.

    Args:
        path: file to write; its folder is created.
        picture: picture to write.

    Raises:
        OutputError: if the file cannot be written.
    """
    make_folder(path.parent)
    with whole_file(path) as part, reports_disk_errors(path):
        picture.save(part, optimize=True)
