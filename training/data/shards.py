"""Storage of prepared samples: safetensors shards, and a manifest of their contents.

    PREPARED/settings.json             settings of the set, with a fingerprint of the model files
    PREPARED/items-00-of-01.jsonl      manifest of one process: one line per sample
    PREPARED/shards/…safetensors       several samples each
    PREPARED/null_text.safetensors     embedding of the negative prompt, if prompts are encoded

A shard gets its name only when it is complete, and its manifest lines are written after that.
Writer, reader and inspection share this module, because they must agree on the names in a file.

Axes: C channels, F latent frames, H height, W width, P voices, T video frames, L encoder layers,
D width, S audio samples, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from training.data.resumable_stage import SKIPPED, Record, read_records
from training.outputs import check_letters
from turbotalk_core.errors import MismatchError, OutputError
from turbotalk_core.geometry import LATENT_CHANNELS, SPATIAL_STRIDE
from turbotalk_core.safe_io.atomic import make_folder, write_bytes
from turbotalk_core.safe_io.paths import is_plain_name

SHARDS = "shards"
NULL_TEXT = "null_text.safetensors"
OPEN_SHARDS = 32  # files that a reader keeps open

SHARD, BYTES, INDEX = "shard", "shard_bytes", "index"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Encoded shot.

    Attributes:
        opening_CFHW: normalised latents of the clip that begins with the reference image.
        later_CFHW: latents of the later clip, encoded from its own first frame, like motion frames.
        reference_CFHW: latents of [reference image, grey, grey, ...], without repetitions at the
            end.
        weight_HW: loss weight of each place by its motion, mean 1.
        features_PTLD: audio features of each voice, for the whole shot and a tail of silence.
        sound_PS: the voices themselves, 16 kHz, 16 bits.
        image_ND: CLIP tokens of the reference image, or None.
        text_ND: embedding of the caption, or None.
    """

    opening_CFHW: Tensor
    later_CFHW: Tensor
    reference_CFHW: Tensor
    weight_HW: Tensor
    features_PTLD: Tensor
    sound_PS: Tensor
    image_ND: Tensor | None = None
    text_ND: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def fill_reference(reference_CFHW: Tensor, num_latents: int) -> Tensor:
    """Extend a stored reference to its full length by repeating its last latent frame.

    Args:
        reference_CFHW: reference of a sample.
        num_latents: target number of latent frames.

    Returns:
        Latents, [C, num_latents, H, W].
    """
    missing = num_latents - reference_CFHW.shape[1]
    tail = reference_CFHW[:, -1:].expand(-1, max(0, missing), -1, -1)
    return torch.cat((reference_CFHW[:, :num_latents], tail), 1)


