"""Entry points for untrusted files, each with a valid file.

Tests feed them damaged files, and ``tests/fuzz.py`` feeds them the output of a fuzzer. An entry
point must accept a file or raise a ``TurboTalkError``; anything else is a finding.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from zlib import crc32

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save

from tests.family import (
    ENCODER_CONFIG,
    SHIPPED,
    build_dit,
    make_config,
    make_projection_config,
    make_request,
    seeded,
    train_tokenizer,
)
from turbotalk_core.audio.io import read_audio
from turbotalk_core.audio.resample import to_mono_16k
from turbotalk_core.audio.wav2vec2 import build_audio_encoder
from turbotalk_core.checkpoints.audio_encoder import load_audio_encoder, save_audio_encoder
from turbotalk_core.checkpoints.inspect import inspect
from turbotalk_core.checkpoints.networks import (
    load_dit,
    load_image_encoder,
    load_text_encoder,
    load_vae,
    save_adapter,
    save_dit,
    save_vae,
)
from turbotalk_core.conditioning.prompts import parse_prompts
from turbotalk_core.conditioning.reference import prepare_reference, read_image
from turbotalk_core.conditioning.regions import find_masks, fit_regions, parse_box
from turbotalk_core.errors import ImageError, OutputError, TurboTalkError
from turbotalk_core.loading import read_request
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.text_encoder import build_tokenizer
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.quality_warnings import find_quality_warnings
from turbotalk_core.request import TalkRequest
from turbotalk_core.sampling.schedule import request_sigmas
from turbotalk_core.takes import take as takes
from turbotalk_core.takes.cache_key import CacheKey
from turbotalk_core.takes.journal import Journal
from turbotalk_core.takes.take import Take
from turbotalk_core.types import Chunk, ChunkState, FrameChunk, Speaker, Waveform
from turbotalk_core.video.reader import VideoFrames

REQUEST = make_request(height=64, width=48)
SIZE = (60, 40)  # height and width of a picture with speakers in it
MAX_PICTURES = 8  # of a video, that are asked for
EntryPoint = Callable[[bytes], object]


def feed(entry_point: EntryPoint, data: bytes) -> bool:
    """Return whether an entry point accepts a file; errors other than TurboTalkError are raised."""
    try:
        entry_point(data)
    except TurboTalkError:
        return False
    return True


def damage(data: bytes, seed: int) -> bytes:
    """Truncate a file, flip some of its bits, or overwrite, remove or repeat a part of it."""
    draw = random.Random(seed)
    broken = bytearray(data)
    start = draw.randrange(len(data) + 1)
    stop = min(len(data), start + draw.randrange(1, 64))
    match draw.randrange(5):
        case 0:
            del broken[start:]
        case 1:
            for _ in range(draw.randrange(1, 16)):
                broken[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case 2:
            broken[start:stop] = bytes([draw.choice((0, 0x7F, 0x80, 0xFF))]) * (stop - start)
        case 3:
            del broken[start:stop]
        case _:
            broken[start:start] = broken[start:stop] * draw.randrange(1, 50)
    return bytes(broken)


@contextmanager
def _file(data: bytes, name: str) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


# --- text ---------------------------------------------------------------------------------------


def open_request(data: bytes) -> None:
    request = TalkRequest.from_json(data.decode("utf-8", "replace"))
    assert TalkRequest.from_json(request.to_json()) == request
    sigmas = request_sigmas(request)
    assert sigmas.isfinite().all()


def open_box(data: bytes) -> None:
    box = parse_box(data.decode("utf-8", "replace"))
    if box is None:
        raise ImageError("no box")
    speakers = [Speaker(name="Anna", region=box), Speaker(name="Ben", region=(0, 43, 40, 17))]
    masks = find_masks(speakers, SIZE)
    assert masks is not None
    assert fit_regions(masks, REQUEST.height, REQUEST.width).shape == (3, 8, 6)


# --- model files --------------------------------------------------------------------------------


def open_model(data: bytes, suffix: str = ".safetensors") -> None:
    """Inspect a file of any kind, read its settings, and load it as the kind it claims to be."""
    with _file(data, f"model{suffix}") as path:
        info = inspect(path)
        assert info.lines()
        assert json.dumps(info.to_json())
        find_quality_warnings(REQUEST, info.settings, adapter_settings=info.settings)
        loads: dict[str, Callable[[Path], object]] = {
            "video transformer": load_dit,
            "video VAE": load_vae,
            "text encoder": load_text_encoder,
            "image encoder": load_image_encoder,
            "audio encoder": load_audio_encoder,
            "LoRA": lambda lora: load_dit(_transformer_path(), loras=[(lora, 1.0)]),
            "audio adapter": lambda adapter: load_dit(_transformer_path(), adapter),
        }
        if info.kind == "video transformer":
            read_request(path)
        if info.kind in loads:
            loads[info.kind](path)


def open_pickle(data: bytes) -> None:
    open_model(data, ".pth")


def open_index(data: bytes) -> None:
    """Read the shards that an index lists; one of them is intact."""
    with _file(data, "model.safetensors.index.json") as path:
        (path.parent / "whole.safetensors").write_bytes(make_models()["transformer"])
        load_dit(path)


def open_tokenizer(data: bytes) -> None:
    assert build_tokenizer(data)("a man speaks &amp; a dog").shape[0] == 1


# --- media --------------------------------------------------------------------------------------


def open_picture(data: bytes) -> None:
    with _file(data, "picture") as path:
        image = read_image(path)
    assert prepare_reference(image, 32, 48).shape == (1, 3, 32, 48)


def open_sound(data: bytes) -> None:
    with _file(data, "sound") as path:
        waveform = read_audio(path)
    assert to_mono_16k(waveform).isfinite().all()


def open_video(data: bytes) -> None:
    """Decode some frames of a file, and of the same file in memory."""
    with _file(data, "video") as path:
        for source in (path, io.BytesIO(data)):
            frames = VideoFrames(source)
            for index in {0, len(frames) // 2, len(frames) - 1}:
                assert frames[index].ndim == 3
            assert len(list(frames.play(0, min(len(frames), MAX_PICTURES)))) >= 1


def open_take(data: bytes) -> None:
    """Read a take whose journal was changed, each line with a valid checksum."""
    lines = data.splitlines()
    sealed = b"".join(b"%08x %s\n" % (crc32(line), line) for line in lines)
    with TemporaryDirectory() as name:
        folder = Path(name) / "take"
        _make_take(folder)
        (folder / "take.journal").write_bytes(sealed)
        if len(Journal(folder / "take.journal").records) != len(lines):
            raise OutputError("a line is no record")
        _read_take(folder)


def open_journal(data: bytes) -> None:
    """Read a take whose journal was replaced."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "take"
        _make_take(folder)
        (folder / "take.journal").write_bytes(data)
        _read_take(folder)


