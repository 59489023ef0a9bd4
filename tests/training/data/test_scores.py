"""Scores against closed forms, and the tiers that follow from them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.data.scores import (
    CROP_GREY,
    FACE_CROP,
    LIMITS,
    Limit,
    crop_faces,
    find_faces,
    load_program,
    rank,
    score_faces,
    score_sound,
    score_sync,
)
from turbotalk_core.errors import CheckpointError


def _tone(seconds: float, amplitude: float) -> Tensor:
    times_S = torch.arange(round(16_000 * seconds), dtype=torch.float64) / 16_000
    return (amplitude * torch.sin(2 * math.pi * 997 * times_S)).float()


class TestSound:
    @pytest.mark.parametrize("amplitude", [1.0, 0.05])
    def test_a_tone_has_the_loudness_of_its_level(self, amplitude: float) -> None:
        scores = score_sound(_tone(2.0, amplitude))
        expected = -3.01 + 20 * math.log10(amplitude)  # ITU-R BS.1770-4
        assert scores["loudness"] == pytest.approx(expected, abs=0.1)
        assert scores["silence_share"] == 0

    def test_pauses_are_counted_whatever_the_level(self) -> None:
        for amplitude in (0.5, 0.01):
            voice_S = torch.cat((_tone(3.0, amplitude), 1e-5 * amplitude * torch.ones(16_000)))
            assert score_sound(voice_S)["silence_share"] == 0.25

    def test_silence_has_no_loudness(self) -> None:
        assert score_sound(torch.zeros(16_000)) == {"silence_share": 1.0}


class TestFaces:
    def test_boxes_below_the_score_are_no_faces(self) -> None:
        def detect(picture_CHW: Tensor) -> Tensor:
            assert picture_CHW.shape == (3, 20, 30)
            return torch.tensor([[1.0, 2, 11, 14, 0.9], [0, 0, 5, 5, 0.1]])

        (boxes_N4,) = find_faces([torch.zeros(20, 30, 3)], detect)
        assert torch.equal(boxes_N4, torch.tensor([[1.0, 2, 11, 14]]))

    def test_a_detector_of_another_form_is_refused(self) -> None:
        with pytest.raises(CheckpointError, match=r"\[faces, 5\]"):
            find_faces([torch.zeros(20, 30, 3)], lambda picture_CHW: torch.zeros(2, 4))

    def test_only_lone_faces_count(self) -> None:
        one = torch.tensor([[0.0, 0, 10, 20]])
        large = torch.tensor([[0.0, 0, 50, 60]])
        faces = [one, torch.cat((one, one)), torch.zeros(0, 4), large]
        assert score_faces(faces) == {"face_share": 0.5, "face_side": 15.0}
        assert score_faces([torch.zeros(0, 4)]) == {"face_share": 0.0}

    def test_the_crop_is_a_square_around_the_face(self) -> None:
        # A face of 20 pixels in the middle: 28 pixels are cut out, from its top edge on.
        picture_HWC = torch.zeros(60, 60, 3)
        picture_HWC[20:48, 16:44] = 1
        box_N4 = torch.tensor([[20.0, 20, 40, 40]])
        crop_TCHW = crop_faces([picture_HWC, picture_HWC], [box_N4])
        assert crop_TCHW.shape == (2, 3, FACE_CROP, FACE_CROP)
        torch.testing.assert_close(crop_TCHW, torch.ones_like(crop_TCHW))

    def test_what_is_outside_the_picture_is_grey(self) -> None:
        crop_TCHW = crop_faces([torch.ones(40, 40, 3)], [torch.tensor([[-20.0, 0, 20, 40]])])
        # 56 pixels are cut out: half of them to the left of the picture, 16 below it.
        assert crop_TCHW[0, :, 10, FACE_CROP // 2 - 8].tolist() == pytest.approx([CROP_GREY] * 3)
        assert crop_TCHW[0, :, 10, FACE_CROP // 2 + 8].tolist() == pytest.approx([1] * 3)
        assert crop_TCHW[0, :, -8, -8].tolist() == pytest.approx([CROP_GREY] * 3)


class TestSync:
    @pytest.mark.parametrize("offset", [-15, -4, 0, 7, 15])
    def test_a_shifted_voice_is_found(self, offset: int) -> None:
        generator = torch.Generator().manual_seed(0)
        both_ND = torch.randn(100, 16, generator=generator)
        audio_ND = both_ND.roll(offset, 0)
        scores = score_sync(both_ND, audio_ND)
        assert scores["sync_offset"] == offset
        assert scores["sync_distance"] == pytest.approx(0, abs=1e-6)
        # Of independent normal vectors: the mean distance is close to sqrt(2 D).
        assert scores["sync_confidence"] == pytest.approx(math.sqrt(32), rel=0.05)

    def test_what_never_fits_has_no_confidence(self) -> None:
        video_ND, audio_ND = torch.zeros(60, 4), torch.ones(60, 4)
        assert score_sync(video_ND, audio_ND)["sync_confidence"] == 0
        assert score_sync(video_ND, audio_ND)["sync_distance"] == 2

    def test_a_short_piece_is_not_judged(self) -> None:
        assert score_sync(torch.zeros(30, 4), torch.zeros(30, 4)) == {}

    def test_a_judge_of_another_form_is_refused(self) -> None:
        with pytest.raises(CheckpointError, match="two equal shapes"):
            score_sync(torch.zeros(40, 4), torch.zeros(39, 4))


class TestTiers:
    @pytest.mark.parametrize(("score", "tier"), [(480, 0), (479, 1), (256, 1), (255, 2)])
    def test_at_least(self, score: float, tier: int) -> None:
        assert LIMITS["side"].place(score) == tier

    @pytest.mark.parametrize(("score", "tier"), [(0.4, 0), (0.5, 1), (0.8, 1), (0.9, 2)])
    def test_at_most(self, score: float, tier: int) -> None:
        assert LIMITS["silence_share"].place(score) == tier

    def test_the_worst_score_decides(self) -> None:
        assert rank({"side": 500, "silence_share": 0.5, "seconds": 0.1}) == (1, ["silence_share"])
        assert rank({"side": 100, "silence_share": 0.5}) == (2, ["side", "silence_share"])
        assert rank({"side": 500}) == (0, [])

    def test_an_offset_counts_either_way(self) -> None:
        assert rank({"sync_offset": -2}) == rank({"sync_offset": 2}) == (1, ["sync_offset"])

    def test_limits_may_be_chosen(self) -> None:
        assert rank({"side": 100}, {"side": Limit(good=64, fair=32)}) == (0, [])


class TestPrograms:
    def test_an_exported_program_is_called(self, tmp_path: Path) -> None:
        class Middle(torch.nn.Module):
            def forward(self, picture_CHW: Tensor) -> Tensor:
                bright = (picture_CHW.mean() > 0.5).float()
                return torch.stack((bright, bright, 2 * bright, 3 * bright, bright))[None]

        sides = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
        program = torch.export.export(
            Middle(), (torch.rand(3, 40, 50),), dynamic_shapes={"picture_CHW": sides}
        )
        torch.export.save(program, tmp_path / "face.pt2")
        detector = load_program(tmp_path / "face.pt2")
        light, dark = find_faces([torch.ones(20, 30, 3), torch.zeros(32, 64, 3)], detector)
        assert light.tolist() == [[1, 1, 2, 3]]
        assert dark.tolist() == []

    def test_what_is_no_program_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"not ours to ship.*leave the option out"):
            load_program(tmp_path / "gone.pt2")
        (tmp_path / "text.pt2").write_text("no program")
        with pytest.raises(CheckpointError, match=r"text\.pt2 is not a program of torch\.export"):
            load_program(tmp_path / "text.pt2")
