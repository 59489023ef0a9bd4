"""Shards return the stored samples, or an error that names the damaged file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.data.reading import read_sample
from training.data.resumable_stage import SKIPPED, ItemLog, Work
from training.data.shards import (
    INDEX,
    OPEN_SHARDS,
    Sample,
    ShardReader,
    describe_sample,
    is_whole,
    read_manifest,
    write_shard,
)
from turbotalk_core.errors import MismatchError, OutputError


def make_sample(seed: int, *, num_latents: int = 3, tokens: int = 0) -> Sample:
    """Make a sample of random numbers, 16 x 32 pixels, one voice of 20 frames."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    return Sample(
        opening_CFHW=draw(16, num_latents, 2, 4),
        later_CFHW=draw(16, num_latents, 2, 4),
        reference_CFHW=draw(16, 2, 2, 4),
        weight_HW=draw(2, 4),
        features_PTLD=draw(1, 45, 2, 3),
        sound_PS=torch.ones(1, 20 * 640, dtype=torch.int16),
        text_ND=draw(tokens, 5) if tokens else None,
    )


def write(folder: Path, samples: dict[str, Sample], name: str = "00-of-01-000000") -> list[Any]:
    """Write a shard and its manifest lines."""
    shard = write_shard(folder, name, list(samples.values()))
    records = [
        {"key": key, **describe_sample(sample), **shard, INDEX: index}
        for index, (key, sample) in enumerate(samples.items())
    ]
    ItemLog(folder, Work()).append(records)
    return records


def test_samples_come_back(tmp_path: Path) -> None:
    samples = {"b": make_sample(0), "a": make_sample(1, tokens=4)}
    write(tmp_path, samples)
    ItemLog(tmp_path, Work()).append([{"key": "c", SKIPPED: "it is damaged"}])
    records = read_manifest(tmp_path)
    assert [record["key"] for record in records] == ["a", "b"]
    reader = ShardReader(tmp_path)
    for record in records:
        tensors = read_sample(reader, record)
        expected = samples[record["key"]].tensors()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_everybody_may_read_a_shard(tmp_path: Path) -> None:
    (record,) = write(tmp_path, {"a": make_sample(0)})
    other = tmp_path / "other"
    other.touch()
    assert (tmp_path / record["shard"]).stat().st_mode == other.stat().st_mode


def test_few_files_are_open_at_once(tmp_path: Path) -> None:
    count = OPEN_SHARDS + 8
    records = [
        record
        for number in range(count)
        for record in write(tmp_path, {f"{number}": make_sample(number)}, f"00-of-01-{number:06d}")
    ]
    reader = ShardReader(tmp_path)
    before = _count_open_files()
    for record in records:
        reader.read(record, "weight_HW")
    assert _count_open_files() - before <= OPEN_SHARDS
    assert torch.equal(reader.read(records[0], "weight_HW"), make_sample(0).weight_HW)


def _count_open_files() -> int:
    """Count the files that this process has open or mapped."""
    folder = Path("/proc/self/map_files")
    if not folder.exists():
        pytest.skip("only Linux tells which files are open")
    maps = Path("/proc/self/maps").read_text()
    return maps.count(".safetensors")


class TestDamage:
    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        (record,) = write(tmp_path, {"a": make_sample(0)})
        (tmp_path / record["shard"]).unlink()
        assert not is_whole(tmp_path, record)
        with pytest.raises(OutputError, match=r"00-of-01-000000\.safetensors .*run precompute"):
            read_manifest(tmp_path)
        with pytest.raises(OutputError, match=r"cannot read weight_HW of a from .*000000"):
            ShardReader(tmp_path).read(record, "weight_HW")

    def test_a_shard_that_is_cut_is_named(self, tmp_path: Path) -> None:
        (record,) = write(tmp_path, {"a": make_sample(0)})
        path = tmp_path / record["shard"]
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(OutputError, match=rf"{path.stat().st_size} bytes, and it should have"):
            read_manifest(tmp_path)
        with pytest.raises(OutputError, match=r"cannot read weight_HW of a"):
            ShardReader(tmp_path).read(record, "weight_HW")

    @pytest.mark.parametrize(
        "name",
        ["../a.safetensors", "a.safetensors", "/a", "shards/../../a", "shards/..", "shards/a/b",
         "shards/", "shards\\a", "shards/a\0", "shards/C:a", "shards/NUL", "shards/\u202ea", None,
         3],
    )  # fmt: skip
    def test_a_manifest_names_no_file_of_another_folder(self, tmp_path: Path, name: Any) -> None:
        (record,) = write(tmp_path, {"a": make_sample(0)})
        ItemLog(tmp_path, Work()).append([record | {"key": "b", "shard": name}])
        with pytest.raises(OutputError, match="which is no file of its folder shards"):
            read_manifest(tmp_path)

    def test_a_shard_of_other_samples_is_named(self, tmp_path: Path) -> None:
        (record,) = write(tmp_path, {"a": make_sample(0)})
        write_shard(tmp_path, "00-of-01-000000", [make_sample(0, num_latents=4)])
        with pytest.raises(MismatchError, match=r"opening_CFHW of a in .*\(16, 4, 2, 4\)"):
            ShardReader(tmp_path).read(record, "opening_CFHW")
        with pytest.raises(OutputError, match="cannot read text_ND of a"):
            ShardReader(tmp_path).read(record, "text_ND")
