"""Hours of sound: constant memory, and encoding of no more than the next sections."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

MOST_GROWTH = 60  # MB; in 20 minutes the samples of the smaller file alone take 77

PROGRAM = """
import json, resource, sys
import torch
from turbotalk_core.audio.conversation import encode_speech
from turbotalk_core.audio.io import open_sound
from turbotalk_core.fingerprints import digest_sound
from turbotalk_core.types import Waveform

calls = []

class Encoder:
    first_kernel = (10, 5)

    def fingerprint(self):
        return "5b"

    def encode(self, waveform_S, num_frames, moments=None):
        calls.append(num_frames)
        return torch.zeros(num_frames, 2, 3)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def hear(sound, hearing, *spans):
    features = encode_speech(sound, Encoder(), hearing=hearing).features
    for start, stop in spans:
        assert features.rows(start, stop).shape[0] == stop - start
    return features.num_frames

# What is loaded when it is first used shall not count.
hear(Waveform(samples_CS=torch.ones(1, 48_000), sample_rate=48_000), "sections", (0, 20))
calls.clear()
before = peak()
planned = open_sound(sys.argv[1]).num_frames
digest_sound(open_sound(sys.argv[1]))
planning = peak() - before
heard = hear(open_sound(sys.argv[2]), "auto", (0, 83), (70, 155))
num_first = len(calls)
hear(open_sound(sys.argv[2]), "auto", (heard // 2, heard // 2 + 83))
print(json.dumps({
    "planned": planned, "planning": planning, "heard": heard, "first": num_first,
    "far": len(calls) - num_first, "growth": peak() - before,
}))
"""


def _write_silence(path: Path, seconds: int, sample_rate: int, num_channels: int) -> Path:
    """Write a header followed by a hole, which uses no space on the disk."""
    frame = 2 * num_channels
    size = seconds * sample_rate * frame
    form = struct.pack("<IHHIIHH", 16, 1, num_channels, sample_rate, sample_rate * frame, frame, 16)
    path.write_bytes(
        b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + form + b"data"
        + struct.pack("<I", size)
    )  # fmt: skip
    with path.open("r+b") as file:
        file.truncate(44 + size)
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
@pytest.mark.parametrize("minutes", [20, pytest.param(120, marks=pytest.mark.long)])
def test_memory_does_not_grow_with_the_length_of_the_sound(tmp_path: Path, minutes: int) -> None:
    seconds = 60 * minutes
    stereo = _write_silence(tmp_path / "stereo.wav", seconds, 48_000, 2)
    mono = _write_silence(tmp_path / "mono.wav", seconds, 16_000, 1)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, stereo, mono],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    measured = json.loads(result.stdout)
    assert measured["planned"] == measured["heard"] == 25 * seconds
    assert measured["first"] == 1  # one section for the first two chunks
    assert measured["far"] == 1
    assert measured["planning"] < 50
    assert measured["growth"] < MOST_GROWTH
