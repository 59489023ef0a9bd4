"""Evaluation of real files: measured metrics, omitted metrics, and errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.metrics.clips import Clip, list_clips
from training.metrics.distances import frechet_distance
from training.metrics.evaluation import (
    EXPRESSION_SPACE,
    GENERATED,
    I3D_SPACE,
    INCEPTION_SPACE,
    METRICS,
    REAL,
    SYNC,
    Instrument,
    Instruments,
    Settings,
    load_instruments,
    measure,
)
from training.metrics.i3d import I3DSpace, load_i3d
from training.metrics.inception import WIDTH, InceptionSpace
from training.metrics.report import Report
from training.metrics.syncnet import SyncScores
from training.metrics.weights import I3D, KNOWN_FILES, SYNCNET
from turbotalk_core.errors import AudioError, CheckpointError, GeometryError, RequestError

from .conftest import MakeVideo, describe

CPU = torch.device("cpu")
INCEPTION_LIKE = InceptionSpace(lambda pictures: describe(pictures, WIDTH), CPU)


def _instruments(**loaded: Instrument) -> Instruments:
    return Instruments(loaded=loaded, missing={}, weights=())


@pytest.fixture
def sides(tmp_path: Path, make_video: MakeVideo) -> dict[str, list[Clip]]:
    """Two clips against three, darker ones against lighter ones."""
    for side, level, names in ((GENERATED, 0.3, "ab"), (REAL, 0.5, "abc")):
        for number, name in enumerate(names):
            video = [(20 + 20 * number, level + 0.05 * number)]
            make_video(tmp_path / side / f"{name}.mp4", video)
    return {side: list_clips(tmp_path / side, side, None)[0] for side in (GENERATED, REAL)}


def _value(report: Report, metric: str) -> float:
    return next(score.value for score in report.set_scores if score.metric == metric)


class TestSets:
    def test_distances_are_of_all_frames_of_all_clips(self, sides: dict[str, list[Clip]]) -> None:
        report = measure(sides, _instruments(inception=INCEPTION_LIKE), Settings())
        fid, kid = report.set_scores
        assert (fid.metric, kid.metric) == ("fid", "kid")
        for score in (fid, kid):
            assert score.clips == (2, 3)
            assert score.frames == score.samples == (60, 120)
            assert score.width == WIDTH
            assert "unequal sets, 60 generated and 120 real samples" in score.notes
        pooled = [torch.cat([INCEPTION_LIKE(clip) for clip in sides[side]]) for side in sides]
        assert fid.value == pytest.approx(frechet_distance(*pooled))
        assert "60 samples of 2048 features make a singular covariance" in fid.notes[0]
        assert kid.spread is not None
        assert kid.notes[0] == "100 subsets of 30 samples"
        assert [(side.num_clips, side.num_frames) for side in report.sides] == [(2, 60), (3, 120)]

    @pytest.mark.slow
    def test_equal_sets_are_at_no_distance(
        self, sides: dict[str, list[Clip]], all_weights: Path
    ) -> None:
        same = {GENERATED: sides[REAL], REAL: sides[REAL]}
        instruments = _instruments(inception=INCEPTION_LIKE, i3d=load_i3d(all_weights / I3D, CPU))
        report, other = (measure(both, instruments, Settings()) for both in (same, sides))
        for metric in ("fid", "fvd"):
            assert _value(report, metric) == pytest.approx(0, abs=1e-6)
            assert _value(other, metric) > 0.01
        kid = next(score for score in report.set_scores if score.metric == "kid")
        assert kid.spread is not None
        assert abs(kid.value) < kid.spread < _value(other, "kid")

    def test_spans_are_the_samples_of_fvd(
        self, sides: dict[str, list[Clip]], all_weights: Path
    ) -> None:
        report = measure(sides, _instruments(i3d=load_i3d(all_weights / I3D, CPU)), Settings())
        (score,) = report.set_scores
        assert (score.metric, score.sample) == ("fvd", "span of 16 frames")
        assert score.samples == (1 + 2, 1 + 2 + 3)
        assert score.frames == (48, 96)

    def test_one_clip_is_no_set(self, sides: dict[str, list[Clip]]) -> None:
        few = {GENERATED: sides[GENERATED][:1], REAL: sides[REAL]}
        instruments = _instruments(inception=INCEPTION_LIKE)
        report = measure(few, instruments, Settings())
        assert report.set_scores == ()
        assert set(report.not_measured) == {"fid", "kid"}
        assert "1 generated and 3 real clips; give at least 2" in report.not_measured["fid"]
        with pytest.raises(RequestError, match="kid compares sets"):
            measure(few, instruments, Settings(metrics=("kid",)))

    def test_only_what_is_asked_for_is_measured(self, sides: dict[str, list[Clip]]) -> None:
        instruments = _instruments(inception=INCEPTION_LIKE)
        report = measure(sides, instruments, Settings(metrics=("kid",), seed=1))
        assert [score.metric for score in report.set_scores] == ["kid"]
        assert report.not_measured == {}

    def test_a_network_of_another_form_stops_everything(self, sides: dict[str, list[Clip]]) -> None:
        narrow = I3DSpace(lambda video, **options: torch.zeros(1, 9), CPU)
        with pytest.raises(CheckpointError, match=r"I3D network returned \(1, 9\)"):
            measure(sides, _instruments(i3d=narrow), Settings())


class TestLeavingOut:
    def test_a_clip_is_left_out_of_what_cannot_look_at_it(
        self, sides: dict[str, list[Clip]]
    ) -> None:
        def embed(clip: Clip) -> Tensor:
            if clip.name == "c":
                raise GeometryError("too short")
            return torch.rand(5, 3, generator=torch.Generator().manual_seed(clip.num_frames))

        instruments = _instruments(expression=embed, inception=INCEPTION_LIKE)
        report = measure(sides, instruments, Settings())
        assert [(skip.side, skip.clip, skip.of, skip.reason) for skip in report.skips] == [
            (REAL, "c", "e_fid", "too short")
        ]
        clips = {score.metric: score.clips for score in report.set_scores}
        assert clips == {"e_fid": (2, 2), "fid": (2, 3), "kid": (2, 3)}

    def test_a_file_that_breaks_off_is_a_recorded_skip(
        self, sides: dict[str, list[Clip]], tmp_path: Path
    ) -> None:
        # Listed while it was whole, gone when it is measured.
        (tmp_path / REAL / "c.mp4").unlink()
        report = measure(sides, _instruments(inception=INCEPTION_LIKE), Settings())
        (skip,) = report.skips
        assert (skip.clip, skip.of) == ("c", "fid, kid")
        assert "there is no video at" in skip.reason
        assert report.set_scores[0].clips == (2, 2)


class TestSync:
    @staticmethod
    def _look(clip: Clip) -> SyncScores:
        if clip.name == "a":
            raise AudioError("it is silent")
        return SyncScores(sync_c=clip.num_frames / 10, sync_d=7.0, offset=1)

    def test_clips_are_scored_one_by_one(self, sides: dict[str, list[Clip]]) -> None:
        report = measure(sides, _instruments(sync=self._look), Settings())
        assert [(score.side, score.clip, score.sync_c) for score in report.clip_scores] == [
            (GENERATED, "b", 4.0),
            (REAL, "b", 4.0),
            (REAL, "c", 6.0),
        ]
        means = [(mean.side, mean.num_clips, mean.sync_c) for mean in report.clip_means]
        assert means == [(GENERATED, 1, 4.0), (REAL, 2, 5.0)]
        assert [(skip.clip, skip.of) for skip in report.skips] == [("a", SYNC), ("a", SYNC)]

    def test_none_at_all_is_told(self, sides: dict[str, list[Clip]]) -> None:
        only = {side: clips[:1] for side, clips in sides.items()}
        instruments = _instruments(sync=self._look)
        report = measure(only, instruments, Settings())
        assert "none of the clips" in report.not_measured[SYNC]
        with pytest.raises(RequestError, match="none of the clips"):
            measure(only, instruments, Settings(metrics=(SYNC,)))


class TestLoading:
    def test_without_weights_every_metric_says_what_it_needs(self, tmp_path: Path) -> None:
        instruments = load_instruments(tmp_path, Settings())
        assert instruments.loaded == {}
        assert set(instruments.missing) == set(METRICS)
        for metric, name in (("fid", "pt_inception"), ("fvd", I3D), (SYNC, SYNCNET)):
            assert name in instruments.missing[metric]
        assert "expression.pt2" in instruments.missing["e_fid"]

    @pytest.mark.parametrize("metric", METRICS)
    def test_what_is_asked_for_must_be_there(self, metric: str, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="not ours to ship"):
            load_instruments(tmp_path, Settings(metrics=(metric,)))

    @pytest.mark.usefixtures("_tiny")
    def test_all_that_is_there_is_loaded_and_recorded(self, all_weights: Path) -> None:
        instruments = load_instruments(all_weights, Settings())
        spaces = {INCEPTION_SPACE, I3D_SPACE, EXPRESSION_SPACE, SYNC}
        assert set(instruments.loaded) == spaces
        assert instruments.missing == {}
        assert {file.file for file in instruments.weights} == set(KNOWN_FILES)

    def test_a_file_that_is_not_the_public_one_measures_nothing(self, all_weights: Path) -> None:
        instruments = load_instruments(all_weights, Settings())
        assert set(instruments.missing) == {"fid", "kid", SYNC}
        assert "of the public file" in instruments.missing[SYNC]


@pytest.mark.parametrize(
    "wrong", [{"metrics": ("psnr",)}, {"metrics": ()}, {"num_frames": 0}, {"num_frames": -3}]
)
def test_settings_that_cannot_be_are_refused(wrong: Mapping[str, object]) -> None:
    with pytest.raises(RequestError, match="choose among fid, kid, fvd, e_fid, sync"):
        Settings(**wrong)  # pyright: ignore[reportArgumentType]