def _read_take(folder: Path) -> None:
    take = Take.open(folder)
    assert take.read().shape == (take.num_frames, take.height, take.width, 3)
    assert read_audio(take.sound_file)


def open_chunk_state(data: bytes) -> None:
    """Continue a take whose last chunk state was replaced."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "take"
        _make_take(folder)
        (folder / "carry_00001.safetensors").write_bytes(data)
        with _begin_take(folder) as writer:
            if writer.changes:
                raise OutputError(writer.changes[0])


def open_prompts(data: bytes) -> None:
    """Read a timed prompt."""
    for segment in parse_prompts(data.decode("utf-8", "replace")):
        assert segment.start >= 0


def open_chunk(data: bytes) -> None:
    """Read a take whose first chunk file was replaced."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "take"
        _make_take(folder)
        (folder / "chunk_00000.mkv").write_bytes(data)
        assert Take.open(folder).read().shape[0] == 5


def open_take_sound(data: bytes) -> None:
    """Read a take whose sound was replaced."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "take"
        _make_take(folder)
        (folder / "sound.mka").write_bytes(data)
        take = Take.open(folder)
        assert read_audio(take.sound_file)


# --- files that are taken -----------------------------------------------------------------------


@cache
def make_models() -> dict[str, bytes]:
    """Make one small file of each kind."""
    with TemporaryDirectory() as name, seeded():
        folder = Path(name)
        model = build_dit(make_config(image_dim=6))
        projection = AudioProjection(make_projection_config(frame_width=8, hidden_dim=4))
        save_dit(folder / "transformer", model, SHIPPED)
        save_adapter(folder / "adapter", model, projection, {"kind": "student"})
        save_vae(folder / "vae", WanVAE(2), {})
        save_audio_encoder(build_audio_encoder(ENCODER_CONFIG, seed=0), folder / "encoder")
        made = {path.name: path.read_bytes() for path in folder.iterdir()}
        transformer = load_file(folder / "transformer")
    made["lora"] = save(
        {
            "blocks.0.self_attn.q.lora_down.weight": torch.ones(2, 24),
            "blocks.0.self_attn.q.lora_up.weight": torch.ones(24, 2),
            "blocks.0.self_attn.q.alpha": torch.tensor(1.0),
            "blocks.0.ffn.0.diff_b": torch.ones(32),
        }
    )
    stored = io.BytesIO()
    torch.save({"blocks.0.ffn.0.diff_b": torch.ones(32), "a": torch.ones(2).half()}, stored)
    made["pickle"] = stored.getvalue()
    made["index"] = json.dumps(
        {"weight_map": dict.fromkeys(transformer, "whole.safetensors")}
    ).encode()
    return made


@cache
def make_pictures() -> dict[str, bytes]:
    """Make one small picture of each format."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 4), dtype=np.uint8)
    made = {}
    for suffix in ("png", "webp", "jpeg", "gif", "bmp", "tiff", "jpeg2000", "avif"):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned
        file = io.BytesIO()
        mode = "RGB" if suffix in ("jpeg", "bmp") else "RGBA"
        options = {} if suffix in ("gif", "bmp", "jpeg2000") else {"exif": exif}
        Image.fromarray(pixels).convert(mode).save(file, suffix, **options)
        made[suffix] = file.getvalue()
    return made


