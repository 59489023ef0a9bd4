"""Checks of the file to write, before any work."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import OutputError, RequestError
from ..safe_io.atomic import reports_disk_errors
from ..safe_io.paths import is_folder
from ..takes.take import is_take


def check_output(path: Path, inputs: Iterable[Path], *, suffix: str = ".mp4") -> Path:
    """Check that a file can be written, and that it replaces nothing that is needed.

    Args:
        path: the file, as the user named it.
        inputs: files that the command reads.
        suffix: end of the name.

    Returns:
        The file itself if the path is a link.

    Raises:
        RequestError: if the name ends otherwise, or the file is one of the inputs.
        OutputError: if the path is a folder or a device, lies inside a take, or its folder is
            missing or may not be written.
    """
    try:
        is_name = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise OutputError(f"got the output {str(path)!r}; no file can have this name")
    with reports_disk_errors(path, RuntimeError):  # RuntimeError: a link to itself
        real = path.resolve()
    for name in (path.name, real.name):
        if Path(name).suffix != suffix:
            raise RequestError(
                f"got the output name {name!r}; it must be one that ends in {suffix}, as in "
                f"talk{suffix}"
            )
    if is_folder(real):
        raise OutputError(f"{path} is a folder; name a file in it, as in {path / f'talk{suffix}'}")
    with reports_disk_errors(path):
        if real.exists() and not real.is_file():
            raise OutputError(f"{path} is no file but a device; name a file")
        # An attempt, because a mode does not show everything, such as a file system that is
        # read-only.
        tempfile.TemporaryFile(dir=real.parent).close()
    for folder in real.parents:
        if is_take(folder):
            raise OutputError(
                f"{path} lies inside of {folder}, the unfinished video of another file; choose "
                "another folder"
            )
    for each in inputs:
        _check_input(path, real, each)
    return real


def take_folder(path: Path) -> Path:
    """Return the folder of the take of a video, which lies beside it."""
    return path.with_name(f"{path.name}.take")


def _check_input(path: Path, real: Path, source: Path) -> None:
    try:
        is_same = real.exists() and real.samefile(source)
        is_inside = take_folder(real) in source.resolve().parents
    except (OSError, ValueError, RuntimeError):  # it does not exist: refused when it is opened
        return
    if is_same:
        raise RequestError(
            f"got the output {path}, which is also an input ({source}) and would be replaced; "
            "give the output another name"
        )
    if is_inside:
        raise RequestError(
            f"got the input {source}, which lies inside of the unfinished video "
            f"{take_folder(real)} and would be deleted; move it to another folder"
        )
