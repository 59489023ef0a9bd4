"""Hosts that lack packages: what does not need one works, the rest says what to install."""

import contextlib
import importlib
import io
import pkgutil
import sys
import wave
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.family import ENCODER_CONFIG
from tests.forks import call_in_child
from turbotalk_core.audio.loudness import LoudnessMeter
from turbotalk_core.audio.wav2vec2 import build_audio_encoder
from turbotalk_core.cli.main import main
from turbotalk_core.dependencies import required_for
from turbotalk_core.errors import MissingToolError
from turbotalk_core.models.text_encoder import build_tokenizer
from turbotalk_core.takes.cache_key import CacheKey
from turbotalk_core.takes.take import open_take
from turbotalk_core.types import Waveform

DROPPED = ["torchaudio"]  # by ComfyUI; nothing of ours needs it
OPTIONAL = ["filelock", "pyloudnorm", "scipy", "sentencepiece", "transformers"]


def _hide(package: str) -> None:
    """Make a package impossible to import in this process, as if it were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]


def _run_without(packages: Sequence[str], runs: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Run the command line without packages; return exit codes and what was printed."""
    for package in packages:
        _hide(package)
    results = []
    for arguments in runs:
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            code = main(arguments)
        results.append((code, printed.getvalue()))
    return results


def _import_all_without(package: str) -> list[str]:
    """Import every module of the core anew; return their names."""
    _hide(package)
    for name in [name for name in sys.modules if name.partition(".")[0] == "turbotalk_core"]:
        del sys.modules[name]
    core = importlib.import_module("turbotalk_core")
    found = [module.name for module in pkgutil.walk_packages(core.__path__, "turbotalk_core.")]
    names = [name for name in found if not name.endswith("__main__")]
    for name in names:
        importlib.import_module(name)
    return names


@pytest.fixture
def talk(models: Path, inputs: Path, tmp_path: Path) -> list[str]:
    """Arguments of a small run, whose voice must be resampled."""
    rng = np.random.default_rng(0)
    samples = rng.integers(-9000, 9000, 35_280, dtype=np.int16)
    with wave.open(str(inputs / "voice.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44_100)
        file.writeframes(samples.tobytes())
    arguments = ["talk", "--image", inputs / "face.png", "--audio", inputs / "voice.wav"]
    arguments += ["--out", tmp_path / "talk.mp4", "--models", models, "--size", "32x32"]
    return [*map(str, arguments), "--device", "cpu"]


def _read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("package", DROPPED + OPTIONAL)
def test_every_module_imports_without(package: str) -> None:
    names = call_in_child(_import_all_without, package)
    assert {"turbotalk_core.audio.resample", "turbotalk_core.takes.take"} <= set(names)


@pytest.mark.slow
def test_a_video_without_is_the_same(talk: list[str], tmp_path: Path) -> None:
    assert main(talk) == 0
    expected = _read(tmp_path / "talk.mp4")
    (tmp_path / "talk.mp4").unlink()
    [(code, printed)] = call_in_child(_run_without, [*DROPPED, "sentencepiece"], [talk])
    assert code == 0, printed
    assert np.array_equal(_read(tmp_path / "talk.mp4"), expected)


@pytest.mark.slow
def test_loudness_alone_needs_pyloudnorm(talk: list[str], tmp_path: Path) -> None:
    runs = [talk, [*talk, "--no-loudness"]]
    (code, printed), (code_as_loud, _) = call_in_child(_run_without, ["pyloudnorm"], runs)
    assert (code, code_as_loud) == (2, 0)
    said = (
        "error: loudness normalisation (off with --no-loudness, or normalize_loudness of the node)"
    )
    last = printed.splitlines()[-1]
    assert last.startswith(f"{said} needs the package pyloudnorm, which is not installed")
    assert "pip install pyloudnorm" in last
    assert "Traceback" not in printed
    assert (tmp_path / "talk.mp4").exists()


def _refuse_without(package: str, function: Callable[..., object], *arguments: object) -> str:
    """Return the message with which a function refuses to work without a package."""
    _hide(package)
    with pytest.raises(MissingToolError) as refused:
        function(*arguments)
    return str(refused.value)


def _begin_take(folder: Path) -> None:
    sound = Waveform(samples_CS=torch.zeros(1, 9_600), sample_rate=16_000)
    key = CacheKey(fields={"seed": "0"})
    with open_take(folder, sound, height=16, width=20, length=9, cache_key=key):
        pass


def _build_encoder() -> None:
    build_audio_encoder(ENCODER_CONFIG, seed=0)


def test_the_meter_needs_scipy() -> None:
    assert "needs the package scipy, which" in call_in_child(
        _refuse_without, "scipy", LoudnessMeter
    )


def test_an_audio_encoder_needs_transformers() -> None:
    said = call_in_child(_refuse_without, "transformers", _build_encoder)
    assert said.startswith(
        "an audio encoder needs the package transformers, which is not installed"
    )


def test_a_take_needs_filelock(tmp_path: Path) -> None:
    said = call_in_child(_refuse_without, "filelock", _begin_take, tmp_path / "take")
    assert said.startswith("a take on disk needs the package filelock, which is not installed")
    assert not (tmp_path / "take").exists()


def test_the_command_line_says_it_in_one_line(talk: list[str], tmp_path: Path) -> None:
    [(code, printed)] = call_in_child(_run_without, ["transformers"], [talk])
    assert code == 2
    assert printed.splitlines()[-1].startswith("error: an audio encoder needs the package transf")
    assert "Traceback" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def test_a_prompt_needs_sentencepiece() -> None:
    said = call_in_child(_refuse_without, "sentencepiece", build_tokenizer, b"")
    assert said.startswith(
        "the tokenizer of a prompt needs the package sentencepiece, which is not"
    )


def test_a_broken_package_says_what_is_broken() -> None:
    said = r"singing needs the package songs, which cannot be imported \(DLL load failed\)"
    with pytest.raises(MissingToolError, match=said), required_for("singing"):
        raise ImportError("DLL load failed", name="songs._native")


def test_what_a_package_lacks_itself_is_named() -> None:
    inner = ModuleNotFoundError("No module named 'songs'", name="songs")
    said = "needs the package songs, which is not installed"
    with pytest.raises(MissingToolError, match=said), required_for("singing"):
        raise ModuleNotFoundError("Could not import module 'Choir'.") from inner
