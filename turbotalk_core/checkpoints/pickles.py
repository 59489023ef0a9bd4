"""Tensors out of a pickle that may contain nothing else.

Input: a file that ``torch.save`` wrote. Output: its tensors by name, mapped from the file. A pickle
can name code to run, so the names are compared with a list before unpickling. Pickles
are never written.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

import torch
from torch import Tensor

MAX_DESCRIPTION = 2**21  # bytes of the pickle itself; those of the largest public files are a tenth
# All names in a pickle of tensors. torch's own list is longer, and any code in the same process may
# have added to it.
ALLOWED = {
    "collections OrderedDict",
    "torch.storage UntypedStorage",
    *(f"torch._utils _rebuild_{what}" for what in ("tensor_v2", "tensor_v3", "parameter")),
    *(
        f"torch {kind}Storage"
        for kind in (
            "Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"
        )
    ),
    "torch float8_e4m3fn",
    "torch float8_e5m2",
}  # fmt: skip
_NAMING = ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")  # opcodes that import code
_SHARING = 2  # times that a file's bytes may be used: one matrix often has two names


def load_pickle(file: Path) -> dict[str, Tensor]:
    """Load a pickle of tensors, memory-mapped: their data are read when they are used.

    Args:
        file: file in the format that ``torch.save`` writes since torch 1.6.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        ValueError: if the file is missing or damaged, unpacks to more than its size, imports code,
            or contains anything but tensors by name.
    """
    try:
        named = _list_names(file)
        if foreign := sorted(named - ALLOWED):
            raise ValueError(f"it asks for {foreign[0]}, and may hold tensors alone")
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        tensors = dict(dict.items(loaded))  # not loaded.items(), which a pickle may have set
    except Exception as error:  # on damaged files these readers raise errors of any class
        raise ValueError(str(error) or type(error).__name__) from error
    if not all(_is_plain(name, tensor) for name, tensor in tensors.items()):
        raise ValueError("it holds more than tensors by name")
    used = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if used > _SHARING * file.stat().st_size:
        raise ValueError(f"its tensors would have {used} bytes, more than the file")
    return tensors


def _list_names(file: Path) -> set[str]:
    """List the code that a pickle names, module and name, without importing any."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch's own files are not")
        described = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(described) != 1 or described[0].file_size > MAX_DESCRIPTION:
            raise ValueError(f"its tensors are not described once, in {MAX_DESCRIPTION} bytes")
        data = archive.read(described[0])
    return {
        str(argument) for opcode, argument, _ in pickletools.genops(data) if opcode.name in _NAMING
    }


def _is_plain(name: object, tensor: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
    )
