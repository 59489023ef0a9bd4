"""The talk command on a complete family of very small networks with random weights."""

import argparse
import errno
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
from av import VideoStream
from av.error import ExternalError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.family import (
    NUM_FRAMES,
    refusal,
    save_dit_with_image_branch,
    save_image_encoder,
    save_text_encoder,
)
from tests.forks import start_in_child
from tests.heif import make_tiled_photo
from turbotalk_core.audio import conversation
from turbotalk_core.audio.wav2vec2 import Wav2Vec2Encoder
from turbotalk_core.checkpoints import inspect as inspect_module
from turbotalk_core.checkpoints.tensors import WeightHeader, read_header
from turbotalk_core.cli import talk as cli_talk
from turbotalk_core.cli.main import main
from turbotalk_core.cli.talk import add_talk
from turbotalk_core.errors import OutputError
from turbotalk_core.loading import ADAPTER, TEACHER, VAE
from turbotalk_core.models.denoiser import WanDenoiser
from turbotalk_core.models.wan import WanModel
from turbotalk_core.pipeline import Models
from turbotalk_core.request import TalkRequest
from turbotalk_core.takes.journal import Journal
from turbotalk_core.video.mux import Mp4Writer
from turbotalk_core.video.writer import VideoWriter

Talk = Callable[..., int]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """File to write, in a folder of its own."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "talk.mp4"


@pytest.fixture
def talk(models: Path, inputs: Path, out: Path) -> Talk:
    """Talk command with valid arguments; later arguments override earlier ones."""

    def run(*arguments: object) -> int:
        good = ["--image", inputs / "face.png", "--audio", inputs / "voice.wav", "--out", out]
        good += ["--models", models, "--size", "32x32", "--device", "cpu"]
        return main(["talk", *map(str, good), *map(str, arguments)])

    return run


def _read(path: Path) -> tuple[np.ndarray, TalkRequest, float]:
    """Return the frames of a video, the request in its metadata, and its seconds of sound."""
    with av.open(str(path)) as container:
        request = TalkRequest.from_json(container.metadata["turbotalk"])
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
        return np.stack(frames), request, samples / container.streams.audio[0].rate


def test_a_portrait_and_a_voice_become_a_video(
    talk: Talk, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk("--seed", 5) == 0
    frames, request, seconds = _read(out)
    assert frames.shape == (NUM_FRAMES, 32, 32, 3)
    assert seconds == pytest.approx(NUM_FRAMES / 25, abs=0.08)
    assert request == TalkRequest(
        num_inference_steps=2,
        schedule="distilled",
        shift=5.0,
        update="renoise",
        seed=5,
        height=32,
        width=32,
        chunk_frames=13,
        num_motion_frames=5,
    )
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: 20 frames, 0.80 s, made in ")
    assert "9/9" in captured.err  # the reference, and per chunk an encode, two calls, a decode
    assert [path.name for path in out.parent.iterdir()] == ["talk.mp4"]


@pytest.mark.slow
def test_the_seed_decides(talk: Talk, out: Path) -> None:
    videos = []
    for seed in (1, 1, 2):
        assert talk("--seed", seed, "--crf", 0) == 0
        videos.append(_read(out)[0])
    assert np.array_equal(videos[0], videos[1])
    assert not np.array_equal(videos[0], videos[2])


def test_arguments_win_over_shipped_settings(talk: Talk, out: Path) -> None:
    chosen = ["--steps", 3, "--schedule", "reference", "--shift", 2, "--update", "euler"]
    chosen += ["--audio-guidance", 3, "--audio-scale", 0.5, "--chunk-frames", 9]
    chosen += ["--motion-frames", 1, "--no-loudness", "--threads", 1]
    assert talk(*chosen) == 0
    request = _read(out)[1]
    assert request == TalkRequest(
        num_inference_steps=3,
        schedule="reference",
        shift=2.0,
        update="euler",
        seed=0,
        height=32,
        width=32,
        audio_guidance_scale=3.0,
        audio_scale=0.5,
        chunk_frames=9,
        num_motion_frames=1,
        normalizes_loudness=False,
    )


def test_the_adapter_strength_reaches_the_network(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = []
    call = WanDenoiser.__call__

    def watch(self: WanDenoiser, *arguments: Any) -> Tensor:
        scales.append(self.audio_scale)
        return call(self, *arguments)

    monkeypatch.setattr(WanDenoiser, "__call__", watch)
    assert talk("--audio-scale", 0.25) == 0
    assert scales == [0.25] * 4


def test_without_a_size_the_picture_gives_its_shape(talk: Talk, out: Path) -> None:
    assert talk("--size", "auto") == 0
    assert _read(out)[0].shape[1:3] == (32, 32)
    assert talk("--size", "16x48") == 0
    assert _read(out)[0].shape[1:3] == (48, 16)


def _merge(models: Path, to: Path) -> None:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    adapter = models / "model_patches" / "turbotalk_tiny_adapter.safetensors"
    for path in (adapter, models / "diffusion_models" / TEACHER):
        with safe_open(path, "pt") as file:
            metadata |= file.metadata()
        tensors |= load_file(path)
    metadata["config"] = json.dumps({"transformer": {"num_heads": 2}, "audio_heads": 2})
    save_file(tensors, to, metadata)


def test_a_merged_file_needs_no_adapter(talk: Talk, models: Path, out: Path) -> None:
    merged = models / "diffusion_models" / "merged.safetensors"
    _merge(models, merged)
    try:
        assert talk("--crf", 0) == 0
        expected = _read(out)[0]
        assert talk("--crf", 0, "--dit", merged.name) == 0
        assert np.array_equal(_read(out)[0], expected)
    finally:
        merged.unlink()


def test_weights_have_the_dtype_asked_for(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = set()
    call = WanDenoiser.__call__

    def watch(self: WanDenoiser, *arguments: Any) -> Tensor:
        dtypes.add(self.model.patch_embedding.weight.dtype)
        return call(self, *arguments)

    monkeypatch.setattr(WanDenoiser, "__call__", watch)
    assert talk() == 0
    assert talk("--dtype", "bfloat16") == 0
    assert dtypes == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "cannot read a picture from nowhere.png"),
        (["--audio", "nowhere.wav"], "nowhere.wav"),
        (["--dit", "nothing.safetensors"], f"no nothing.safetensors in .*there is {TEACHER}"),
        (["--models", "nowhere"], "there is nothing, so name"),
        (["--vae", "../model_patches/turbotalk_tiny_adapter.safetensors"], "video VAE"),
        (["--steps", "0"], "got --steps 0; use a whole number from 1 to 4"),
        (["--size", "100x32"], "got width 100; the model takes multiples of 16"),
        (["--chunk-frames", "12"], "--chunk-frames: got 12 frames"),
        (["--crf", "99"], "crf 99"),
        (["--out", "talk.avi"], "talk.avi"),
        (["--out", "nowhere/talk.mp4"], "existing folder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_leaves_nothing(
    talk: Talk,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path / "made")
    assert talk(*arguments) == 2
    assert re.search(message, refusal(capsys))
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed=-1"], "got --seed -1; use a whole number from 0"),
        (["--seed=1e3"], "--seed: got '1e3'; give a whole number"),
        (["--seed=" + "9" * 400], "--seed: got '999"),
        (["--crf=-1"], "got --crf -1"),
        (["--steps=x"], "--steps: got 'x'; give a whole number"),
        (["--chunk-frames=0"], "got --chunk-frames 0; use a whole number from 1 to"),
        (["--motion-frames=2"], "--motion-frames: got 2 frames"),
        (["--shift=0"], "got --shift 0.0; it must be above 0"),
        (["--shift=nan"], "--shift: got 'nan'; give a number"),
        (["--audio-guidance=-1"], "got --audio-guidance -1.0"),
        (["--audio-scale=inf"], "--audio-scale: got 'inf'"),
        (["--text-guidance=-1"], "got --text-guidance -1.0"),
        (["--color-strength=2"], "got --color-strength 2.0; use 0"),
        (["--teacache=-1"], "got --teacache -1.0"),
        (["--size=0x0"], "--size: got height 0"),
        (["--size=20x32"], "--size: got width 20"),
        (["--size=16"], "--size: got '16'; give width x height"),
        (["--max-seconds=0.01"], r"--max-seconds: got '0.01'; the shortest video lasts 0.04 s"),
        (["--max-seconds=0"], "--max-seconds: got '0'"),
        (["--threads=0"], "--threads: got '0'; give a whole number from 1 to"),
        (["--threads=-1"], "--threads: got '-1'; give a whole number from 1 to"),
        (["--threads=100000"], "--threads: got '100000'; give a whole number from 1 to"),
        *(
            ([f"--device={name}"], f"--device: got '{name}', which is not available; .*: cpu")
            for name in ("gpu", "meta", "cuda:99", "cpu:3", "CPU", "")
        ),
        (["--prompt", "a\udcc4"], "--prompt: .* is not UTF-8"),
        (["--negative-prompt", "a\0"], "--negative-prompt: .* has NUL"),
        (["--image", ""], "cannot read a picture"),
        (["--image", "a\0b"], "cannot read a picture"),
        (["--audio", "\udcc4\x1b[2J"], r"no audio file at \\udcc4\\x1b\[2J"),
        (["--dit", "a\0"], "there is no a"),
        (["--out", "."], "must be one that ends in .mp4"),
        (["--fps", "26"], "--fps: invalid choice"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_errors_name_the_option_and_leave_nothing(
    talk: Talk,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    try:
        code = talk(*arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *hints, line = captured.err.splitlines()
    assert len(hints) <= 1
    assert re.match(f"error: .*{message}", line), line
    names = ("num_inference_steps", "max_frames", "chunk_frames", "guidance_scale", "_strength")
    assert not any(name in line for name in names)
    assert list(out.parent.iterdir()) == []


def test_the_image_is_not_replaced(talk: Talk, inputs: Path, out: Path) -> None:
    """The second is refused before it is read: a film would be dubbed onto itself."""
    film = inputs / "film.mp4"
    film.write_bytes((inputs / "face.png").read_bytes())
    before = film.read_bytes()
    (inputs / "link.mp4").symlink_to(film)
    for name in ("film.mp4", "link.mp4"):
        assert talk("--image", film, "--out", inputs / name) == 2
        assert talk("--audio", film, "--out", inputs / name) == 2
    assert film.read_bytes() == before


def _talk_slowly(arguments: list[str], begun: Path, done: Path) -> None:
    """Run the command; in the second chunk, tell so and wait."""
    torch.set_num_threads(1)
    call, calls = WanDenoiser.__call__, []

    def wait(self: WanDenoiser, *given: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            begun.touch()
            while not done.exists():
                time.sleep(0.01)
        return call(self, *given)

    setattr(WanDenoiser, "__call__", wait)  # noqa: B010 (of another signature)
    sys.exit(main(arguments))


@pytest.fixture
def start_slowly(
    models: Path, inputs: Path, out: Path, tmp_path: Path
) -> Iterator[tuple[BaseProcess, Path]]:
    """Start the command in a process of its own, up to its second chunk; with a file to end it."""
    command = ["talk", "--image", inputs / "face.png", "--audio", inputs / "voice.wav"]
    command += ["--out", out, "--models", models, "--size", "32x32", "--device", "cpu"]
    begun, done = tmp_path / "begun", tmp_path / "done"
    child = start_in_child(_talk_slowly, [str(word) for word in command], begun, done)
    journal = out.parent / "talk.mp4.take" / "take.journal"
    while not begun.exists() or len(Journal(journal).records) < 2:  # the first chunk is on disk
        assert child.is_alive()
        time.sleep(0.01)
    yield child, done
    child.kill()
    child.join()


def _list(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.slow
def test_a_second_start_is_refused_and_touches_nothing(
    talk: Talk,
    out: Path,
    start_slowly: tuple[BaseProcess, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child, done = start_slowly
    folder = out.parent
    (folder.parent / "link").symlink_to("made")
    (folder.parent / "link.mp4").symlink_to("made/talk.mp4")
    monkeypatch.chdir(folder)
    before = _list(folder)
    assert "talk.mp4.take/.talk.part.mp4" in before
    spellings = ["talk.mp4", "./talk.mp4", "../made/talk.mp4", "../link/talk.mp4", "../link.mp4"]
    for path in spellings:
        # a missing picture: the lock comes before all other work
        assert talk("--out", path, "--image", "missing.png") == 2
        assert "another program is making the take" in refusal(capsys)
    assert talk("--out", "talk.mp4.take/talk.mp4") == 2
    assert "lies inside of" in refusal(capsys)
    assert main(["plan", "--seconds", "1"]) == 0
    assert _list(folder) == before
    assert talk("--out", "other.mp4") == 0  # beside it
    done.touch()
    child.join()
    assert child.exitcode == 0
    assert _list(folder) == ["other.mp4", "talk.mp4"]
    assert np.array_equal(_read(out)[0], _read(folder / "other.mp4")[0])


@pytest.mark.slow
def test_after_a_kill_nothing_half_made_lies_about_and_the_same_command_goes_on(
    talk: Talk,
    out: Path,
    start_slowly: tuple[BaseProcess, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    child, _ = start_slowly
    child.kill()
    child.join()
    assert [path.name for path in out.parent.iterdir()] == ["talk.mp4.take"]
    assert talk("--out", out.with_name("other.mp4")) == 0
    assert talk() == 0
    assert "goes on with" in capsys.readouterr().err
    assert _list(out.parent) == ["other.mp4", "talk.mp4"]
    assert np.array_equal(_read(out)[0], _read(out.with_name("other.mp4"))[0])


@pytest.mark.parametrize("name", ["g\udcc4\udce3.mp4", "模型.mp4"])
def test_a_name_that_cannot_be_printed_is_escaped(
    talk: Talk, out: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    face, voice = inputs / f"face {name}.png", inputs / f"voice {name}.wav"
    (inputs / "face.png").rename(face)
    (inputs / "voice.wav").rename(voice)
    with (tmp_path / "printed").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert talk("--out", out.with_name(name), "--image", face, "--audio", voice) == 0
        assert main(["plan", "--audio", str(voice)]) == 0
    monkeypatch.undo()
    assert _list(out.parent) == [name]
    escaped = name.encode("ascii", "backslashreplace").decode()
    assert f"{escaped}: 20 frames" in (tmp_path / "printed").read_text()


def test_a_full_disk_says_how_much_is_free_and_what_is_kept(
    talk: Talk,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = Path.write_bytes

    def fail(path: Path, data: bytes) -> int:
        if path.name.startswith(".carry_00001"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        assert talk() == 2
    captured = capsys.readouterr().err
    assert re.search(r"note: 13 of 20 frames are kept in .*talk.mp4.take; the same comm", captured)
    assert re.search(r"'No space left.*carry_00001.*; [0-9.]+ MB are free there", captured)
    assert [path.name for path in out.parent.iterdir()] == ["talk.mp4.take"]
    assert talk() == 0
    assert [path.name for path in out.parent.iterdir()] == ["talk.mp4"]


@pytest.mark.usefixtures("small_files_only")
def test_a_disk_that_is_full_at_the_start_leaves_nothing(
    talk: Talk, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk() == 2
    assert "'File too large' at" in refusal(capsys)
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["chunk_00000.mkv", "sound.mka", "take.journal"])
def test_a_damaged_take_is_made_again(
    talk: Talk,
    out: Path,
    stop_in_chunk: Callable[[int], list[int]],
    capsys: pytest.CaptureFixture[str],
    damaged: str,
) -> None:
    stop_in_chunk(1)
    assert talk() == 130
    path = out.parent / "talk.mp4.take" / damaged
    path.write_bytes(path.read_bytes()[:30])
    stop_in_chunk(9)
    assert talk() == 0
    assert re.search(f"begun anew: .*{damaged} is .*damaged", capsys.readouterr().err)
    assert len(_read(out)[0]) == NUM_FRAMES


def test_a_take_that_cannot_be_deleted_is_no_error(
    talk: Talk, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_folder: Path) -> None:
        raise OutputError("got 'Permission denied'")

    monkeypatch.setattr(cli_talk, "delete_take", refuse)
    assert talk() == 0
    assert out.exists()


def test_a_photo_in_tiles_is_refused_whatever_its_name(
    talk: Talk, out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("photo.heic", "photo.jpg", "photo.mp4"):
        (tmp_path / name).write_bytes(make_tiled_photo())
        assert talk("--image", tmp_path / name) == 2
        assert re.search("photo in tiles .* convert it to JPEG or PNG", refusal(capsys))
    assert list(out.parent.iterdir()) == []


def test_a_picture_that_is_too_large_is_not_taken_for_a_video(
    talk: Talk,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    inputs: Path,
) -> None:
    monkeypatch.setattr("turbotalk_core.conditioning.reference.MAX_PIXELS", 9)
    assert talk("--image", inputs / "face.png") == 2
    message = refusal(capsys)
    assert "too large" in message
    assert "video" not in message


def test_an_interrupt_leaves_no_half_file(
    talk: Talk,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    call = WanDenoiser.__call__

    def interrupt(self: WanDenoiser, *arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:  # in the second chunk, when frames of the first are written
            raise KeyboardInterrupt
        return call(self, *arguments)

    monkeypatch.setattr(WanDenoiser, "__call__", interrupt)
    assert talk() == 130
    kept, interrupted = capsys.readouterr().err.splitlines()[-2:]
    assert re.match(r"note: 13 of 20 frames are kept in .*talk.mp4.take; the same command", kept)
    assert interrupted == "interrupted"
    assert [path.name for path in out.parent.iterdir()] == ["talk.mp4.take"]
    assert not list(out.parent.glob("*/.*"))


@pytest.fixture
def stop_in_chunk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Make a network call of a chunk, 0 or more, raise; returns a counter of later calls."""
    call = WanDenoiser.__call__

    def arm(chunk: int) -> list[int]:
        calls = []

        def stop(self: WanDenoiser, *arguments: Any) -> Tensor:
            if len(calls) == 2 * chunk:
                raise KeyboardInterrupt
            calls.append(1)
            return call(self, *arguments)

        monkeypatch.setattr(WanDenoiser, "__call__", stop)
        return calls

    return arm