@cache
def make_sounds() -> dict[str, bytes]:
    """Make a tenth of a second of sound in each format."""
    tone = np.sin(np.arange(1_600) / 8).astype(np.float32)[None]
    formats = {
        "wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame", "ogg": "libopus", "mp4": "aac",
        "matroska": "pcm_f32le", "aiff": "pcm_s16be",
    }  # fmt: skip
    made = {}
    for container, codec in formats.items():
        file = io.BytesIO()
        with av.open(file, "w", format=container) as opened:
            stream = opened.add_stream(codec, rate=16_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
            opened.mux(stream.encode(frame))
            opened.mux(stream.encode(None))
        made[container] = file.getvalue()
    return made


@cache
def make_videos() -> dict[str, bytes]:
    """Make twenty frames in each container."""
    formats = {
        "mp4": "libx264", "matroska": "ffv1", "webm": "libvpx", "mpegts": "mpeg2video",
        "avi": "mpeg4", "mov": "png",
    }  # fmt: skip
    made = {}
    for container, codec in formats.items():
        file = io.BytesIO()
        with av.open(file, "w", format=container) as opened:
            stream = opened.add_stream(codec, rate=25)
            stream.width, stream.height = 32, 16
            stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
            for number in range(20):  # of fewer FFmpeg makes no transport stream out
                pixels = np.full((16, 32, 3), 12 * number, dtype=np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                opened.mux(stream.encode(frame))
            opened.mux(stream.encode(None))
        made[container] = file.getvalue()
    return made


def _make_take(folder: Path) -> None:
    folder.mkdir()
    for name, data in make_take().items():
        (folder / name).write_bytes(data)


def _begin_take(folder: Path) -> AbstractContextManager[takes.TakeWriter]:
    sound = Waveform(samples_CS=torch.linspace(-1, 1, 400)[None], sample_rate=8_000)
    return takes.open_take(
        folder, sound, height=16, width=20, length=9, cache_key=CacheKey(fields={"seed": "0"})
    )


@cache
def make_take() -> dict[str, bytes]:
    """Make the files of a take with two finished chunks."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "take"
        with _begin_take(folder) as writer:
            for index, (start, stop) in enumerate(((0, 3), (3, 5))):
                chunk = Chunk(index=index, start=0, stop=5, keep_start=start, keep_stop=stop)
                chunk_state = ChunkState(
                    num_chunks=index + 1,
                    motion_frames_BCTHW=torch.zeros(1, 3, 1, 16, 20),
                    noise_state_S=torch.Generator("cpu").get_state(),
                )
                frames_BCTHW = torch.full((1, 3, stop - start, 16, 20), 0.25)
                writer.write(
                    FrameChunk(chunk=chunk, frames_BCTHW=frames_BCTHW, chunk_state=chunk_state)
                )
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _unseal() -> list[bytes]:
    """Return the lines of a journal without their checksums."""
    lines = make_take()["take.journal"].splitlines()
    return [b"\n".join(line.partition(b" ")[2] for line in lines)]


@cache
def _transformer_path() -> Path:
    """Return the family's transformer, for adapters and LoRA; deleted when the process ends."""
    folder = TemporaryDirectory()
    path = Path(folder.name) / "transformer.safetensors"
    path.write_bytes(make_models()["transformer"])
    _KEPT.append(folder)
    return path


_KEPT: list[TemporaryDirectory[str]] = []


@dataclass(frozen=True)
class Target:
    """Entry point for the fuzzer, with its initial files."""

    entry_point: EntryPoint
    seeds: Callable[[], list[bytes]]


def _files(make: Callable[[], dict[str, bytes]], *names: str) -> Callable[[], list[bytes]]:
    return lambda: [data for name, data in make().items() if not names or name in names]


TARGETS = {
    "request": Target(open_request, lambda: [json.dumps(asdict(REQUEST)).encode()]),
    "box": Target(open_box, lambda: [b"1,2,30,40"]),
    "prompts": Target(open_prompts, lambda: [b"0-4s: he smiles | 4-9.5s: he frowns"]),
    "model": Target(
        open_model,
        _files(make_models, "transformer", "adapter", "vae", "encoder", "lora"),
    ),
    "pickle": Target(open_pickle, _files(make_models, "pickle")),
    "index": Target(open_index, _files(make_models, "index")),
    "tokenizer": Target(open_tokenizer, lambda: [train_tokenizer()]),
    "picture": Target(open_picture, _files(make_pictures)),
    "sound": Target(open_sound, _files(make_sounds)),
    "video": Target(open_video, _files(make_videos)),
    "take": Target(open_take, _unseal),
    "journal": Target(open_journal, _files(make_take, "take.journal")),
    "chunk_state": Target(open_chunk_state, _files(make_take, "carry_00001.safetensors")),
    "chunk": Target(open_chunk, _files(make_take, "chunk_00000.mkv")),
    "take_sound": Target(open_take_sound, _files(make_take, "sound.mka")),
}


def corpus(target: Target, num_each: int) -> Iterator[bytes]:
    """Damage each file of an entry point so many times."""
    for number, data in enumerate(target.seeds()):
        for seed in range(num_each * number, num_each * (number + 1)):
            yield damage(data, seed)
