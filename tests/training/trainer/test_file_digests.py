"""Digests of data and weights: what changes them, and what does not."""

from __future__ import annotations

from pathlib import Path

from tests.training.toy import make_recipe
from training.recipe import WeightSource
from training.trainer.file_digests import BLOCK, NUM_BLOCKS, digest_file, digest_run


def test_any_part_of_a_small_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = bytearray(3 * BLOCK + 17)
    path.write_bytes(data)
    first = digest_file(path)
    for place in (0, BLOCK, 2 * BLOCK + 5, len(data) - 1):
        changed = bytearray(data)
        changed[place] = 1
        path.write_bytes(changed)
        assert digest_file(path) != first
    path.write_bytes(data)
    assert digest_file(path) == first
    path.write_bytes(data + b"0")
    assert digest_file(path) != first


def test_of_a_large_file_blocks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    size = 4 * NUM_BLOCKS * BLOCK
    with path.open("wb") as file:
        file.truncate(size)  # takes no space on the disk
    first = digest_file(path)
    with path.open("r+b") as file:  # as another training changes it: everywhere
        for start in range(0, size, BLOCK):
            file.seek(start)
            file.write(b"1")
    assert digest_file(path) != first


def test_a_run_has_its_data_and_its_weights(tmp_path: Path) -> None:
    dit = tmp_path / "dit.safetensors"
    dit.write_bytes(b"weights")
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "1.safetensors").write_bytes(b"more")

    class Samples:
        digest = "d"

    recipe = make_recipe(
        weights={"teacher": WeightSource(dit=dit, adapter=folder), "judge": WeightSource()}
    )
    digests = digest_run(recipe, [Samples(), object()])
    assert digests == {
        "the data of phase first": "d",
        "weights.teacher.dit": digest_file(dit),
        "weights.teacher.adapter": digest_file(folder),
    }