@pytest.mark.slow
@pytest.mark.parametrize("hearing", ["whole", "sections"])
def test_the_same_command_goes_on_after_the_last_whole_chunk(
    talk: Talk,
    out: Path,
    stop_in_chunk: Callable[[int], list[int]],
    capsys: pytest.CaptureFixture[str],
    hearing: str,
) -> None:
    assert talk("--crf", 0, "--hearing", hearing) == 0
    whole = _read(out)[0]
    out.unlink()
    stop_in_chunk(1)
    assert talk("--crf", 0, "--hearing", hearing) == 130  # as shells tell of Control-C
    assert [path.name for path in out.parent.iterdir()] == ["talk.mp4.take"]
    capsys.readouterr()
    calls = stop_in_chunk(9)
    assert talk("--crf", 0, "--hearing", hearing) == 0
    assert len(calls) == 2  # those of the second chunk
    captured = capsys.readouterr().err
    assert "talk.mp4.take, of which 1 of 2 chunks are finished" in captured
    assert "5/5" in captured  # the reference, an encode, two calls, a decode
    assert np.array_equal(_read(out)[0], whole)
    assert [path.name for path in out.parent.iterdir()] == ["talk.mp4"]


def test_another_command_begins_anew_and_says_why(
    talk: Talk,
    out: Path,
    stop_in_chunk: Callable[[int], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_in_chunk(1)
    talk()
    calls = stop_in_chunk(9)
    assert talk("--seed", 4, "--audio-scale", 0.5, "--end", 0.8, "--hearing", "sections") == 0
    assert len(calls) == 4
    captured = capsys.readouterr().err
    assert "talk.mp4.take is begun anew: voice is another" in captured
    assert "talk.mp4.take is begun anew: hearing is another" in captured
    assert "talk.mp4.take is begun anew: seed was 0 and is 4" in captured
    assert "talk.mp4.take is begun anew: audio_scale was 1.0 and is 0.5" in captured


def test_a_video_that_cannot_be_written_costs_no_chunk(
    talk: Talk,
    out: Path,
    stop_in_chunk: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_video: Mp4Writer, frames: Iterable[Tensor]) -> None:
        assert len(list(frames)) == 2
        raise OutputError("got 'No space left on device'")

    with monkeypatch.context() as patch:
        patch.setattr(Mp4Writer, "write", fail)
        assert talk() == 2
    calls = stop_in_chunk(9)
    assert talk() == 0
    assert calls == []
    assert len(_read(out)[0]) == NUM_FRAMES
    assert [path.name for path in out.parent.iterdir()] == ["talk.mp4"]


@pytest.fixture
def run_short(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Make memory run out from one network call on; returns a counter of later calls."""
    forward = WanModel.forward

    def arm(first: int, *, is_hopeless: bool = False) -> list[int]:
        calls: list[int] = []

        def run(self: WanModel, *arguments: Any, **named: Any) -> Tensor:
            calls.append(1)
            if len(calls) > first and (is_hopeless or not self.saves_memory):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(self, *arguments, **named)

        monkeypatch.setattr(WanModel, "forward", run)
        return calls

    return arm


def test_where_memory_is_short_it_does_the_same_in_pieces(
    talk: Talk,
    out: Path,
    run_short: Callable[..., list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = _frames(talk, out)
    calls = run_short(1)
    frames = _frames(talk, out)
    assert len(calls) == 4 + 1
    assert np.abs(frames.astype(int) - whole).max() <= 2  # rounding, then H.264's colours
    assert caplog.text.count("memory ran out in the video transformer") == 1


@pytest.mark.slow
def test_where_memory_does_not_suffice_the_same_command_goes_on_later(
    talk: Talk,
    out: Path,
    run_short: Callable[..., list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = _frames(talk, out)
    out.unlink()
    capsys.readouterr()
    calls = run_short(2, is_hopeless=True)
    assert talk("--crf", 0) == 2
    assert len(calls) == 4  # the first chunk's two, one, and that once more
    told = refusal(capsys)
    assert "memory ran out at 32x32 with chunks of 13 frames" in told
    assert "goes on after the last finished chunk" in told
    assert [path.name for path in out.parent.iterdir()] == ["talk.mp4.take"]
    calls = run_short(99)
    assert np.array_equal(_frames(talk, out), whole)
    assert len(calls) == 2
    assert "of which 1 of 2 chunks are finished" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> WanModel:
        raise torch.OutOfMemoryError("CUDA out of memory.\nOf the allocated memory 1 GiB")

    monkeypatch.setattr(WanModel, "to", fail)
    assert talk() == 2
    assert "memory ran out (CUDA out of memory.); close what else" in refusal(capsys)


def test_a_folder_that_is_read_only_is_refused_before_the_work(
    talk: Talk,
    out: Path,
    stop_in_chunk: Callable[[int], list[int]],
    read_only: Callable[[Path], AbstractContextManager[None]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = stop_in_chunk(9)
    with read_only(out.parent):
        assert talk() == 2
    assert "Permission denied" in refusal(capsys)
    assert calls == []
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("place", ["nowhere/talk.mp4", "made/file.mp4/talk.mp4"])
def test_a_file_that_cannot_be_made_is_refused_before_networks_are_loaded(
    talk: Talk,
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    def load(*_: object, **_settings: object) -> None:
        raise AssertionError("loaded")

    for name in ("load_audio_encoder", "load_models", "encode_conversation"):
        monkeypatch.setattr(cli_talk, name, load)
    (out.parent / "file.mp4").touch()
    assert talk("--out", tmp_path / place) == 2
    assert "it needs an existing folder" in refusal(capsys)
    with pytest.raises(AssertionError, match="loaded"):
        talk()
    assert [path.name for path in out.parent.iterdir()] == ["file.mp4"]


def test_regions_are_refused_before_networks_are_loaded(
    converse: Talk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **_settings: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(cli_talk, "load_audio_encoder", load)
    monkeypatch.setattr(cli_talk, "mix_voices", lambda _speakers: None)
    speakers = ["--speaker", "Anna", "-", "0,0,21,60", "--speaker", "Bob", "-", "20,0,20,60"]
    assert converse(*speakers) == 2
    assert "Anna and Bob share 60 pixels" in refusal(capsys)


def test_each_header_is_read_once(
    talk: Talk, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def watch(path: Path) -> WeightHeader:
        read.append(Path(path).name)
        return read_header(path)

    monkeypatch.setattr(inspect_module, "read_header", watch)
    assert talk() == 0
    assert sorted(read) == sorted([ADAPTER, TEACHER, VAE])
    merged = models / "diffusion_models" / "merged.safetensors"
    _merge(models, merged)
    read.clear()
    try:
        assert talk("--dit", merged.name) == 0
    finally:
        merged.unlink()
    assert sorted(read) == sorted([merged.name, VAE])


def test_voices_are_mixed_once(
    converse: Talk, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = []
    mix = conversation.mix_voices

    def watch(speakers: Any) -> Any:
        mixed.append(mix(speakers))
        return mixed[-1]

    monkeypatch.setattr(conversation, "mix_voices", watch)
    monkeypatch.setattr(cli_talk, "mix_voices", watch)
    voice = inputs / "voice.wav"
    assert converse("--speaker", "A", voice, "auto", "--speaker", "B", voice, "auto") == 0
    assert len(mixed) == 1


@pytest.mark.slow
def test_an_encoder_that_dies_costs_no_chunk(
    talk: Talk,
    out: Path,
    stop_in_chunk: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The video's own, in its thread, at the second chunk; that of the take goes on."""
    whole = _frames(talk, out)
    out.unlink()
    capsys.readouterr()
    encode = VideoWriter._encode_frame

    def die(self: VideoWriter, frame_HWC: Tensor) -> None:
        if not self._encoding.is_rgb and self.num_frames == 13:
            raise ExternalError(-1, "Generic error in an external library")
        encode(self, frame_HWC)

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "_encode_frame", die)
        assert talk("--crf", 0) == 2
    assert "external library" in refusal(capsys)
    assert [path.name for path in out.parent.iterdir()] == ["talk.mp4.take"]
    calls = stop_in_chunk(9)
    assert np.array_equal(_frames(talk, out), whole)
    assert calls == []  # both chunks were finished


def _frames(talk: Talk, out: Path, *arguments: object) -> np.ndarray:
    assert talk("--crf", 0, *arguments) == 0
    return _read(out)[0]


@pytest.fixture
def converse(models: Path, inputs: Path, out: Path) -> Talk:
    """Talk command without a voice, in a size with room for two people."""

    def run(*arguments: object) -> int:
        good = ["--image", inputs / "face.png", "--out", out, "--crf", 0]
        good += ["--models", models, "--size", "64x64", "--device", "cpu"]
        return main(["talk", *map(str, good), *map(str, arguments)])

    return run


@pytest.mark.slow
def test_a_lone_speaker_is_a_voice(talk: Talk, converse: Talk, inputs: Path, out: Path) -> None:
    expected = _frames(talk, out, "--size", "64x64")
    assert converse("--speaker", "Anna", inputs / "voice.wav", "auto") == 0
    assert np.array_equal(_read(out)[0], expected)


@pytest.mark.slow
def test_speakers_talk_at_once_or_in_turn(converse: Talk, inputs: Path, out: Path) -> None:
    voice = inputs / "voice.wav"
    two = ["--speaker", "Anna", voice, "auto", "--speaker", "Bob", voice, "auto"]
    assert converse(*two) == 0
    at_once, _, seconds = _read(out)
    assert len(at_once) == NUM_FRAMES
    assert seconds == pytest.approx(NUM_FRAMES / 25, abs=0.08)
    assert converse(*two, "--turns") == 0
    in_turn, _, seconds = _read(out)
    assert len(in_turn) == 2 * NUM_FRAMES
    assert seconds == pytest.approx(2 * NUM_FRAMES / 25, abs=0.08)
    assert not np.array_equal(in_turn[:NUM_FRAMES], at_once)


@pytest.mark.slow
def test_the_region_says_whose_voice_it_is(converse: Talk, inputs: Path, out: Path) -> None:
    def speak(*regions: str) -> np.ndarray:
        speakers = zip(("Anna", "Carl"), (str(inputs / "voice.wav"), "-"), regions, strict=True)
        assert converse(*[word for who in speakers for word in ("--speaker", *who)]) == 0
        return _read(out)[0]

    pixels = np.zeros((60, 40), dtype=np.uint8)
    pixels[10:50, :20] = 255
    Image.fromarray(pixels).save(inputs / "left.png")
    see_through = np.full((60, 40, 4), 255, dtype=np.uint8)
    see_through[..., 3] = pixels
    Image.fromarray(see_through).save(inputs / "cut_out.png")

    boxes = speak("0,10,20,40", "20,10,20,40")
    assert np.array_equal(speak(str(inputs / "left.png"), "20,10,20,40"), boxes)
    assert np.array_equal(speak(str(inputs / "cut_out.png"), "20,10,20,40"), boxes)
    assert not np.array_equal(speak("20,10,20,40", "0,10,20,40"), boxes)
    assert speak("auto", "auto").shape == boxes.shape


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (["0,0,21,60", "20,0,20,60"], "Anna and Bob share 60 pixels"),
        (["auto", "20,0,20,60"], "no region for Anna"),
        (["0,0,20,60", "20,0,21,60"], "region of Bob: got a box"),
        (["0,0,20", "20,0,20,60"], "got the region 0,0,20; give x,y,width,height"),
        (["auto", " --5,0,20,60"], "give x,y,width,height"),
        (["auto", "9" * 5_000 + ",0,0,0"], "give x,y,width,height"),
        (["-1,0,20,60", "20,0,20,60"], "region of Anna: got a box"),
    ],
)
def test_regions_that_cannot_be_are_refused(
    converse: Talk,
    inputs: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    regions: list[str],
    message: str,
) -> None:
    speakers = zip(("Anna", "Bob"), regions, strict=True)
    words = [w for name, region in speakers for w in ("--speaker", name, "-", region)]
    words[2] = str(inputs / "voice.wav")
    if regions[0].startswith("-"):
        words[3] = f" {regions[0]}"  # or it were an option
    assert converse(*words) == 2
    assert message in refusal(capsys)
    assert list(out.parent.iterdir()) == []


