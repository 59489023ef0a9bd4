"""Model files of every format: the same tensors come out, and a header is read without its data."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from turbotalk_core.checkpoints.tensors import PREFIXES, read_header, read_weights
from turbotalk_core.errors import CheckpointError
from turbotalk_core.safe_io.json import MAX_TEXT

TENSORS = {
    "a.weight": torch.tensor([[1.5, -2.0], [0.25, 8.0]]),
    "a.bias": torch.tensor([0.1, 3.0]),
    "b.weight": torch.tensor([[-4.0], [0.3]], dtype=torch.bfloat16),
    "c.gamma": torch.ones(2, 1, 1, 1, dtype=torch.float16),
}


def _read(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return read_weights(read_header(path), dtype)


def _assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor.to(got[name].dtype)), name


def _shard(folder: Path, stem: str = "model", *, with_index: bool = True) -> list[Path]:
    """Spread the tensors over two files, a weight and its bias apart."""
    paths = [folder / f"{stem}-{number:05}-of-00002.safetensors" for number in (1, 2)]
    names = list(TENSORS)
    for path, part in zip(paths, (names[::2], names[1::2]), strict=True):
        save_file({name: TENSORS[name] for name in part}, path, {"format": "pt"})
    if with_index:
        weight_map = {name: paths[i % 2].name for i, name in enumerate(names)}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return paths


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_one_file_of_either_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path)
    header = read_header(path)
    assert header.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert header.dtypes == {"F32": 2, "BF16": 1, "F16": 1}
    assert (header.files, header.prefix, header.quantization) == ((path,), "", None)
    assert header.num_bytes == path.stat().st_size
    _assert_equal(_read(path), TENSORS)


def test_the_dtype_in_memory_is_the_one_asked_for(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "mixed.safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = _read(tmp_path / "mixed.safetensors", dtype)
        assert {weight.dtype for weight in weights.values()} == {dtype}


@pytest.mark.parametrize("named", ["index", "folder", "first shard", "last shard"])
def test_all_that_stands_for_a_set_of_shards_reads_the_set(tmp_path: Path, named: str) -> None:
    first, last = _shard(tmp_path)
    path = {
        "index": tmp_path / "model.safetensors.index.json",
        "folder": tmp_path,
        "first shard": first,
        "last shard": last,
    }[named]
    header = read_header(path)
    assert header.files == (first, last)
    assert header.metadata == {"format": "pt"}
    assert header.num_bytes == first.stat().st_size + last.stat().st_size
    _assert_equal(_read(path), TENSORS)


def test_shards_need_no_index(tmp_path: Path) -> None:
    first, _ = _shard(tmp_path, with_index=False)
    _assert_equal(_read(first), TENSORS)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    first, last = _shard(tmp_path)
    last.unlink()
    for path in (first, tmp_path, tmp_path / "model.safetensors.index.json"):
        with pytest.raises(CheckpointError, match=rf"of the 2 shards .* 1 are not .*{last.name}"):
            read_header(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no index of shards"),
        ("[]", "is no index of shards"),
        ('{"weight_map": []}', "is no index of shards"),
        ('{"weight_map": ' + '{"a": ' * 100_000, "is no index of shards.*nested"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "is no index of shards.*twice"),
        ('{"weight_map": {"a": ["b"]}}', "is no index of shards"),
        ('{"weight_map": {}}', "names 0 shards"),
        ('{"weight_map": {"a": 1}}', "files of its own folder"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "files of its own folder"),
        ('{"weight_map": {"a": ".."}}', "files of its own folder"),
        ('{"weight_map": {"a": "b/../../c"}}', "files of its own folder"),
        ('{"weight_map": {"a": "/c"}}', "files of its own folder"),
        ('{"weight_map": {"a": "C:c"}}', "files of its own folder"),
        ('{"weight_map": {"a": "b\\\\c"}}', "files of its own folder"),
        ('{"weight_map": {"a": "NUL.safetensors"}}', "files of its own folder"),
        ('{"weight_map": {"a": "b\\u0000"}}', "files of its own folder"),
        ('{"weight_map": {"a": "b\\u202e"}}', "files of its own folder"),
        ('{"weight_map": {"a": "\\uff0e\\uff0e\\uff0fb"}}', "files of its own folder"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"{path.name} .*{message}"):
        read_header(path)


def test_an_index_larger_than_any_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(MAX_TEXT + 1)  # a hole, which takes no room on the disk
    with pytest.raises(CheckpointError, match=r"is no index of shards .*more than"):
        read_header(path)


def test_a_folder_must_have_one_index(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has 0 files"):
        read_header(tmp_path)
    _shard(tmp_path, "one")
    _shard(tmp_path, "two")
    with pytest.raises(CheckpointError, match="has 2 files"):
        read_header(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "gone.safetensors",
        "gone.pth",
        "gone.safetensors.index.json",
        "x" * 300 + ".safetensors",
        "x" * 300 + ".safetensors.index.json",
        "a\0.safetensors",
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"there is no model file .*{name}"):
        read_header(tmp_path / name)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_taken_off_and_told(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in TENSORS.items()}, path)
    assert read_header(path).prefix == prefix
    _assert_equal(_read(path), TENSORS)


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("scale_shape", [(), (1,), (2, 1)])
def test_a_scaled_weight_is_its_values_times_its_scale(
    tmp_path: Path,
    prefix: str,
    stored: torch.dtype,
    scale_name: str,
    scale_shape: tuple[int, ...],
) -> None:
    values = torch.tensor([[1.0, -3.5, 448.0], [0.125, 12.0, 0.0]]).to(stored)
    scale = torch.linspace(0.003, 0.02, max(1, len(scale_shape) and scale_shape[0]))
    tensors = {
        "scaled_fp8": torch.empty(2, dtype=stored),
        "a.weight": values,
        f"a.{scale_name}": scale.reshape(scale_shape),
        "a.scale_input": torch.ones(()),
        "a.bias": torch.tensor([0.1, 3.0]),
    }
    path = tmp_path / "scaled.safetensors"
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    header = read_header(path)
    assert header.quantization == "fp8-scaled"
    assert header.shapes == {"a.weight": (2, 3), "a.bias": (2,)}
    expected = values.float() * (scale.reshape(-1, 1) if scale_shape == (2, 1) else scale)
    for dtype in (torch.float32, torch.bfloat16):
        _assert_equal(
            _read(path, dtype), {"a.weight": expected.to(dtype), "a.bias": tensors["a.bias"]}
        )


def test_fp8_without_scales_is_only_cast(tmp_path: Path) -> None:
    values = torch.tensor([1.0, -3.5]).to(torch.float8_e4m3fn)
    path = tmp_path / "plain.safetensors"
    save_file({"a.weight": values, "a.bias": torch.ones(1)}, path)
    assert read_header(path).quantization == "fp8"
    assert read_header(path).dtypes == {"F8_E4M3": 1, "F32": 1}
    _assert_equal(_read(path), {"a.weight": values.float(), "a.bias": torch.ones(1)})


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_quanto_files_are_read(tmp_path: Path, stored: torch.dtype) -> None:
    values = torch.tensor([[7.0, -3.0], [96.0, 0.0]]).to(stored)
    scale = torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16)
    tensors = {
        "a.weight._data": values,
        "a.weight._scale": scale,
        "a.input_scale": torch.ones(()),
        "a.output_scale": torch.ones(()),
        "a.bias": torch.ones(2, dtype=torch.bfloat16),
    }
    path = tmp_path / "quanto.safetensors"
    save_file(tensors, path)
    assert read_header(path).quantization == "quanto"
    expected = {"a.weight": torch.tensor([[3.5, -1.5], [24.0, 0.0]]), "a.bias": torch.ones(2)}
    _assert_equal(_read(path), expected)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (torch.zeros(4, 2, dtype=torch.uint8), torch.ones(())),  # nvfp4: two values a byte
        (torch.zeros(4, 2, dtype=torch.int8), torch.ones(())),  # may be rotated
        (torch.zeros(4, 2).to(torch.float8_e4m3fn), torch.ones(4, 2, 1)),  # by blocks
        (torch.zeros(4, 2).to(torch.float8_e4m3fn), torch.ones(4)),  # rows or columns?
    ],
)
def test_other_quantisations_are_refused_not_misread(
    tmp_path: Path, values: Tensor, scale: Tensor
) -> None:
    path = tmp_path / "packed.safetensors"
    save_file({"a.weight": values, "a.weight_scale": scale}, path)
    header = read_header(path)
    assert header.quantization == "packed"
    with pytest.raises(CheckpointError, match=r"packed\.safetensors is quantised .*: a\.weight is"):
        read_weights(header, torch.float32)


def test_a_scale_without_its_weight_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"a.scale_weight": torch.ones(1), "b.weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"1 scales without a weight .*a\.scale_weight"):
        read_header(path)


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("a file must not run this",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_would_run_something_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_zip: bool
) -> None:
    path = tmp_path / "harmful.pth"
    if is_zip:
        torch.save({"a.weight": torch.ones(1), "b": _Harmful()}, path)
    else:
        path.write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(CheckpointError, match=r"harmful\.pth is not a readable pickle of tensors"):
        read_header(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": {"b": torch.ones(1)}}, {"a": 1}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"other\.pth is not a readable pickle of tensors by"):
        read_header(path)


def test_a_pickle_may_hold_parameters(tmp_path: Path) -> None:
    path = tmp_path / "parameters.pth"
    torch.save({"a.weight": torch.nn.Parameter(TENSORS["a.weight"])}, path)
    for dtype in (torch.float32, torch.bfloat16):
        weights = _read(path, dtype)
        assert not weights["a.weight"].requires_grad
        _assert_equal(weights, {"a.weight": TENSORS["a.weight"]})


def test_a_pickle_of_before_torch_1_6_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"old\.pth is not .*or take the safetensors file"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7, 400])
def test_a_truncated_pickle_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.pth"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"short\.pth is not a readable pickle"):
        read_header(path)


def test_a_file_larger_than_the_memory_is_named_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.safetensors"
    save_file(TENSORS, path)
    header = read_header(path)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 33 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr("turbotalk_core.checkpoints.tensors.safe_open", refuse)
    with pytest.raises(CheckpointError, match=r"large\.safetensors .* does not fit into memory"):
        read_weights(header, torch.float32)


def test_a_gguf_file_is_sent_to_comfyui(tmp_path: Path) -> None:
    path = tmp_path / "model-Q8_0.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"model-Q8_0\.gguf is a GGUF file, .* ComfyUI"):
        read_header(path)


def _write(path: Path, header: dict[str, object], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("shape", [[0, 2**62], [2**62, 0], [0]])
def test_weights_without_values_are_refused_whatever_size_they_claim(
    tmp_path: Path, shape: list[int]
) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    path = _write(tmp_path / "empty.safetensors", {"a.weight": entry}, b"")
    with pytest.raises(CheckpointError, match=r"1 tensors without values \(first: a\.weight"):
        read_header(path)


def test_marks_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "marked.safetensors"
    save_file({"scaled_fp8": torch.empty(0), "a.weight": torch.ones(1)}, path)
    _assert_equal(_read(path), {"a.weight": torch.ones(1)})


@pytest.mark.parametrize(("dtype", "num_bytes"), [("F4", 4), ("F6_E2M3", 6), ("C64", 64)])
def test_types_that_are_no_weights_are_told_and_not_read(
    tmp_path: Path, dtype: str, num_bytes: int
) -> None:
    entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, num_bytes]}
    path = _write(tmp_path / "odd.safetensors", {"a.weight": entry}, bytes(num_bytes))
    assert read_header(path).dtypes == {dtype: 1}
    with pytest.raises(CheckpointError, match=rf"odd\.safetensors has tensors of type {dtype}"):
        _read(path)
