"""Named tensors out of model files of every format.

Input: one safetensors file, a sharded set, or a pickle that holds nothing but tensors. Output:
first a header (names, shapes, dtypes, without the data), then the weights under the public names,
without prefix, dequantised. Which model a file contains is the subject of ``inspect``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, TurboTalkError
from ..safe_io.json import parse_json, read_small
from ..safe_io.paths import is_file, is_folder, is_plain_name
from ..safe_io.tensor_header import read_tensor_header
from .pickles import load_pickle

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
FLOAT8 = ("F8_E4M3", "F8_E5M2")

_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
_PICKLES = (".pth", ".pt", ".bin")
_DTYPES = {  # torch's dtypes to safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# A stored weight times its scale is the weight. Suffixes: ComfyUI's and kijai's, ComfyUI's since
# its mixed quantisation, optimum-quanto's (whose weight itself is named ``weight._data``).
_SCALES = {".scale_weight": ".weight", ".weight_scale": ".weight", "._scale": ""}
_DATA = "._data"
# Scales of activations, and markers for ComfyUI's own matrix products: not part of a weight.
_NO_WEIGHTS = (".scale_input", ".input_scale", ".output_scale", ".comfy_quant")
_MARK = "scaled_fp8"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor as a header describes it.

    Attributes:
        file: file that contains the tensor.
        name: name of the tensor in the file.
        shape: shape of the tensor.
        dtype: safetensors' name of its dtype, such as BF16.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightHeader:
    """Header of a model file, or of a set of shards.

    Attributes:
        path: path given to ``read_header``.
        files: all files of the set.
        tensors: entries of the weights by public name, without prefix.
        scales: entries of the quantisation scales by the name of the weight they belong to.
        prefix: prefix of all names in the file; often empty.
        dtypes: number of tensors stored in each dtype, including scales and markers.
        metadata: metadata of the safetensors files; for each key, that of the first file with it.
        num_bytes: size of all files together.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    scales: dict[str, StoredTensor]
    prefix: str
    dtypes: dict[str, int]
    metadata: dict[str, str]
    num_bytes: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    @property
    def quantization(self) -> str | None:
        """Kind of quantisation of the weights: fp8, fp8-scaled, quanto, packed or None."""
        if not self.scales:
            has_float8 = any(stored.dtype in FLOAT8 for stored in self.tensors.values())
            return "fp8" if has_float8 else None
        if not all(self._can_scale(name) for name in self.scales):
            return "packed"
        is_quanto = any(self.tensors[name].name.endswith(_DATA) for name in self.scales)
        return "quanto" if is_quanto else "fp8-scaled"

    def _can_scale(self, name: str) -> bool:
        weight, scale = self.tensors[name], self.scales[name]
        # ComfyUI's int8 weights may be rotated in addition; optimum-quanto's are plain products.
        is_plain = weight.dtype in FLOAT8 or (weight.dtype == "I8" and weight.name.endswith(_DATA))
        per_row = (*weight.shape[:1], *[1] * (len(weight.shape) - 1))
        return is_plain and (scale.numel == 1 or scale.shape == per_row)


def read_header(path: Path) -> WeightHeader:
    """Read names, shapes and dtypes of all tensors without their data.

    Args:
        path: a safetensors file; a pickle of tensors (.pth, .pt, .bin); or, for a whole sharded
            set, one of its shards, its index file, or a folder with one index file.

    Returns:
        The header.

    Raises:
        CheckpointError: if a file is missing or cannot be read.
    """
    path = Path(path)
    files = _list_files(path)
    stored: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        tensors, file_metadata = _read_pickle(file) if _is_pickle(file) else _read_safetensors(file)
        stored |= {tensor.name: tensor for tensor in tensors}
        metadata = file_metadata | metadata
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in stored)), "")
    weights: dict[str, StoredTensor] = {}
    scales: dict[str, StoredTensor] = {}
    dtypes: dict[str, int] = {}
    for name, tensor in stored.items():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
        name = name.removeprefix(prefix)
        if name == _MARK or name.endswith(_NO_WEIGHTS):
            continue
        for suffix, replacement in _SCALES.items():
            if name.endswith(suffix):
                scales[name.removesuffix(suffix) + replacement] = tensor
                break
        else:
            weights[name.removesuffix(_DATA)] = tensor
    empty = [name for name, tensor in weights.items() if not tensor.numel]
    if empty:
        raise CheckpointError(
            f"{path.name} has {len(empty)} tensors without values (first: {empty[0]}); the file is "
            "damaged: download it again"
        )
    unmatched = [scale.name for name, scale in scales.items() if name not in weights]
    if unmatched:
        raise CheckpointError(
            f"{path.name} has {len(unmatched)} scales without a weight (first: {unmatched[0]}); "
            "the file is incomplete: download it again"
        )
    return WeightHeader(
        path=path,
        files=files,
        tensors=weights,
        scales=scales,
        prefix=prefix,
        dtypes=dtypes,
        metadata=metadata,
        num_bytes=sum(file.stat().st_size for file in files),
    )