def test_somebody_must_speak(converse: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    assert converse("--speaker", "Anna", "-", "auto") == 2
    assert "none has a voice" in refusal(capsys)


def _write_film(path: Path, pictures: list[np.ndarray], fps: int) -> None:
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream("ffv1", rate=fps))
        stream.width, stream.height, stream.pix_fmt = 40, 60, "bgr0"
        for pixels in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))


@pytest.mark.slow
def test_a_video_is_dubbed(talk: Talk, inputs: Path, out: Path) -> None:
    rng = np.random.default_rng(1)
    pictures = list(rng.integers(0, 255, (10, 60, 40, 3), dtype=np.uint8))
    film, first = inputs / "film.mkv", inputs / "first.png"
    _write_film(film, pictures, fps=20)
    dubbed = _frames(talk, out, "--image", film)
    assert len(dubbed) == NUM_FRAMES
    Image.fromarray(pictures[0]).save(first)
    still = _frames(talk, out, "--image", first)
    # The second chunk begins with frame 8, at 0.32 s, when the seventh of 20 per second is on.
    assert np.array_equal(dubbed[:13], still[:13])
    assert not np.array_equal(dubbed[13:], still[13:])
    _write_film(film, [*pictures[:1] * 8, pictures[6]], fps=25)
    assert np.array_equal(_frames(talk, out, "--image", film), dubbed)


