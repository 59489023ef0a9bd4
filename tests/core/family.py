"""What the tests of the command line agree on."""

import pytest

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


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command says."""
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in captured.err
    return last
