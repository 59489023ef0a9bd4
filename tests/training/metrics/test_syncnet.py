"""SyncNet: audio front end, face input and comparison as in its authors' program."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.data.scores import MOST_SHIFT
from training.metrics.clips import Clip
from training.metrics.syncnet import (
    WIDTH,
    WINDOW_FRAMES,
    SyncNet,
    load_syncnet,
    measure_sync,
    mfcc,
    score_clip,
)
from turbotalk_core.errors import AudioError, CheckpointError, GeometryError

from .conftest import MakeVideo, MiddleFace

CPU = torch.device("cpu")


class TestMfcc:
    def test_golden(self) -> None:
        # python_speech_features 0.6, mfcc(round(32768 x), 16000), rows 0, 4, 5, 8 and columns 0, 1,
        # 2, 7, 12, of a sweep with a pause.
        times_S = torch.arange(1600, dtype=torch.float64) / 16_000
        sweep_S = 0.5 * torch.sin(2 * torch.pi * (200 + 3000 * times_S) * times_S)
        sweep_S[800:1200] = 0
        expected = torch.tensor(
            [
                [19.6212, 28.3275, 17.9229, -24.8124, -0.3265],
                [19.7125, 22.2716, 4.7792, -8.4453, 2.7678],
                [15.3885, -9.2201, -0.1944, -0.836, -1.1152],
                [21.2841, 16.8016, -11.2869, 25.5437, -4.5854],
            ]
        )
        mfcc_MD = mfcc(sweep_S)
        assert mfcc_MD.shape == (9, 13)
        got = mfcc_MD[[0, 4, 5, 8]][:, [0, 1, 2, 7, 12]]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)

    def test_silence_is_finite(self) -> None:
        assert mfcc(torch.zeros(3200)).isfinite().all()

    @pytest.mark.parametrize("num_samples", [1, 400, 401, 560, 561, 64_000])
    def test_the_end_is_filled_up(self, num_samples: int) -> None:
        expected = 1 + max(0, math.ceil((num_samples - 400) / 160))
        assert len(mfcc(torch.rand(num_samples))) == expected


@pytest.fixture(scope="module")
def syncnet() -> SyncNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SyncNet().eval().requires_grad_(False)


class TestNetwork:
    def test_it_has_the_size_of_the_public_file(self, syncnet: SyncNet) -> None:
        # 54,573,114 bytes, of which some are names and shapes.
        state = syncnet.state_dict()
        values = [value for name, value in state.items() if "num_batches" not in name]
        num_bytes = sum(4 * value.numel() for value in values)
        assert 54_500_000 < num_bytes < 54_573_114
        assert state["netcnnaud.0.weight"].shape == (64, 1, 3, 3)
        assert state["netcnnlip.18.weight"].shape == (512, 256, 1, 6, 6)
        assert state["netfclip.3.weight"].shape == (WIDTH, 512)

    def test_windows_see_and_hear_their_own_frames(self, syncnet: SyncNet) -> None:
        generator = torch.Generator().manual_seed(0)
        faces_TCHW = torch.rand(8, 3, 224, 224, generator=generator)
        waveform_S = 0.1 * torch.randn(8 * 640, generator=generator)
        video_ND, audio_ND = syncnet(faces_TCHW, waveform_S)
        assert video_ND.shape == audio_ND.shape == (8 - WINDOW_FRAMES, WIDTH)
        # The last window's last frame is 6, and its sound ends before 4 * 2 + 20 steps.
        changed_TCHW = faces_TCHW.clone()
        changed_TCHW[6] = 0
        changed_S = waveform_S.clone()
        changed_S[:640] = 0
        video_again_ND, audio_again_ND = syncnet(changed_TCHW, changed_S)
        assert _differing(video_ND, video_again_ND) == [2]
        assert _differing(audio_ND, audio_again_ND) == [0, 1]  # a sound frame is 25 ms, a step 10

    def test_it_sees_blue_first_in_full_range(self, syncnet: SyncNet) -> None:
        faces_TCHW = torch.zeros(6, 3, 224, 224)
        faces_TCHW[:, 0] = 0.5  # red
        shown = []
        hook = syncnet.netcnnlip.register_forward_pre_hook(
            lambda module, inputs: shown.append(inputs[0])
        )
        syncnet(faces_TCHW, torch.zeros(6 * 640))
        hook.remove()
        assert shown[0].shape == (1, 3, WINDOW_FRAMES, 224, 224)
        assert shown[0].mean((0, 2, 3, 4)).tolist() == [0, 0, 127.5]

    def test_too_few_frames_are_told(self, syncnet: SyncNet) -> None:
        with pytest.raises(GeometryError, match="got 5 frames with sound"):
            syncnet(torch.zeros(9, 3, 224, 224), torch.zeros(5 * 640 + 639))

    def test_files_of_old_and_new_pickles_are_read(self, syncnet: SyncNet, tmp_path: Path) -> None:
        state = dict(syncnet.state_dict())
        for is_new in (True, False):
            torch.save(state, tmp_path / "syncnet", _use_new_zipfile_serialization=is_new)
            loaded = load_syncnet(tmp_path / "syncnet", CPU).state_dict()
            assert all(torch.equal(loaded[name], value) for name, value in state.items())

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("no network")
        torch.save({"weight": torch.zeros(1)}, tmp_path / "other")
        for name in ("text", "other"):
            with pytest.raises(CheckpointError, match=f"{name} does not hold the weights of SyncN"):
                load_syncnet(tmp_path / name, CPU)


def _differing(left_ND: Tensor, right_ND: Tensor) -> list[int]:
    return (left_ND != right_ND).any(1).nonzero()[:, 0].tolist()


class TestComparing:
    @pytest.mark.parametrize("offset", [-15, -4, 0, 7, 15])
    def test_a_known_offset_and_confidence(self, offset: int) -> None:
        # Orthogonal embeddings of length 3: one shift fits, the others are 3 * sqrt(2) away, but
        # for windows beyond the ends, where the voice is zero and 3 away.
        num_windows = 60
        video_ND = 3 * torch.eye(num_windows)
        audio_ND = torch.zeros(num_windows, num_windows)
        for window in range(num_windows):
            if 0 <= window + offset < num_windows:
                audio_ND[window + offset] = video_ND[window]
            else:
                audio_ND[(window + offset) % num_windows] = video_ND[window]
        scores = measure_sync(video_ND, audio_ND)
        assert scores.offset == offset
        far = 3 * math.sqrt(2)
        beyond = abs(offset)
        assert scores.sync_d == pytest.approx(3 * beyond / num_windows)
        distances = torch.tensor(
            [
                far + (3 - far) * abs(shift) / num_windows
                for shift in range(-MOST_SHIFT, MOST_SHIFT + 1)
                if shift != offset
            ]
            + [3 * beyond / num_windows]
        )
        expected = (distances.median() - distances.min()).item()
        assert scores.sync_c == pytest.approx(expected, rel=1e-5)

    def test_what_never_fits_has_no_confidence(self) -> None:
        # Without sound the distance is equal at every shift.
        scores = measure_sync(torch.ones(40, 4), torch.zeros(40, 4))
        assert (scores.sync_c, scores.sync_d) == (0, 2)

    def test_short_clips_are_told(self) -> None:
        with pytest.raises(GeometryError, match="got 30 windows; a clip needs 36 frames"):
            measure_sync(torch.ones(30, 4), torch.ones(30, 4))


class TestClips:
    def test_faces_and_sound_of_the_same_frames_are_judged(
        self, tmp_path: Path, make_video: MakeVideo
    ) -> None:
        path = make_video(tmp_path / "clip.mp4", [(60, 0.4)])
        both_ND = torch.randn(45, WIDTH, generator=torch.Generator().manual_seed(0))

        def embed(faces_TCHW: Tensor, waveform_S: Tensor) -> tuple[Tensor, Tensor]:
            assert faces_TCHW.shape == (50, 3, 224, 224)
            assert waveform_S.shape == (50 * 640,)
            return both_ND, both_ND.roll(2, 0)

        clip = Clip(name="clip", path=path, num_frames=50)
        scores = score_clip(clip, embed, MiddleFace())
        assert scores.offset == 2
        assert scores.sync_c > 30

    def test_a_silent_film_is_told(self, tmp_path: Path, make_video: MakeVideo) -> None:
        path = make_video(tmp_path / "mute.mp4", [(60, 0.4)], is_mute=True)
        clip = Clip(name="mute", path=path, num_frames=60)
        with pytest.raises(AudioError):
            score_clip(clip, lambda faces_TCHW, waveform_S: (faces_TCHW, waveform_S), MiddleFace())
