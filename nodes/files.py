"""Names from widgets to files of the host's folders, and names for what we write.

A widget's value comes from whoever may send the server a prompt, and a value that another node
computed is not held against the widget's list. So this is the only file of this room that makes
a path, besides the one that adds our models to the host's, and takes.py, which names folders in the
host's output folder by digests. It makes two kinds: of a file that the host lists, and of a new one
in the host's temporary folder.
"""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import folder_paths  # noqa: TID251

from ..turbotalk_core.errors import CheckpointError
from ..turbotalk_core.safe_io.paths import show


def list_models(kind: str) -> list[str]:
    """List the names of the host's model files of a kind, such as ``audio_encoders``."""
    return folder_paths.get_filename_list(kind)


def find_model(kind: str, name: str) -> Path:
    """Find a model file that the host lists.

    Args:
        kind: of the host's model folders.
        name: as a widget gave it, of any origin.

    Returns:
        Its path, inside one of the host's folders of that kind.

    Raises:
        CheckpointError: the host lists no such name.
    """
    path = folder_paths.get_full_path(kind, name) if name in list_models(kind) else None
    if path is None:
        raise CheckpointError(
            f"there is no model file {show(str(name))[:200]!r} among the {kind} that ComfyUI "
            "lists; choose one of the list, after a reload where it is new"
        )
    return Path(path)


def output_folder() -> Path:
    """Find the folder of what the host makes."""
    return Path(folder_paths.get_output_directory())


def new_temporary_path(suffix: str) -> Path:
    """Make a name in the host's temporary folder, which is made where it is missing.

    Args:
        suffix: end of the name.

    Returns:
        A path at which nothing is.
    """
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"turbotalk_{uuid4().hex}{suffix}"
