"""Damaged files at all entry points: accepted or a TurboTalkError, with bounded memory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from tests.core.entry_points import (
    TARGETS,
    corpus,
    damage,
    feed,
    make_models,
    make_pictures,
    make_videos,
)

NUM_DAMAGED = 40  # of each file
ROOM = 2**28  # bytes that a small file may make this process grow by


@pytest.mark.parametrize("name", TARGETS)
def test_a_whole_file_is_taken(name: str) -> None:
    target = TARGETS[name]
    assert target.seeds()
    for data in target.seeds():
        target.entry_point(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_taken_or_refused(name: str) -> None:
    taken = [feed(TARGETS[name].entry_point, data) for data in corpus(TARGETS[name], NUM_DAMAGED)]
    assert not all(taken)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "prompts"])  # any text is one
@given(st.binary(max_size=200))
def test_what_was_never_a_file_is_refused(name: str, data: bytes) -> None:
    assert not feed(TARGETS[name].entry_point, data)


def test_damage_follows_from_its_seed() -> None:
    data = bytes(range(256))
    assert damage(data, 3) == damage(data, 3)
    assert len({damage(data, seed) for seed in range(20)}) > 15


KINDS = ("transformer", "adapter", "vae", "encoder", "lora")
WORDS = st.none() | st.booleans() | st.integers(-3, 2**64) | st.floats() | st.text(max_size=5)
CLAIMS = ("num_heads", "audio_heads", "text_dim", "num_hidden_layers", "conv_stride", "conv_dim",
          "hidden_size", "num_conv_pos_embeddings", "layer_norm_eps", "steps", "height", "shift",
          "chunk_frames", "kind", "transformer")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_model_file_of_other_names_and_shapes_is_taken_or_refused(
    kind: str, data: st.DataObject
) -> None:
    tensors = load(make_models()[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        match data.draw(st.integers(0, 3)):
            case 0:
                shape = data.draw(st.lists(st.integers(0, 5), max_size=5))
                tensors[name] = torch.ones(shape, dtype=torch.float16)
            case 1:
                del tensors[name]
            case 2:
                tensors[name.replace("0", str(data.draw(st.integers(0, 2**40))))] = tensors[
                    name
                ].clone()
            case _:
                tensors[name + ".scale_weight"] = torch.ones(data.draw(st.integers(0, 3)))
        if not tensors:
            break
    claims = st.dictionaries(
        st.sampled_from(CLAIMS),
        WORDS | st.lists(WORDS, max_size=3) | st.dictionaries(st.sampled_from(CLAIMS), WORDS),
        max_size=3,
    )
    metadata = {
        name: json.dumps(data.draw(claims))
        for name in data.draw(st.sets(st.sampled_from(("config", "turbotalk"))))
    }
    feed(TARGETS["model"].entry_point, save(tensors, metadata))


# --- small files that claim to be large ---------------------------------------------------------


def _header(length: int) -> bytes:
    return struct.pack("<Q", length) + b"{}"


def _one_tensor(shape: list[int], num_bytes: int, name: str = "head.modulation") -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, num_bytes]}
    text = json.dumps({name: entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def _tensors(shapes: dict[str, list[int]]) -> bytes:
    """Make a file of float8 zeros."""
    header, edge = {}, 0
    for name, shape in shapes.items():
        size = 1
        for side in shape:
            size *= side
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [edge, edge + size]}
        edge += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(edge)


def _png(width: int, height: int) -> bytes:
    data = make_pictures()["png"]
    start = data.index(b"IHDR")
    chunk = b"IHDR" + struct.pack(">II", width, height) + data[start + 12 : start + 17]
    checked = chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:start] + checked + data[start + 21 :]


def _mov_of(width: int, height: int) -> bytes:
    """Make a video whose track and header declare a given size."""
    data = make_videos()["mov"]
    small, large = struct.pack(">II", 32, 16), struct.pack(">II", width, height)
    data = data.replace(b"IHDR" + small, b"IHDR" + large)
    start = data.rindex(b"png ") + 4 + 24  # of the sample entry, ISO/IEC 14496-12, 12.1.3
    assert data[start : start + 4] == struct.pack(">HH", 32, 16)
    return data[:start] + struct.pack(">HH", width, height) + data[start + 4 :]


def _mp4_of(num_frames: int) -> bytes:
    """Make a video whose tables declare a number of frames, of one byte each.

    The tables are stsz (size and count), stsc (frames in a chunk) and stts (count and duration);
    ISO/IEC 14496-12, 8.6 and 8.7.
    """
    data = bytearray(make_videos()["mp4"])
    start = data.index(b"stsz")
    data[start + 8 : start + 16] = struct.pack(">II", 1, num_frames)
    for table, place in ((b"stsc", 16), (b"stts", 12)):
        start = data.index(table) + place
        data[start : start + 4] = struct.pack(">I", num_frames)
    return bytes(data)


def _wav(sample_rate: int, num_channels: int, claimed: int, data: bytes) -> bytes:
    width = 2 * num_channels
    told = struct.pack(
        "<IHHIIHH", 16, 1, num_channels, sample_rate, sample_rate * width % 2**32, width, 16
    )
    size = struct.pack("<I", claimed)
    return b"RIFF" + size + b"WAVEfmt " + told + b"data" + size + data


def _pickle_bomb() -> bytes:
    file = BytesIO()
    with (
        zipfile.ZipFile(BytesIO(make_models()["pickle"])) as whole,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            data = whole.read(name)
            bomb.writestr(name, bytes(2**28) if name.endswith("data.pkl") else data)
    return file.getvalue()


BOMBS = {
    **{f"header of {n} bytes": ("model", lambda n=n: _header(n)) for n in (2**27, 2**33, 2**63)},
    "tensor of terabytes": ("model", lambda: _one_tensor([2**40], 4)),
    "tensor without values": ("model", lambda: _one_tensor([1, 6, 0, 2**40], 0)),
    "VAE of one vector": (
        "model",
        lambda: _tensors(
            {
                "decoder.middle.0.residual.0.gamma": [1, 1, 1, 1],
                "decoder.head.0.gamma": [20_000, 1, 1, 1],
            }
        ),
    ),
    "LoRA of two vectors": (
        "model",
        lambda: _tensors(
            {
                "blocks.0.self_attn.q.lora_down.weight": [1, 10**5],
                "blocks.0.self_attn.q.lora_up.weight": [10**5, 1],
            }
        ),
    ),
    "image encoder of many blocks": (
        "model",
        lambda: _tensors(
            {
                "visual.patch_embedding.weight": [2, 3, 2, 2],
                "visual.transformer.0.attn.to_qkv.weight": [6, 2],
                "visual.transformer.0.mlp.0.weight": [2, 2],
                "visual.transformer.999999999.norm1.bias": [2],
                "visual.pos_embedding": [1, 5, 2],
            }
        ),
    ),
    "pickle that unpacks": ("pickle", _pickle_bomb),
    "nested request": ("request", lambda: b'{"seed": ' + b"[" * 50_000),
    "request of one number": ("request", lambda: b'{"seed": ' + b"9" * 90_000 + b"}"),
    "box of one number": ("box", lambda: b"9" * 10**6 + b",0,0,0"),
    "PNG of 100000x100000": ("picture", lambda: _png(100_000, 100_000)),
    "PNG of 12000x12000": ("picture", lambda: _png(12_000, 12_000)),
    "PNG of a strip": ("picture", lambda: _png(2**25, 2)),
    "film of 16000x16000": ("video", lambda: _mov_of(16_000, 16_000)),
    "film of 65535x65535": ("video", lambda: _mov_of(65_535, 65_535)),
    "film of ten million frames": ("video", lambda: _mp4_of(10**7)),
    "film of billions of frames": ("video", lambda: _mp4_of(2**32 - 1)),
    "sound of hours": ("sound", lambda: _wav(8_000, 1, 2**32 - 1, bytes(2_000))),
    "sound of 512 channels": ("sound", lambda: _wav(8_000, 512, 2**32 - 1, bytes(2_048))),
    "sound of gigahertz": ("sound", lambda: _wav(2**31 - 1, 1, 2_000, bytes(2_000))),
    "take of 100000x100000": (
        "take",
        lambda: json.dumps(
            {
                "version": 1,
                "height": 100_000,
                "width": 100_000,
                "chunks": [{"file": "chunk_00000.mkv", "start": 0, "stop": 3}],
            }
        ).encode(),
    ),
}
TAKEN = {"sound of hours", "sound of 512 channels"}  # what is there of them is little


def try_bombs() -> None:
    """Open each bomb, and print the growth of the process in bytes and the outcome."""
    import resource

    for name in TARGETS:  # what the doors themselves need is there from here on
        for data in TARGETS[name].seeds():
            feed(TARGETS[name].entry_point, data)
    room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**33
    resource.setrlimit(resource.RLIMIT_AS, (room, room))  # rather than take the machine down
    for name, (target, make) in BOMBS.items():
        data = make()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
        before = _read_peak()
        taken = feed(TARGETS[target].entry_point, data)
        sys.stdout.write(json.dumps([name, _read_peak() - before, taken]) + "\n")


def _read_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(peak)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")
def test_a_small_file_never_takes_large_memory() -> None:
    command = "from tests.core.test_entry_points import try_bombs; try_bombs()"
    run = subprocess.run(
        [sys.executable, "-c", command],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4_000:]
    told = [json.loads(line) for line in run.stdout.splitlines()]
    assert [name for name, _, _ in told] == list(BOMBS)
    assert {name: grown for name, grown, _ in told if grown > ROOM} == {}
    assert {name for name, _, taken in told if taken} == TAKEN