def read_weights(header: WeightHeader, dtype: torch.dtype) -> dict[str, Tensor]:
    """Load the weights one after the other and apply their quantisation scales.

    Args:
        header: result of ``read_header``.
        dtype: dtype of all weights in memory, whatever they are stored in; products with a scale
            are computed in float32 and rounded once.

    Returns:
        The weights by public name, on the CPU.

    Raises:
        CheckpointError: if a file is damaged or does not fit into memory, or the weights are
            quantised in an unsupported way.
    """
    if header.quantization == "packed":
        name = next(name for name in header.scales if not header._can_scale(name))
        weight, scale = header.tensors[name], header.scales[name]
        raise CheckpointError(
            f"{header.path.name} is quantised in a way that TurboTalk does not read: {name} is "
            f"{weight.dtype} {weight.shape} with a scale of {scale.shape}; use an fp16, bf16, fp8 "
            "or fp8-scaled file with one scale per weight or per row"
        )
    unknown = {stored.dtype for stored in header.tensors.values()} - set(_DTYPES.values())
    if unknown:
        raise CheckpointError(
            f"{header.path.name} has tensors of type {', '.join(sorted(unknown))}, which TurboTalk "
            "does not read; use an fp16, bf16, fp8 or fp8-scaled file"
        )
    weights: dict[str, Tensor] = {}
    with ExitStack() as stack:
        read = {file: stack.enter_context(_open_tensors(file)) for file in header.files}
        for name, stored in header.tensors.items():
            weight = read[stored.file](stored.name)
            scale = header.scales.get(name)
            if scale is not None:
                factor = read[scale.file](scale.name).float()
                weight = weight.float() * (factor.reshape(()) if scale.numel == 1 else factor)
            weights[name] = weight.detach().to(dtype)  # a pickle may hold parameters
    return weights


def _list_files(path: Path) -> tuple[Path, ...]:
    folder = path.parent
    if is_folder(path):
        indexes = sorted(path.glob(f"*{_INDEX}"))
        if len(indexes) != 1:
            raise CheckpointError(
                f"the folder {path} has {len(indexes)} files *{_INDEX}; with exactly one it stands "
                "for a sharded model, so name a file instead"
            )
        folder, path = path, indexes[0]
    shard = _SHARD.fullmatch(path.name)
    if path.name.endswith(_INDEX):
        names = _read_index(path)
    elif shard:
        names = [
            f"{shard['stem']}-{number:05}-of-{shard['count']}.safetensors"
            for number in range(1, int(shard["count"]) + 1)
        ]
    else:
        names = [path.name]
    missing = [name for name in names if not is_file(folder / name)]
    if missing == [path.name]:
        raise CheckpointError(f"there is no model file {path}")
    if missing:
        raise CheckpointError(
            f"of the {len(names)} shards of {path.name}, {len(missing)} are not in {folder} "
            f"(first: {missing[0]}); download them to the same folder"
        )
    return tuple(folder / name for name in names)


def _read_index(path: Path) -> list[str]:
    if not is_file(path):
        raise CheckpointError(f"there is no model file {path}")
    try:
        names = set(parse_json(read_small(path))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path.name} is no index of shards ({type(error).__name__}: {error}); download it "
            "again"
        ) from error
    if not names or not all(is_plain_name(name) for name in names):
        raise CheckpointError(
            f"{path.name} names {len(names)} shards; it must name files of its own folder: "
            "download it again"
        )
    return sorted(names)


def _is_pickle(file: Path) -> bool:
    return file.suffix.lower() in _PICKLES


def _read_safetensors(file: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    with _reports_read_errors(file, "safetensors file"):
        entries, metadata = read_tensor_header(file)
    return [
        StoredTensor(file=file, name=name, shape=entry.shape, dtype=entry.dtype)
        for name, entry in entries.items()
    ], metadata


def _read_pickle(file: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    tensors = [
        StoredTensor(
            file=file,
            name=name,
            shape=tuple(tensor.shape),
            dtype=_DTYPES.get(tensor.dtype, str(tensor.dtype)),
        )
        for name, tensor in _load_pickle(file).items()
    ]
    return tensors, {}


def _load_pickle(file: Path) -> Mapping[str, Tensor]:
    with _reports_read_errors(file, "pickle of tensors by name"):
        return load_pickle(file)


@contextmanager
def _open_tensors(file: Path) -> Iterator[Callable[[str], Tensor]]:
    if _is_pickle(file):
        yield _load_pickle(file).__getitem__
        return
    with _reports_read_errors(file, "safetensors file"):
        reader: Any = safe_open(file, framework="pt")
    with reader:

        def read(name: str) -> Tensor:
            with _reports_read_errors(file, "safetensors file"):
                return reader.get_tensor(name)

        yield read


@contextmanager
def _reports_read_errors(file: Path, what: str) -> Iterator[None]:
    """Raise a reader's error as a ``CheckpointError`` that names the file."""
    try:
        yield
    except TurboTalkError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "allocate memory" in reason:
            raise CheckpointError(
                f"{file.name} has {file.stat().st_size / 1e9:.1f} GB and does not fit into memory; "
                "take a smaller (fp8) file, or shards"
            ) from error
        if file.suffix.lower() == ".gguf":
            raise CheckpointError(
                f"{file.name} is a GGUF file, which only ComfyUI reads, with a pack that loads "
                "GGUF; its MODEL works with TurboTalk's nodes"
            ) from error
        instead = ", or take the safetensors file of the same model" if _is_pickle(file) else ""
        raise CheckpointError(
            f"{file.name} is not a readable {what} ({reason}); download it again{instead}"
        ) from error
