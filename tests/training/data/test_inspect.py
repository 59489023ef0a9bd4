"""Prepared samples can be decoded to a video with sound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from training.data.inspect import choose_record, decode_sample, describe
from training.data.precompute import EncoderFiles, run_precompute
from training.data.resumable_stage import Work
from training.data.shards import ShardReader
from training.data.shots import Shot
from turbotalk_core.audio.io import read_audio
from turbotalk_core.audio.resample import to_mono_16k
from turbotalk_core.checkpoints.networks import load_vae
from turbotalk_core.errors import CheckpointError, RequestError
from turbotalk_core.types import Waveform
from turbotalk_core.video.reader import VideoFrames

from .conftest import RATE, hum

CPU = torch.device("cpu")


class TwoVoices:
    """Source of one shot with two voices; the second begins when the first ends."""

    keys = ("pair",)

    def describe(self) -> dict[str, str]:
        return {"source": "two voices"}

    def open(self, key: str) -> Shot:
        assert key == "pair"
        whole_S, half = hum(1.6), RATE * 4 // 5
        left_S, right_S = whole_S.clone(), whole_S.clone()
        left_S[half:] = 0
        right_S[:half] = 0
        return Shot(
            show=lambda start, stop: torch.linspace(-1, 1, 40)[None, start:stop, None, None].expand(
                3, -1, 16, 32
            ),
            voices=tuple(
                Waveform(samples_CS=voice_S[None], sample_rate=RATE)
                for voice_S in (left_S, right_S)
            ),
            num_frames=40,
            clip_frames=17,
            later_start=11,
        )


@pytest.fixture
def prepared(tmp_path: Path, model_files: EncoderFiles) -> Path:
    run_precompute(TwoVoices(), tmp_path / "set", model_files, Work(), device=CPU)
    return tmp_path / "set"


@pytest.mark.parametrize(("clip", "start"), [("opening", 0), ("later", 11)])
def test_a_clip_becomes_a_video_with_its_sound(
    prepared: Path, tmp_path: Path, model_files: EncoderFiles, clip: str, start: int
) -> None:
    record = choose_record(prepared, None)
    mp4 = tmp_path / "sample.mp4"
    count = decode_sample(prepared, record, model_files.vae, mp4, clip=clip, device=CPU)
    shown = VideoFrames(mp4)
    assert (count, len(shown)) == (17, 17)
    latents_CFHW = ShardReader(prepared).read(record, f"{clip}_CFHW").float()
    frames_BCTHW = load_vae(model_files.vae).decode(latents_CFHW[None])
    for t in (0, 8, 16):
        expected = (frames_BCTHW[0, :, t].mean() + 1) / 2
        assert shown[t].mean().item() == pytest.approx(expected.item(), abs=0.04)
    decoded_S = to_mono_16k(read_audio(mp4))
    expected_S = hum(1.6)[640 * start :][: 640 * 17]
    # AAC comes in blocks of 1024 samples; the last one is filled up with silence.
    assert len(decoded_S) == 11 * 1024
    torch.testing.assert_close(decoded_S[1000:9500], expected_S[1000:9500], atol=0.05, rtol=0)


def test_the_manifest_line_is_written_out(prepared: Path) -> None:
    record = choose_record(prepared, "pair")
    lines = dict(line.split(": ", 1) for line in describe(record).splitlines())
    assert {name: json.loads(value) for name, value in lines.items()} == record
    assert record["num_voices"] == 2


def test_what_is_not_there_is_told(
    prepared: Path, tmp_path: Path, model_files: EncoderFiles
) -> None:
    with pytest.raises(RequestError, match=r"no sample 'other' in .* which holds 1: pair"):
        choose_record(prepared, "other")
    record = choose_record(prepared, "pair")
    mp4 = tmp_path / "sample.mp4"
    with pytest.raises(RequestError, match="choose one of opening, later"):
        decode_sample(prepared, record, model_files.vae, mp4, clip="middle", device=CPU)
    with pytest.raises(CheckpointError, match="audio encoder"):
        decode_sample(prepared, record, model_files.audio, mp4, clip="later", device=CPU)
    assert not mp4.exists()