def test_a_film_without_pictures_is_refused(
    talk: Talk, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk("--image", inputs / "voice.wav") == 2
    assert "voice.wav has sound alone" in refusal(capsys)


@pytest.mark.slow
def test_an_anchor_is_for_later_chunks(talk: Talk, out: Path) -> None:
    plain, anchored = _frames(talk, out), _frames(talk, out, "--anchor")
    assert _read(out)[1].anchors_chunks
    assert np.array_equal(anchored[:13], plain[:13])
    assert not np.array_equal(anchored[13:], plain[13:])
    assert np.array_equal(_frames(talk, out, "--no-anchor"), plain)


@pytest.mark.slow
def test_settings_reach_the_request(talk: Talk, out: Path) -> None:
    assert talk("--apg", "--color-strength", 0.5, "--max-seconds", 0.3, "--teacache") == 0
    frames, request, seconds = _read(out)
    assert (request.uses_apg, request.color_strength) == (True, 0.5)
    assert (request.max_frames, request.teacache_threshold) == (7, 0.2)
    assert len(frames) == 7
    assert seconds == pytest.approx(7 / 25, abs=0.08)
    assert talk("--teacache", 0.1) == 0
    assert _read(out)[1].teacache_threshold == 0.1


@pytest.mark.slow
def test_a_part_of_a_recording_is_said(talk: Talk, out: Path) -> None:
    assert talk("--start", 0.2, "--end", 0.61, "--crf", 0) == 0
    frames, _, seconds = _read(out)
    assert len(frames) == 10
    assert seconds == pytest.approx(10 / 25, abs=0.08)
    assert len(_frames(talk, out, "--end", 99)) == NUM_FRAMES


def test_a_part_that_is_not_there_is_refused(
    talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk("--start", 0.9) == 2
    assert re.search(r"nothing is left of 0\.81\d* s of sound from 0\.9 s", refusal(capsys))
    assert talk("--end", 0) == 2
    assert "from 0 s to 0 s" in refusal(capsys)


def test_a_voice_can_be_heard_in_sections(
    talk: Talk, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    encode = Wav2Vec2Encoder.encode

    def watch(self: Wav2Vec2Encoder, waveform_S: Tensor, *arguments: Any) -> Tensor:
        heard.append((waveform_S.shape[0], *arguments))
        return encode(self, waveform_S, *arguments)

    monkeypatch.setattr(Wav2Vec2Encoder, "encode", watch)
    assert len(_frames(talk, out, "--hearing", "sections")) == NUM_FRAMES
    assert _read(out)[1].hearing == "sections"
    # The second chunk reaches into the tail of silence.
    assert [arguments[:2] for arguments in heard] == [(20 * 640, 20), (45 * 640, 45)]
    assert all(moments is not None for _, _, moments in heard)


def test_another_frame_rate_is_as_long(talk: Talk, out: Path) -> None:
    assert talk("--fps", "50") == 0
    frames, request, seconds = _read(out)
    assert len(frames) == 2 * NUM_FRAMES
    assert seconds == pytest.approx(NUM_FRAMES / 25, abs=0.08)
    assert request.max_frames is None


@pytest.fixture
def reading(models: Path) -> None:
    """Text encoder of the family, with the tokenizer inside, and with a separate one."""
    folder = models / "text_encoders"
    if not folder.exists():
        save_text_encoder(folder, dim=8)


@pytest.mark.slow
@pytest.mark.usefixtures("reading")
def test_a_prompt_changes_the_video(talk: Talk, out: Path) -> None:
    plain = _frames(talk, out)
    prompt = ["--text-encoder", "whole.safetensors", "--prompt", "a man speaks"]
    told = _frames(talk, out, *prompt)
    assert not np.array_equal(told, plain)
    beside = ["--text-encoder", "bare.safetensors", "--tokenizer", "spiece.model"]
    assert np.array_equal(_frames(talk, out, *beside, *prompt[2:]), told)
    guided = _frames(talk, out, *prompt, "--text-guidance", 3)
    assert not np.array_equal(guided, told)
    assert _read(out)[1].guidance_scale == 3
    away = _frames(talk, out, *prompt, "--text-guidance", 3, "--negative-prompt", "a dog")
    assert not np.array_equal(away, guided)


@pytest.mark.slow
@pytest.mark.usefixtures("reading")
def test_a_prompt_may_change_with_time(talk: Talk, out: Path) -> None:
    """The second of two chunks begins after 0.52 s."""
    encoder = ["--text-encoder", "whole.safetensors", "--prompt"]
    plain = _frames(talk, out, *encoder, "a man speaks")
    changed = _frames(talk, out, *encoder, "0-0.52s: a man speaks | 0.52s-: a dog")
    assert np.array_equal(changed[:13], plain[:13])
    assert not np.array_equal(changed[13:], plain[13:])


BARE = ("--prompt", "a", "--text-encoder", "bare.safetensors")


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a man"], "got a prompt without a text encoder"),
        (["--negative-prompt", "a dog"], "got a negative prompt alone"),
        ([*BARE[2:], "--prompt", "1-2s: a"], "segment 1 begins at 1 s; it must begin at 0 s"),
        (["--text-guidance", "3"], "got --text-guidance 3.0 without a prompt"),
        (BARE, "has no tokenizer inside"),
        (["--prompt", "a", "--text-encoder", "no.safetensors"], "there is bare.safetensors"),
        (
            [*BARE, "--tokenizer", ""],
            "cannot read",
        ),
        (
            [*BARE, "--tokenizer", "whole.safetensors"],
            "no SentencePiece tokenizer",
        ),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(
    talk: Talk, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert talk(*arguments) == 2
    assert message in refusal(capsys)


@pytest.mark.slow
def test_a_lora_is_merged_with_its_strength(talk: Talk, models: Path, out: Path) -> None:
    change = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    (models / "loras").mkdir(exist_ok=True)
    save_file(
        {"diffusion_model.blocks.0.ffn.0.diff": change}, models / "loras" / "style.safetensors"
    )
    plain = _frames(talk, out)
    for arguments, changes in (
        (["--lora", "style.safetensors:0"], False),
        (["--lora", "style.safetensors:1", "--lora", "style.safetensors:-1"], False),
        (["--lora", "style.safetensors"], True),
    ):
        difference = np.abs(_frames(talk, out, *arguments).astype(int) - plain).mean()
        assert (difference > 0.01) == changes  # levels; merging both is exact but for rounding


@pytest.mark.slow
def test_networks_are_compiled_on_demand(
    talk: Talk, models: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(cli_talk, "compile_networks", lambda *told: compiled.append(told))
    plain = _frames(talk, out)
    assert not compiled
    assert np.array_equal(_frames(talk, out, "--compile"), plain)
    ((networks, device),) = compiled
    assert isinstance(networks, Models)
    assert device == torch.device("cpu")


@pytest.mark.slow
def test_the_image_branch_is_shown_the_picture(
    talk: Talk, models: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "clip_vision").mkdir(exist_ok=True)
    save_image_encoder(models / "clip_vision" / "clip.safetensors", dim=80)
    dit = models / "diffusion_models" / "imaged.safetensors"
    save_dit_with_image_branch(dit, image_dim=80)
    with_adapter = ["--dit", dit.name, "--adapter", "turbotalk_tiny_adapter.safetensors"]
    try:
        plain = _frames(talk, out, *with_adapter)
        assert "imaged.safetensors has an image branch, which sees" in capsys.readouterr().err
        shown = _frames(talk, out, *with_adapter, "--image-encoder", "clip.safetensors")
        assert "note:" not in capsys.readouterr().err
        assert not np.array_equal(shown, plain)
        assert talk("--image-encoder", "clip.safetensors") == 2
        assert "image branch takes none" in refusal(capsys)
    finally:
        dit.unlink()


@pytest.mark.slow
def test_settings_that_do_not_fit_are_noted_and_done(
    talk: Talk, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk() == 0
    assert "note:" not in capsys.readouterr().err
    assert talk("--steps", 3, "--audio-guidance", 2) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [note.split()[1] for note in notes] == ["steps", "audio"]
    assert _read(out)[1].num_inference_steps == 3


@pytest.mark.slow
def test_an_adapter_for_one_speaker_is_noted(
    converse: Talk, models: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voice = str(inputs / "voice.wav")
    two = ["--speaker", "Anna", voice, "auto", "--speaker", "Bob", "-", "auto"]
    assert converse(*two) == 0
    said = capsys.readouterr().err
    assert "note:" not in said  # nothing tells
    adapter = models / "model_patches" / "single.safetensors"
    adapter.symlink_to("turbotalk_tiny_adapter.safetensors")
    try:
        assert converse(*two, "--adapter", adapter.name) == 0
    finally:
        adapter.unlink()
    said = capsys.readouterr().err
    assert 'note: 2 speakers, and single.safetensors is for one, going by the word "single"' in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a.safetensors:-1e-1", ("a.safetensors", -0.1)),
        ("C:\\loras\\a.safetensors", ("C:\\loras\\a.safetensors", 1.0)),
        ("C:\\loras\\a.safetensors:2", ("C:\\loras\\a.safetensors", 2.0)),
    ],
)
def test_a_colon_may_be_part_of_a_name(text: str, expected: tuple[str, float]) -> None:
    parser = argparse.ArgumentParser()
    add_talk(parser)
    given = parser.parse_args(["--image", "i", "--audio", "a", "--out", "o", "--lora", text])
    assert given.lora == [expected]
    assert parser.parse_args(["--image", "i", "--audio", "a", "--out", "o"]).lora == []