def write_shard(folder: Path, name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Write a shard.

    Args:
        folder: folder of the prepared set.
        name: name of the shard, without suffix.
        samples: samples of the shard.

    Returns:
        Facts about the shard for the manifest lines of all its samples.

    Raises:
        OutputError: if the file cannot be written.
    """
    path = folder / SHARDS / f"{name}.safetensors"
    write_tensors(
        path,
        {
            f"{index}.{field}": tensor
            for index, sample in enumerate(samples)
            for field, tensor in sample.tensors().items()
        },
    )
    return {SHARD: f"{SHARDS}/{path.name}", BYTES: path.stat().st_size}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically.

    Args:
        path: file to write; its folder is created.
        tensors: tensors by name.

    Raises:
        OutputError: if the file cannot be written.
    """
    make_folder(path.parent)
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def describe_sample(sample: Sample) -> dict[str, int]:
    """Return the sizes of a sample for its manifest line; the reader checks tensors by them."""
    _, num_latents, rows, columns = sample.opening_CFHW.shape
    num_voices, num_rows, num_layers, feature_width = sample.features_PTLD.shape
    return {
        "num_latents": num_latents,
        "height": rows * SPATIAL_STRIDE,
        "width": columns * SPATIAL_STRIDE,
        "num_voices": num_voices,
        "num_rows": num_rows,
        "num_layers": num_layers,
        "feature_width": feature_width,
        "image_tokens": 0 if sample.image_ND is None else len(sample.image_ND),
        "text_tokens": 0 if sample.text_ND is None else len(sample.text_ND),
    }


def is_whole(folder: Path, record: Record) -> bool:
    """Return whether the shard of a manifest line exists with its full size."""
    path = folder / record[SHARD]
    return path.is_file() and path.stat().st_size == record[BYTES]


def read_manifest(folder: Path) -> list[Record]:
    """Read the manifest lines of all samples of a prepared set.

    Args:
        folder: folder of the prepared set.

    Returns:
        Lines of complete samples, sorted by key.

    Raises:
        OutputError: if a shard is missing, truncated or outside the set's folder, or a line is
            damaged.
    """
    records = [record for record in read_records(folder).values() if SKIPPED not in record]
    for record in records:
        parent, _, name = str(record.get(SHARD)).rpartition("/")
        if parent != SHARDS or not is_plain_name(name):
            raise OutputError(
                f"the manifest of {folder} names the shard {record.get(SHARD)!r}, which is no file "
                f"of its folder {SHARDS}; get the set again"
            )
    sizes = {record[SHARD]: record for record in records}
    for name, record in sizes.items():
        if not is_whole(folder, record):
            path = folder / name
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise OutputError(
                f"{path} is damaged: {found}, and it should have {record[BYTES]}; run precompute "
                "again, which makes its samples anew"
            )
    return records


class ShardReader:
    """Reader of samples with a limited number of open files; threads may share it."""

    def __init__(self, folder: Path) -> None:
        """Store the folder; no shard is opened yet.

        Args:
            folder: folder of the prepared set.

        Raises:
            OutputError: if its path is not UTF-8.
        """
        check_letters(folder)
        self._folder = folder
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def read(self, record: Record, name: str) -> Tensor:
        """Read one tensor of a sample.

        Args:
            record: manifest line of the sample.
            name: name of a field of ``Sample``.

        Returns:
            The tensor as it is stored.

        Raises:
            OutputError: if the shard is missing or damaged.
            MismatchError: if the shape of the tensor differs from the manifest.
        """
        path = self._folder / record[SHARD]
        try:
            tensor = self._open(path).get_tensor(f"{record[INDEX]}.{name}")
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"cannot read {name} of {record['key']} from {path} ({error}); delete that shard "
                "and run precompute again, which makes its samples anew"
            ) from error
        expected = _expect_shape(record, name)
        if tensor.ndim != len(expected) or any(
            size not in (None, got) for size, got in zip(expected, tensor.shape, strict=True)
        ):
            raise MismatchError(
                f"{name} of {record['key']} in {path} has the shape {tuple(tensor.shape)}, its "
                f"manifest line says {expected}; delete that shard and run precompute again"
            )
        return tensor

    @staticmethod
    def _open_shard(path: Path) -> Any:
        return safe_open(path, framework="pt")


def _expect_shape(record: Record, name: str) -> tuple[int | None, ...]:
    rows, columns = record["height"] // SPATIAL_STRIDE, record["width"] // SPATIAL_STRIDE
    clip = (LATENT_CHANNELS, record["num_latents"], rows, columns)
    voices = record["num_voices"]
    return {
        "opening_CFHW": clip,
        "later_CFHW": clip,
        "reference_CFHW": (LATENT_CHANNELS, None, rows, columns),
        "weight_HW": (rows, columns),
        "features_PTLD": (
            voices,
            record["num_rows"],
            record["num_layers"],
            record["feature_width"],
        ),
        "sound_PS": (voices, None),
        "image_ND": (record["image_tokens"], None),
        "text_ND": (record["text_tokens"], None),
    }[name]
