"""Prepared samples on disk: safetensors shards, and the manifest that says what is in them.

    PREPARED/settings.json             how it was made, with a fingerprint of the model files
    PREPARED/items-00-of-01.jsonl      the manifest: one line per sample, of one process
    PREPARED/shards/…safetensors       some samples each
    PREPARED/null_text.safetensors     the embedding of the empty prompt, where prompts are encoded

In: encoded samples. Out: the same, one at a time. A shard appears under its name only when it is
whole, and the manifest tells of it only afterwards. Separate because writer, reader and inspection
must agree on the names in a file.

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

from training.data.stage import SKIPPED, Record, read_journals
from turbotalk_core.errors import MismatchError, OutputError
from turbotalk_core.geometry import LATENT_CHANNELS, SPATIAL_STRIDE
from turbotalk_core.safe_io.paths import is_plain_name
from turbotalk_core.video.files import make_folder, write_bytes

SHARDS = "shards"
NULL_TEXT = "null_text.safetensors"
OPEN_SHARDS = 32  # files that a reader holds open

SHARD, BYTES, INDEX = "shard", "shard_bytes", "index"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A shot, encoded.

    Attributes:
        opening_CFHW: normalised latents of the clip that begins with the reference image.
        later_CFHW: of the later clip, encoded from its own first frame, as motion frames are.
        reference_CFHW: of [reference image, grey, grey, ...], without what only repeats the last.
        weight_HW: how much each place moves, as a weight of mean 1.
        features_PTLD: audio features of each voice, of the whole shot and a tail of silence.
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
        """Give what there is, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def fill_reference(reference_CFHW: Tensor, num_latents: int) -> Tensor:
    """Give a reference its whole length again: its last latent frame repeats.

    Args:
        reference_CFHW: as a sample has it.
        num_latents: wanted.

    Returns:
        [C, num_latents, H, W].
    """
    missing = num_latents - reference_CFHW.shape[1]
    tail = reference_CFHW[:, -1:].expand(-1, max(0, missing), -1, -1)
    return torch.cat((reference_CFHW[:, :num_latents], tail), 1)


def write_shard(folder: Path, name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Write a shard.

    Args:
        folder: the prepared set.
        name: of the shard, without suffix.
        samples: to put into it.

    Returns:
        What the manifest lines of all its samples say of it.

    Raises:
        OutputError: the disk refused.
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
    """Write a safetensors file that is whole or not there.

    Args:
        path: of the file; its folder is made.
        tensors: by name.

    Raises:
        OutputError: the disk refused.
    """
    make_folder(path.parent)
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def describe_sample(sample: Sample) -> dict[str, int]:
    """Tell the sizes of a sample, for its manifest line; a reader holds the tensors to them."""
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
    """Tell whether the shard of a manifest line is there, in its full size."""
    path = folder / record[SHARD]
    return path.is_file() and path.stat().st_size == record[BYTES]


def read_manifest(folder: Path) -> list[Record]:
    """Read the lines of all samples of a prepared set.

    Args:
        folder: the prepared set.

    Returns:
        Lines of samples that were made, sorted by key.

    Raises:
        OutputError: a shard that is missing, cut short or not in the set's own folder, or a line
            that is damaged.
    """
    records = [record for record in read_journals(folder).values() if SKIPPED not in record]
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
    """Reads samples, holding a limited number of files open; may be shared by threads."""

    def __init__(self, folder: Path) -> None:
        """Remember where shards are.

        Args:
            folder: the prepared set.
        """
        self._folder = folder
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def read(self, record: Record, name: str) -> Tensor:
        """Read one tensor of a sample.

        Args:
            record: its manifest line.
            name: of a field of ``Sample``.

        Returns:
            The tensor as it is stored.

        Raises:
            OutputError: the shard is missing or damaged.
            MismatchError: the tensor has not the shape that the manifest tells.
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
            want not in (None, got) for want, got in zip(expected, tensor.shape, strict=True)
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
