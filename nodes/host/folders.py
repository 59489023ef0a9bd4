"""Paths of model files named by widgets, and of the files that the nodes write.

A widget's value may come from anyone who can send a prompt to the server, and the host does not
check a value computed by another node against the widget's list. So only this module makes paths,
besides ``__init__``, which adds our model folders to the host's, and takes.py, which names folders
in the host's output folder by digests. There are two kinds of paths: of a file that the host lists,
and of a new file in the host's temporary folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import folder_paths  # noqa: TID251

from ...turbotalk_core.errors import CheckpointError
from ...turbotalk_core.safe_io.paths import show

# An absolute path up to its last separator, of Windows or of other systems.
_ABSOLUTE = re.compile(
    r"(?<![\w./:\\])(?:file:)?(?:[A-Za-z]:)?[\\/]"
    r"""(?:[^\s\\/'":;,]+[\\/])*(?=[^\s\\/])"""
)


def list_models(kind: str) -> list[str]:
    """List the names of the host's model files of a kind, such as ``audio_encoders``."""
    return folder_paths.get_filename_list(kind)


def find_model(kind: str, name: str) -> Path:
    """Find a model file that the host lists.

    Args:
        kind: of the host's model folders.
        name: value of a widget, untrusted.

    Returns:
        Its path, inside one of the host's folders of that kind.

    Raises:
        CheckpointError: The host lists no such name.
    """
    path = folder_paths.get_full_path(kind, name) if name in list_models(kind) else None
    if path is None:
        raise CheckpointError(
            f"there is no model file {show(str(name))[:200]!r} among the {kind} that ComfyUI "
            "lists; choose one of the list, after a reload where it is new"
        )
    return Path(path)


def output_folder() -> Path:
    """Return the host's output folder."""
    return Path(folder_paths.get_output_directory())


def new_temporary_path(suffix: str) -> Path:
    """Return a new path in the host's temporary folder, creating the folder if it is missing.

    Args:
        suffix: end of the name.

    Returns:
        A path without a file.
    """
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"turbotalk_{uuid4().hex}{suffix}"


def hide_folders(text: str) -> str:
    """Shorten the paths in a text, which may go to people who must not know the server's folders.

    Args:
        text: an error or a note.

    Returns:
        The text. A path in one of the host's folders begins with the name of that folder, as in
        ``output/turbotalk_takes``; of any other absolute path the name of the file is left.
    """
    for folder, name in sorted(_list_folders(), key=lambda pair: -len(str(pair[0]))):
        if folder != Path(folder.anchor):  # a root would match every separator
            text = re.sub(rf"{re.escape(str(folder))}(?![\w.-])", lambda _: name, text)  # noqa: B023
    return _ABSOLUTE.sub("", text)


def _list_folders() -> Iterator[tuple[Path, str]]:
    """Yield the host's folders, each with the name that a message has for it."""
    folders = {
        "output": folder_paths.get_output_directory(),
        "input": folder_paths.get_input_directory(),
        "temp": folder_paths.get_temp_directory(),
        "user": folder_paths.get_user_directory(),
        "models": folder_paths.models_dir,
        "ComfyUI": folder_paths.base_path,
    }
    for name, folder in folders.items():
        yield Path(folder), name
        yield Path(folder).resolve(), name
    for kind, (places, _) in folder_paths.folder_names_and_paths.items():
        for place in places:
            yield Path(place), kind
