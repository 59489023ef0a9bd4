"""The command line on a complete family of very small networks with random weights."""

import json
import re
import runpy
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbotalk_core.audio.encoder import EncoderConfig, build_audio_encoder, save_audio_encoder
from turbotalk_core.cli import main
from turbotalk_core.errors import CheckpointError
from turbotalk_core.library import TEACHER, find_model_files, read_request
from turbotalk_core.model.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.model.checkpoint import save_adapter, save_dit, save_vae
from turbotalk_core.model.denoiser import WanDenoiser
from turbotalk_core.model.vae import WanVAE
from turbotalk_core.model.wan import WanConfig, WanModel
from turbotalk_core.request import TalkRequest

SHIPPED = {
    "kind": "student",
    "steps": 2,
    "schedule": "distilled",
    "shift": 5.0,
    "update": "renoise",
    "audio_guidance_scale": 1.0,
    "height": 32,
    "width": 32,
    "chunk_frames": 13,
    "num_motion_frames": 5,
}
NUM_FRAMES = 20  # two chunks of 13 that share 5

Talk = Callable[..., int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder as ComfyUI lays it out."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("diffusion_models", "model_patches", "audio_encoders", "vae"):
        (folder / name).mkdir()
    encoder = build_audio_encoder(
        EncoderConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8,) * 7,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        ),
        seed=0,
    )
    save_audio_encoder(encoder, folder / "audio_encoders" / "turbotalk_tiny_wav2vec2.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WanModel(
            WanConfig(
                dim=24,
                ffn_dim=32,
                num_heads=2,
                num_layers=1,
                text_dim=8,
                frequency_dim=16,
                image_dim=None,
                audio_heads=2,
                audio_token_dim=16,
            )
        )
        model.initialize()
        projection = AudioProjection(
            AudioAdapterConfig(frame_width=2 * 16, hidden_dim=8, num_tokens=2, token_dim=16)
        )
        vae = WanVAE(4)
    save_dit(folder / "diffusion_models" / TEACHER, model, SHIPPED)
    save_adapter(
        folder / "model_patches" / "turbotalk_tiny_adapter.safetensors", model, projection, {}
    )
    save_vae(folder / "vae" / "turbotalk_tiny_vae.safetensors", vae, {})
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with a portrait and a voice."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 40, 3), dtype=np.uint8)).save(folder / "face.png")
    samples = rng.integers(-9000, 9000, NUM_FRAMES * 640 + 300, dtype=np.int16)
    with wave.open(str(folder / "voice.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return folder


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


def _refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command says."""
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in captured.err
    return last


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
    assert re.search(message, _refusal(capsys))
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["talk"],
        ["dance"],
        ["plan"],
        ["plan", "--seconds", "1", "--audio", "x.wav"],
        ["talk", "--image", "i", "--audio", "a", "--out", "o", "--size", "big"],
        ["talk", "--image", "i", "--audio", "a", "--out", "o", "--threads", "0"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_plan_shows_a_row_for_each_chunk(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--seconds", "8"]) == 0
    title, heads, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("200 frames, 8.00 s, 3 chunks")
    assert heads.split() == ["chunk", "makes", "keeps", "seconds"]
    assert [" ".join(row.split()) for row in rows] == [
        "0 0 - 81 0 - 81 0.00 - 3.24",
        "1 72 - 153 81 - 153 3.24 - 6.12",
        "2 144 - 225 153 - 200 6.12 - 8.00",
    ]


def test_plan_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--chunk-frames", "21", "--motion-frames", "5"]
    assert main(["plan", "--seconds", "0.92", "--json", *lengths]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == {
        "num_frames": 23,  # not 22: 0.92 is read as it is written
        "fps": 25,
        "chunks": [
            {"index": 0, "start": 0, "stop": 21, "keep_start": 0, "keep_stop": 21},
            {"index": 1, "start": 16, "stop": 37, "keep_start": 21, "keep_stop": 23},
        ],
    }


def test_plan_of_a_recording(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--audio", str(inputs / "voice.wav"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_frames"] == NUM_FRAMES


def test_plan_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--seconds", "0.03"]) == 2
    assert "got 0 frames" in _refusal(capsys)


def test_inspect_says_what_a_file_is(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(models / "diffusion_models" / TEACHER)
    assert main(["inspect", path]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{TEACHER}: video transformer")
    assert main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == SHIPPED


def test_inspect_refuses_what_is_no_model(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(inputs / "face.png")]) == 2
    assert "face.png" in _refusal(capsys)


def _bench(*arguments: str) -> int:
    return main(["bench", "--device", "cpu", "--size", "32x48", "--frames", "9", *arguments])


@pytest.mark.parametrize("source", [["--random"], []])
def test_bench_measures_a_chunk(
    models: Path, capsys: pytest.CaptureFixture[str], source: list[str]
) -> None:
    assert _bench("--models", str(models), "--steps", "2", "--json", "--threads", "1", *source) == 0
    told = json.loads(capsys.readouterr().out)
    sizes = ("width", "height", "num_frames", "num_inference_steps", "num_tokens")
    assert [told[name] for name in sizes] == [32, 48, 9, 2, 3 * 2 * 3]
    assert told["weights"].startswith("random weights" if source else TEACHER)
    assert told["obstacle"] is None
    assert len(told["seconds"]) == 2
    assert told["ratios"].keys() == {"chunk", "vae"}


def test_bench_without_a_size_takes_the_shipped_one(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--models", str(models), "--random", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("one chunk of 13 frames, 32x32, 16 video tokens, steps: 1\n")
    assert "random weights in float32, VAE in float32, on cpu" in said


def test_bench_of_the_full_size_says_what_it_would_need(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _bench("--model", "14b", "--random") == 0
    said = capsys.readouterr().out
    assert "random weights in bfloat16" in said
    assert re.search(r"transformer weights +32\.790 GB", said)
    assert "not run: on cpu" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "14b"], "14b without --random; only tiny ships weights"),
        (["--frames", "10"], "got 10 frames"),
        (["--size", "40x48"], "got width 40; the model takes multiples of 16"),
    ],
)
def test_bench_refuses_what_cannot_be_run(
    models: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert _bench("--models", str(models), *arguments) == 2
    assert message in _refusal(capsys)


def test_the_package_runs_as_a_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["turbotalk_core", "plan", "--seconds", "1"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("turbotalk_core", run_name="__main__")
    assert caught.value.code == 0
    assert "25 frames" in capsys.readouterr().out


def test_the_student_is_taken_where_there_is_one(models: Path, tmp_path: Path) -> None:
    assert find_model_files(models).dit.name == TEACHER
    for name in ("diffusion_models", "model_patches", "audio_encoders", "vae"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "diffusion_models").unlink()
    (tmp_path / "diffusion_models").mkdir()
    (tmp_path / "diffusion_models" / "turbotalk_tiny.safetensors").touch()
    assert find_model_files(tmp_path).dit.name == "turbotalk_tiny.safetensors"


def _save_dit(path: Path, settings: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        config = WanConfig(
            dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, image_dim=None,
            audio_heads=None,
        )  # fmt: skip
        save_dit(path, WanModel(config), settings)


def test_a_file_without_settings_gets_those_of_the_reference(tmp_path: Path) -> None:
    _save_dit(tmp_path / "bare.safetensors", {})
    request = read_request(tmp_path / "bare.safetensors")
    assert (request.num_inference_steps, request.schedule, request.shift) == (40, "reference", 7)
    assert (request.update, request.audio_guidance_scale) == ("euler", 4)
    assert (request.chunk_frames, request.num_motion_frames) == (81, 9)


def test_shipped_settings_out_of_range_blame_the_file(tmp_path: Path) -> None:
    _save_dit(tmp_path / "odd.safetensors", {"shift": -1})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors cannot be used: got shift -1"):
        read_request(tmp_path / "odd.safetensors")
