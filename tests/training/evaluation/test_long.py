"""Scores of long videos with known seams and drifts, and the reports of the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.family import FakeEncoder, write_family
from tests.training.tiny_networks import SHIPPED, SIZE, make_networks
from training.avatars.synthetic import SyntheticClip
from training.evaluation import generation, long
from training.evaluation.long import TEN, list_bounds, measure
from turbotalk_core.chunking.plan import plan_chunks
from turbotalk_core.errors import RequestError
from turbotalk_core.types import FrameChunk

LEVEL = 2 / 255  # one of a byte
STILL_HW = torch.ones(8, 8, dtype=torch.bool)


def _cut(video_CTHW: Tensor) -> Iterator[FrameChunk]:
    """Chunks of 13 frames, of which 5 come from the one before."""
    for chunk in plan_chunks(video_CTHW.shape[1], 13, 5).chunks:
        kept_CTHW = video_CTHW[:, chunk.keep_start : chunk.keep_stop]
        yield FrameChunk(chunk=chunk, frames_BCTHW=kept_CTHW.unsqueeze(0))


def _brighten(steps_T: Tensor) -> Tensor:
    """A grey video whose brightness goes up by whole levels."""
    levels_T = -0.5 - LEVEL / 2 + LEVEL * torch.cat((torch.zeros(1), steps_T.cumsum(0)))
    return levels_T.view(1, -1, 1, 1).expand(3, -1, 8, 8)


def _measure(video_CTHW: Tensor) -> long.LongScores:
    return measure(_cut(video_CTHW), STILL_HW, torch.zeros(video_CTHW.shape[1]))


def test_a_steady_video_has_no_seam() -> None:
    scores = _measure(_brighten(torch.ones(36)))
    assert (scores.num_chunks, scores.num_frames) == (4, 37)
    assert scores.seam_ratio == pytest.approx(1, abs=1e-4)
    assert scores.worst_seam_ratio == pytest.approx(1, abs=1e-4)
    assert scores.latent_step_ratio == pytest.approx(1, abs=1e-4)


def test_leaps_are_told_apart_by_their_place() -> None:
    """Chunks begin at frames 13, 21 and 29; latent frames at 1, 5, 9 and so on, these included."""
    steps_T = torch.ones(36)
    steps_T[0::4] = 3
    steps_T[[12, 20, 28]] = torch.tensor([4.0, 5.0, 9.0])
    scores = _measure(_brighten(steps_T))
    assert scores.seam_ratio == pytest.approx(5, rel=1e-3)
    assert scores.worst_seam_ratio == pytest.approx(9, rel=1e-3)
    assert scores.latent_step_ratio == pytest.approx(3, rel=1e-3)


def test_drift_is_a_share_of_the_begin() -> None:
    """The first half has a mean of 0.4 above black and a spread of 0.2, the second 10 % more."""
    checks_HW = 2.0 * (torch.arange(64).view(8, 8) % 2) - 1
    begin = -0.6 + 0.2 * checks_HW
    end = -0.56 + 0.22 * checks_HW
    video = torch.stack([begin] * 18 + [end] * 19).expand(3, -1, -1, -1).clone()
    video += LEVEL * (torch.arange(37) % 2).view(1, -1, 1, 1)  # else there is no usual step
    scores = _measure(video)
    assert scores.colour_drift == pytest.approx(0.1, abs=0.01)
    assert scores.contrast_drift == pytest.approx(0.1, abs=0.01)


@pytest.mark.slow
def test_lips_of_the_first_and_last_ten_chunks_are_read(
    draw_humming_clip: Callable[[str, int, int], SyntheticClip],
) -> None:
    clip = draw_humming_clip("heldout", 3, 13 + 8 * (2 * TEN + 1))
    stopped = clip.frames_CTHW.clone()
    stopped[:, 13 + 8 * (TEN + 1) :] = stopped[:, :1]  # the last ten chunks
    aperture_T = clip.mouth.aperture_T
    scores = measure(_cut(stopped), clip.still_mask_HW, aperture_T)
    assert scores.num_chunks == 2 * TEN + 2
    assert scores.first_sync > 0.9
    assert scores.last_sync == 0
    assert len(scores.syncs) == 2
    assert len(scores.chunk_syncs) == 2 * TEN + 2
    assert min(scores.chunk_syncs[: TEN + 2]) > 0.9
    assert not any(scores.chunk_syncs[TEN + 2 :])
    assert scores.syncs[0] == scores.first_sync
    assert measure(_cut(clip.frames_CTHW), clip.still_mask_HW, aperture_T).last_sync > 0.9


def test_a_short_video_or_none_at_rest_is_refused() -> None:
    with pytest.raises(RequestError, match="got a single chunk"):
        _measure(_brighten(torch.ones(12)))
    with pytest.raises(RequestError, match="no region that stands still"):
        measure(_cut(_brighten(torch.ones(36))), ~STILL_HW, torch.zeros(37))
    with pytest.raises(RequestError, match="nothing moves"):
        _measure(_brighten(torch.zeros(36)))


def _score(**changes: object) -> long.LongScores:
    settings: dict[str, object] = {
        "num_chunks": 100,
        "num_frames": 7209,
        "seam_ratio": 1.25,
        "worst_seam_ratio": 2.0,
        "latent_step_ratio": 1.3,
        "colour_drift": 0.02,
        "contrast_drift": 0.02,
        "first_sync": 0.75,
        "last_sync": 0.74,
        "syncs": [],
        "chunk_syncs": [],
    }
    return long.LongScores(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, None),
        ({"seam_ratio": 1.26}, 0),
        ({"colour_drift": 0.021}, 1),
        ({"contrast_drift": 0.021}, 2),
        ({"last_sync": 0.72}, 3),
    ],
)
def test_each_claim_can_be_broken(changes: dict[str, object], broken: int | None) -> None:
    holds = [bound.holds for bound in list_bounds(_score(**changes))]
    assert holds == [number != broken for number in range(4)]


@pytest.fixture
def weights(
    draw_humming_clip: Callable[[str, int, int], SyntheticClip],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Path:
    """A models folder; the audio encoder and the voice are fakes."""
    write_family(tmp_path / "models", make_networks(), SHIPPED)

    def film(split: str, seed: int, take_S: Tensor) -> tuple[SyntheticClip, Tensor]:
        clip = draw_humming_clip(split, seed, len(take_S) // 640)
        return clip, clip.frames_CTHW[:, 0]

    monkeypatch.setattr(generation, "load_audio_encoder", lambda path: FakeEncoder())
    monkeypatch.setattr(
        long,
        "draw_speech",
        lambda split, seed, seconds: draw_humming_clip(split, seed, round(25 * seconds)).waveform_S,
    )
    monkeypatch.setattr(long, "film", film)
    # At first networks predict nothing, and their pictures rest; so they are made to tremble.
    generate = long.generate

    def tremble(*arguments: Any) -> Iterator[FrameChunk]:
        for made in generate(*arguments):
            shift_T = LEVEL * (torch.arange(made.frames_BCTHW.shape[2]) % 2)
            yield replace(made, frames_BCTHW=made.frames_BCTHW / 2 + shift_T.view(-1, 1, 1))

    monkeypatch.setattr(long, "generate", tremble)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return tmp_path / "models"


@pytest.mark.slow
def test_the_command_makes_a_report_a_page_and_pictures(weights: Path, tmp_path: Path) -> None:
    plain, report, page = (tmp_path / name for name in ("plain.json", "long.json", "long.md"))
    options = ["--chunks", "3", "--weights", str(weights), "--model", "teacher", "--steps", "1"]
    assert long.main([*options, "--follow-reference", "--json", str(plain)]) == 0
    outputs = ["--json", str(report), "--markdown", str(page), "--beside", str(plain)]
    pictures = tmp_path / "long.png"
    assert long.main([*options, "--anchor", *outputs, "--pictures", str(pictures)]) == 0
    written, other = (json.loads(path.read_text()) for path in (report, plain))
    assert written.keys() == {"settings", "scores", "bounds"}
    assert (written["scores"]["num_chunks"], written["scores"]["num_frames"]) == (3, 17 + 2 * 12)
    assert written["scores"]["seam_ratio"] < other["scores"]["seam_ratio"]
    assert written["settings"]["anchors_chunks"]
    assert other["settings"]["follows_reference"]
    text = page.read_text()
    made = "teacher, steps: 1, seed 1"
    assert f"| {made}, anchored | {made}, as the reference goes on |" in text
    assert all(text.count(f"| {bound['text']} |") == 1 for bound in written["bounds"])
    with Image.open(pictures) as picture:
        assert picture.size == (3 * SIZE, SIZE)


def test_the_command_explains_what_is_wrong(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--weights", str(weights), "--model", "teacher", "--json", str(tmp_path / "a.json")]
    assert long.main([*options, "--chunks", "1"]) == 2
    assert "got 1 chunks; a long video has at least two" in capsys.readouterr().err
