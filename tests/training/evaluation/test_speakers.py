"""The moving mouth is attributed to the right speaker, also in clips of the shipped models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from training.avatars.pairs import TwoSpeakerClip
from training.avatars.synthetic import SyntheticClip
from training.evaluation import speakers
from training.evaluation.speakers import draw_turns, score_turn
from turbotalk_core.errors import RequestError
from turbotalk_core.loading import EMBEDDED_MODELS

NUM_FRAMES = 26


@pytest.fixture(scope="module")
def true_clip(draw_humming_clip: Callable[[str, int, int], SyntheticClip]) -> TwoSpeakerClip:
    """The left one hums; the right one does, too."""
    left, right = (draw_humming_clip("heldout", seed, NUM_FRAMES) for seed in (3, 5))
    frames = torch.cat((left.frames_CTHW, right.frames_CTHW), 3)
    return TwoSpeakerClip(frames_CTHW=frames, clips=(left, right))


def test_the_true_clip_with_one_mouth_held_still(true_clip: TwoSpeakerClip) -> None:
    left, right = true_clip.frames_CTHW.chunk(2, dim=3)
    frames = torch.cat((left, right[:, :1].expand_as(right)), 3)
    scores = score_turn(7, "left", true_clip, frames)
    assert (scores.pair_seed, scores.speaker, scores.speaker_lag_frames) == (7, "left", 0)
    assert scores.speaker_sync > 0.9
    assert scores.other_sync == 0
    assert scores.other_opening == 0


def test_a_mouth_that_follows_the_wrong_voice_is_told(true_clip: TwoSpeakerClip) -> None:
    left, _ = true_clip.frames_CTHW.chunk(2, dim=3)
    scores = score_turn(0, "left", true_clip, torch.cat((left, left), 3))
    assert scores.other_sync == pytest.approx(scores.speaker_sync)
    assert scores.other_opening == pytest.approx(1)


def test_a_late_speaker_is_found(true_clip: TwoSpeakerClip) -> None:
    late = torch.cat(
        (true_clip.frames_CTHW[:, :1].expand(-1, 2, -1, -1), true_clip.frames_CTHW[:, :-2]), 1
    )
    scores = score_turn(0, "right", true_clip, late)
    assert scores.speaker_lag_frames == 2
    assert scores.speaker_sync > 0.9


@pytest.mark.parametrize(("seed", "num_pairs"), [(0, 0), (-1, 3)])
def test_pairs_that_cannot_be_drawn_are_refused(seed: int, num_pairs: int) -> None:
    with pytest.raises(RequestError, match=f"got {num_pairs} pairs and seed {seed}"):
        draw_turns(seed, num_pairs, 9)


@pytest.mark.usefixtures("_espeak")
@pytest.mark.long
@pytest.mark.parametrize("num_steps", [4, None])
def test_the_right_mouth_moves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_steps: int | None
) -> None:
    """With the shipped models, on two pairs they have never met: one speaks left, one right.

    In as many steps as the teacher ships with, and in few.
    """
    load = speakers.load_family

    def load_with_steps(*arguments: Any) -> Any:
        request, *networks = load(*arguments)
        return replace(request, num_inference_steps=num_steps), *networks

    if num_steps is not None:
        monkeypatch.setattr(speakers, "load_family", load_with_steps)
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    options = ["--weights", str(EMBEDDED_MODELS), "--pairs", "2", "--frames", "81", "--seed", "3"]
    outputs = ["--json", str(report), "--sheet", str(sheet)]
    monkeypatch.setattr(sys, "argv", ["speakers", *options, *outputs])
    assert speakers.main() == 0
    written = json.loads(report.read_text())
    assert [pair["speaker"] for pair in written["pairs"]] == ["left", "right"]
    for scores in written["pairs"]:
        assert scores["speaker_sync"] >= 0.8
        assert abs(scores["speaker_lag_frames"]) <= 1
        assert scores["other_sync"] <= 0.2
        assert scores["other_opening"] <= 0.2
    with Image.open(sheet) as picture:
        assert picture.size == (6 * 256, 4 * 128)
