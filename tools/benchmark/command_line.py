"""Speed and memory of ``talk``: over a long video, and next to the core on the same inputs."""

from __future__ import annotations

import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from scipy.stats import theilslopes

from tools.comfy.in_process import PACK
from training.benchmark.hardware import read_resident_bytes
from turbotalk_core.audio.conversation import LONE_SPEAKER, encode_conversation
from turbotalk_core.audio.io import open_sound
from turbotalk_core.benchmark.timing import time_video
from turbotalk_core.checkpoints.audio_encoder import load_audio_encoder
from turbotalk_core.cli.main import main
from turbotalk_core.conditioning.reference import read_image
from turbotalk_core.geometry import FPS
from turbotalk_core.loading import EMBEDDED_MODELS, find_model_files, load_models, read_request
from turbotalk_core.request import CHUNK_FRAMES, NUM_MOTION_FRAMES
from turbotalk_core.takes.journal import Journal
from turbotalk_core.types import Speaker

WARM = 50  # chunks during which the heap grows by some megabytes; later it does not
POLL_SECONDS = 0.05
_PORTRAIT = PACK / "assets" / "portrait.png"
_SPEECH = PACK / "assets" / "speech.wav"


def watch_talk(num_chunks: int, threads: int) -> dict[str, Any]:
    """Make a long video of the shipped portrait with the command line, and watch its memory.

    Args:
        num_chunks: chunks of the video, more than ``WARM`` and one.
        threads: CPU threads of the networks.

    Returns:
        Seconds from the start of the program to the first chunk on the disk and to the end; seconds
        of a steady chunk; frames per second; the least memory while each chunk was made; and its
        growth per chunk after the first ``WARM``. The growth is the median slope between any two
        chunks (Theil-Sen), as the memory that the allocator keeps varies by megabytes.

    Raises:
        RuntimeError: if the command fails.
    """
    num_frames = _count_frames(num_chunks)
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write_speech(folder / "speech.wav", num_frames / FPS)
        command = [
            *(sys.executable, "-m", "turbotalk_core", "talk", "--threads", str(threads)),
            *("--image", str(_PORTRAIT)),
            *("--audio", str(folder / "speech.wav"), "--out", str(folder / "talk.mp4")),
        ]
        log = folder / "log"
        started = time.perf_counter()
        with log.open("wb") as file:
            process = subprocess.Popen(command, cwd=PACK, stdout=file, stderr=file)
        finished: list[float] = []
        least: list[int] = []  # memory while a chunk was made; the peak depends on when it is read
        lows: list[int] = []
        journal = folder / "talk.mp4.take" / "take.journal"
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if held := read_resident_bytes(process.pid):
                lows.append(held)
            lines = journal.read_bytes().count(b"\n") if journal.is_file() else 0
            while len(finished) < lines - 1:  # the first record is of the whole take
                finished.append(time.perf_counter() - started)
                least.append(min(lows, default=0))
                lows.clear()
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    slope: Any = theilslopes(least[WARM:])[0]
    return {
        "num_chunks": num_chunks,
        "num_frames": num_frames,
        "first_chunk_seconds": finished[0],
        "steady_chunk_seconds": (finished[-1] - finished[0]) / (len(finished) - 1),
        "seconds": seconds,
        "frames_per_second": num_frames / seconds,
        "least_bytes": least,
        "warm_chunks": WARM,
        "bytes_per_chunk": float(slope),
    }


def compare_talk(num_chunks: int, rounds: int, chunk_frames: int = CHUNK_FRAMES) -> dict[str, Any]:
    """Make the same video with ``talk`` and with the core in turns, in this process.

    Both are timed from the first chunk on the disk to the last, so what ``talk`` does once, such as
    loading, is not counted. ``talk`` also reads and encodes the voice meanwhile, section by section
    as in long videos, while the core has all audio features in memory.

    Args:
        num_chunks: chunks of the video, at least two.
        rounds: number of rounds; an untimed one before them pays for what is set up once.
        chunk_frames: frames of a chunk, 4n + 1.

    Returns:
        For each of the two, seconds and CPU seconds of a steady chunk in each round; and the median
        over the rounds of ``talk``'s divided by the core's.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write_speech(folder / "speech.wav", _count_frames(num_chunks, chunk_frames) / FPS)
        arms = {
            "talk": _prepare_talk(folder, chunk_frames),
            "core": _prepare_core(folder / "speech.wav", chunk_frames),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for _ in range(1 + rounds):
            for arm, make in arms.items():
                with _record_chunks() as times:
                    make()
                first, last = times[1], times[-1]  # the first record is of the whole take
                num_steady = len(times) - 2
                found[arm].append(
                    ((last[0] - first[0]) / num_steady, (last[1] - first[1]) / num_steady)
                )
    pairs = list(zip(found["talk"][1:], found["core"][1:], strict=True))
    return {
        "num_chunks": num_chunks,
        "rounds": rounds,
        **{
            name: {
                "steady_chunk_seconds": [seconds for seconds, _ in taken[1:]],
                "steady_chunk_cpu_seconds": [seconds for _, seconds in taken[1:]],
            }
            for name, taken in found.items()
        },
        "ratio": median(talk[0] / core[0] for talk, core in pairs),
        "cpu_ratio": median(talk[1] / core[1] for talk, core in pairs),
    }


def _prepare_talk(folder: Path, chunk_frames: int) -> Callable[[], None]:
    command = ["talk", "--image", str(_PORTRAIT), "--audio", str(folder / "speech.wav")]
    command += ["--device", "cpu", "--hearing", "sections", "--out", str(folder / "talk.mp4")]
    command += ["--chunk-frames", str(chunk_frames)]

    def make() -> None:
        with redirect_stdout(StringIO()) as log, redirect_stderr(log):
            code = main(command)
        if code:
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.getvalue()[-2000:]}")

    return make


def _prepare_core(speech: Path, chunk_frames: int) -> Callable[[], None]:
    cpu = torch.device("cpu")
    files = find_model_files(EMBEDDED_MODELS)
    request = replace(read_request(files.inspect(files.dit)), chunk_frames=chunk_frames)
    models = load_models(files, cpu)
    conversation = encode_conversation(
        [Speaker(name=LONE_SPEAKER, waveform=open_sound(speech))],
        load_audio_encoder(files.audio_encoder),
        hearing="whole",
    )
    picture_HWC = read_image(_PORTRAIT)
    return lambda: time_video(models, request, conversation, picture_HWC, cpu) and None


@contextmanager
def _record_chunks() -> Iterator[list[tuple[float, float]]]:
    """Record the time and the CPU time of this process at each record of a take's journal."""
    times: list[tuple[float, float]] = []
    append = Journal.append

    def record(journal: Journal, entry: dict[str, Any]) -> None:
        append(journal, entry)
        times.append((time.perf_counter(), time.process_time()))

    with patch.object(Journal, "append", record):
        yield times


def _count_frames(num_chunks: int, chunk_frames: int = CHUNK_FRAMES) -> int:
    return chunk_frames + (num_chunks - 1) * (chunk_frames - NUM_MOTION_FRAMES)


def _write_speech(path: Path, seconds: float) -> None:
    """Write the shipped sentence, repeated to a length."""
    with wave.open(str(_SPEECH)) as sentence:
        settings = sentence.getparams()
        sound = sentence.readframes(sentence.getnframes())
    frame_bytes = settings.sampwidth * settings.nchannels
    wanted = round(seconds * settings.framerate) * frame_bytes
    with wave.open(str(path), "wb") as file:
        file.setparams(settings)
        file.writeframes((sound * (wanted // len(sound) + 1))[:wanted])
