"""The talk command on a complete family of very small networks with random weights."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.core.family import NUM_FRAMES, refusal
from turbotalk_core.cli import main
from turbotalk_core.library import TEACHER
from turbotalk_core.model.denoiser import WanDenoiser
from turbotalk_core.request import TalkRequest

Talk = Callable[..., int]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A file to make, in a folder of its own."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "talk.mp4"


@pytest.fixture
def talk(models: Path, inputs: Path, out: Path) -> Talk:
    """The talk command with good arguments; later ones win."""

    def run(*arguments: object) -> int:
        good = ["--image", inputs / "face.png", "--audio", inputs / "voice.wav", "--out", out]
        good += ["--models", models, "--size", "32x32", "--device", "cpu"]
        return main(["talk", *map(str, good), *map(str, arguments)])

    return run


def _read(path: Path) -> tuple[np.ndarray, TalkRequest, float]:
    """Frames, the request in the metadata and the seconds of sound of a video."""
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
        (["--steps", "0"], "got num_inference_steps 0; use a whole number from 1 to 4"),
        (["--size", "100x32"], "got width 100; the model takes multiples of 16"),
        (["--chunk-frames", "12"], "chunk_frames: got 12 frames"),
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
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert list(out.parent.iterdir()) == []
