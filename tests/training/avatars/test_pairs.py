"""Two avatars in one picture: each half is an avatar with its own voice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.avatars import pairs
from training.avatars.pairs import TURNS, draw_halves, draw_two_speakers
from training.avatars.synthetic import SAMPLES_PER_FRAME
from training.evaluation.mouth import estimate_aperture, sync
from turbotalk_core.errors import RequestError

NUM_FRAMES = 40


@pytest.fixture(autouse=True)
def _humming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a tone that swells and fades, different for each seed, without espeak-ng."""

    def hum(split: str, seed: int, seconds: float) -> Tensor:
        times_S = torch.arange(round(16_000 * seconds)) / 16_000
        swell_S = 0.5 - 0.5 * torch.cos((7 + 4 * (seed % 3)) * times_S)
        return 0.3 * swell_S * torch.sin(2 * torch.pi * 300 * times_S)

    monkeypatch.setattr(pairs, "draw_speech", hum)


def test_each_half_is_an_avatar_with_its_own_voice() -> None:
    two = draw_two_speakers("heldout", 3, NUM_FRAMES, "both")
    left, right = two.clips
    assert two.frames_CTHW.shape == (3, NUM_FRAMES, 128, 256)
    assert torch.equal(two.frames_CTHW[..., :128], left.frames_CTHW)
    assert torch.equal(two.frames_CTHW[..., 128:], right.frames_CTHW)
    assert not torch.equal(left.frames_CTHW[:, 0], right.frames_CTHW[:, 0])
    for clip in two.clips:
        assert sync(estimate_aperture(clip.frames_CTHW), clip.mouth.aperture_T)[0] > 0.98


@pytest.mark.parametrize("turns", TURNS)
def test_who_is_silent_keeps_the_mouth_shut(turns: str) -> None:
    two = draw_two_speakers("heldout", 1, NUM_FRAMES, turns)
    half = NUM_FRAMES // 2
    speaks = {
        "left": ((True, True), (False, False)),
        "right": ((False, False), (True, True)),
        "both": ((True, True), (True, True)),
        "in turn": ((True, False), (False, True)),
    }[turns]
    for clip, expected in zip(two.clips, speaks, strict=True):
        # the mouth's curve is smoothed over the frames beside the change
        settled = clip.mouth.opening_T[2 : half - 2], clip.mouth.opening_T[half + 2 : -2]
        assert [bool((part > 0.1).any()) for part in settled] == list(expected)
        halves = clip.waveform_S.split(half * SAMPLES_PER_FRAME)
        assert [bool(part.any()) for part in halves] == list(expected)


def test_the_same_seed_gives_the_same_pair() -> None:
    two = draw_two_speakers("heldout", 2, NUM_FRAMES, "both")
    again = draw_two_speakers("heldout", 2, NUM_FRAMES, "both")
    assert torch.equal(two.frames_CTHW, again.frames_CTHW)
    other = draw_two_speakers("train", 2, NUM_FRAMES, "both")
    assert not torch.equal(two.frames_CTHW, other.frames_CTHW)


@pytest.mark.parametrize(("num_frames", "turns"), [(1, "both"), (40, "nobody")])
def test_what_cannot_be_drawn_is_refused(num_frames: int, turns: str) -> None:
    with pytest.raises(RequestError, match=rf"got {num_frames} frames and turns '{turns}'"):
        draw_two_speakers("heldout", 0, num_frames, turns)


def test_each_half_has_a_box_with_margins() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_halves(16, 32, generator) for _ in range(20)]
    for left, right, background in drawn:
        assert left[4:12, 4:12].all()
        assert right[4:12, 20:28].all()
        assert not left[:, 16:].any()
        assert not right[:, :16].any()
        assert torch.equal(left + right + background, torch.ones(16, 32))
    assert len({tuple(regions.flatten().tolist()) for regions in drawn}) == 20
    assert any(background[0].all() for _, _, background in drawn)
