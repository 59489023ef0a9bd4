"""Prepared sets: contents for training, resumption after an interruption, changed settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.family import save_text_encoder
from tests.training.data.reading import read_sample
from training.data import precompute
from training.data.precompute import (
    EncoderFiles,
    Encoders,
    encode_shot,
    load_encoders,
    run_precompute,
    trim_tail,
    weigh_places,
)
from training.data.resumable_stage import SKIPPED, Summary, Work, read_records
from training.data.shards import NULL_TEXT, SHARDS, ShardReader, fill_reference, read_manifest
from training.data.shots import Shot
from turbotalk_core.audio.conversation import encode_speech
from turbotalk_core.checkpoints.networks import load_text_encoder, load_vae
from turbotalk_core.errors import (
    AudioError,
    CheckpointError,
    MismatchError,
    OutputError,
    RequestError,
)
from turbotalk_core.models.text_encoder import encode_prompt
from turbotalk_core.types import Waveform

from .conftest import RATE, hum

CPU = torch.device("cpu")


class Squares:
    """Source of shots of moving squares, 20 frames each."""

    def __init__(
        self, count: int, *, frames: int = 9, damaged: frozenset[str] = frozenset()
    ) -> None:
        self.keys = [f"shot_{number}" for number in range(count)]
        self.frames, self.damaged = frames, damaged
        self.opened: list[str] = []

    def describe(self) -> Mapping[str, Any]:
        return {"source": "squares", "frames": self.frames}

    def open(self, key: str) -> Shot:
        self.opened.append(key)
        if key in self.damaged:
            raise AudioError(f"{key} is damaged")
        number = int(key.split("_")[1])

        def show(start: int, stop: int) -> Tensor:
            frames_CTHW = torch.full((3, stop - start, 16, 32), -0.5)
            for t in range(start, stop):
                frames_CTHW[:, t - start, 4:12, t : t + 8] = 0.1 * number
            return frames_CTHW

        voice = Waveform(samples_CS=hum(0.8, 200 + 50 * number)[None], sample_rate=RATE)
        return Shot(
            show=show,
            voices=(voice,),
            num_frames=20,
            clip_frames=self.frames,
            later_start=3 + number,
            caption=f"Square {number}",
            facts={"tier": number % 3},
        )


@pytest.fixture
def encoders(model_files: EncoderFiles) -> Encoders:
    return load_encoders(model_files, CPU)


def _run(
    source: Squares, out: Path, files: EncoderFiles, work: Work | None = None, **options: Any
) -> Summary:
    return run_precompute(source, out, files, work or Work(), device=CPU, **options)


class TestSample:
    def test_clips_are_encoded_from_their_own_first_frame(
        self, model_files: EncoderFiles, encoders: Encoders
    ) -> None:
        shot = Squares(3).open("shot_2")
        sample = encode_shot(shot, encoders)
        vae = load_vae(model_files.vae)
        for start, latents in ((0, sample.opening_CFHW), (5, sample.later_CFHW)):
            expected = vae.encode(shot.show(start, start + 9)[None])[0]
            assert latents.dtype == torch.float16
            assert torch.equal(latents, expected.half())
        # What a later chunk is given: its first frames, encoded alone.
        motion = vae.encode(shot.show(5, 14)[None])[0]
        assert torch.equal(motion.half(), sample.later_CFHW[:, :3])

    def test_the_reference_is_the_first_frame_and_then_grey(
        self, model_files: EncoderFiles, encoders: Encoders
    ) -> None:
        shot = replace(Squares(3, frames=57).open("shot_2"), show=_show_noise, num_frames=100)
        sample = encode_shot(shot, encoders)
        grey = torch.cat((_show_noise(0, 1), torch.zeros(3, 56, 16, 32)), 1)
        expected = load_vae(model_files.vae).encode(grey[None])[0]
        assert sample.reference_CFHW.shape[1] < 15
        filled = fill_reference(sample.reference_CFHW, 15).float()
        torch.testing.assert_close(filled, expected, atol=5e-3, rtol=1e-3)

    def test_features_and_sound_are_those_of_the_voices(self, encoders: Encoders) -> None:
        shot, other = (Squares(3).open(f"shot_{number}") for number in (1, 2))
        sample = encode_shot(replace(shot, voices=shot.voices + other.voices), encoders)
        for number, voice in enumerate((*shot.voices, *other.voices)):
            encoded = encode_speech(voice, encoders.audio).features.rows()
            assert torch.equal(sample.features_PTLD[number], encoded.half())
            sound_S = sample.sound_PS[number].float() / 32767
            torch.testing.assert_close(sound_S, voice.samples_CS[0], atol=1e-4, rtol=0)

    def test_image_and_text_are_encoded_where_there_are_encoders(self, encoders: Encoders) -> None:
        shot = Squares(3).open("shot_1")
        prompts: list[str] = []

        def read(prompt: str) -> Tensor:
            prompts.append(prompt)
            return torch.ones(len(prompt), 5)

        given = replace(encoders, image=lambda image_BCHW: image_BCHW.mean(1), text=read)
        sample = encode_shot(shot, given)
        assert sample.image_ND is not None
        assert sample.text_ND is not None
        torch.testing.assert_close(
            sample.image_ND.float(), shot.show(0, 1)[:, 0].mean(0), atol=1e-3, rtol=0
        )
        assert sample.text_ND.shape == (8, 5)
        encode_shot(replace(shot, caption=None), given)
        assert prompts == ["Square 1", ""]

    def test_what_float16_cannot_hold_is_refused(self, encoders: Encoders) -> None:
        shot = Squares(3).open("shot_1")
        with pytest.raises(MismatchError, match="text_ND holds values beyond float16"):
            encode_shot(shot, replace(encoders, text=lambda _: torch.full((2, 3), 1e6)))


def _show_noise(start: int, stop: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 100, 16, 32, generator=generator)[:, start:stop] * 2 - 1


class TestTail:
    def test_what_repeats_is_dropped_and_comes_back(self) -> None:
        reference = torch.arange(6.0).clamp_max(3)[None, :, None, None].expand(2, 6, 3, 3)
        trimmed = trim_tail(reference)
        assert trimmed.shape[1] == 4
        assert torch.equal(fill_reference(trimmed, 6), reference)
        assert torch.equal(fill_reference(trimmed, 2), reference[:, :2])

    def test_a_still_reference_is_one_latent_frame(self) -> None:
        assert trim_tail(torch.ones(2, 6, 3, 3)).shape[1] == 1


def test_places_that_move_weigh_more() -> None:
    latents = torch.zeros(2, 5, 4, 4)
    latents[:, :, 1, 2] = torch.arange(5.0)
    weight_HW = weigh_places(latents, latents)
    assert weight_HW.mean().item() == pytest.approx(1)
    assert weight_HW[0, 0].item() == pytest.approx(0.4)
    assert weight_HW[1, 2].item() == pytest.approx(0.4 + 0.6 * 16)
    assert torch.equal(weigh_places(torch.zeros(2, 5, 4, 4)), torch.full((4, 4), 0.4))


class TestRun:
    def test_all_shots_are_in_the_manifest_and_can_be_read(
        self, tmp_path: Path, model_files: EncoderFiles, encoders: Encoders
    ) -> None:
        source = Squares(5)
        summary = _run(source, tmp_path / "set", model_files, shard_samples=2)
        assert (summary.num_made, summary.num_kept) == (5, 0)
        records = read_manifest(tmp_path / "set")
        assert [record["key"] for record in records] == source.keys
        assert len(list((tmp_path / "set" / SHARDS).iterdir())) == 3
        reader = ShardReader(tmp_path / "set")
        for number, record in enumerate(records):
            assert record["later_start"] == 3 + number
            assert record["tier"] == number % 3
            assert (record["height"], record["width"], record["num_latents"]) == (16, 32, 3)
            expected = encode_shot(source.open(record["key"]), encoders)
            read = read_sample(reader, record)
            for name, tensor in expected.tensors().items():
                assert torch.equal(read[name], tensor), name

    def test_a_second_run_makes_nothing_and_a_larger_one_the_rest(
        self, tmp_path: Path, model_files: EncoderFiles, count_lines: Callable[[Path], int]
    ) -> None:
        _run(Squares(3), tmp_path, model_files)
        again = Squares(3)
        assert _run(again, tmp_path, model_files).num_made == 0
        assert again.opened == []
        more = Squares(5)
        summary = _run(more, tmp_path, model_files)
        assert (summary.num_made, summary.num_kept) == (2, 3)
        assert more.opened == ["shot_3", "shot_4"]
        assert count_lines(tmp_path) == 5

    @pytest.mark.parametrize("last_breath", [0, 1, 2])
    def test_a_run_that_is_killed_goes_on(
        self,
        tmp_path: Path,
        model_files: EncoderFiles,
        monkeypatch: pytest.MonkeyPatch,
        last_breath: int,
    ) -> None:
        """Killed while encoding, before the second shard, and between it and its manifest lines."""

        class Killed(BaseException):
            pass

        def die(*_: object) -> None:
            raise Killed

        source = Squares(4)
        with monkeypatch.context() as patch:
            if last_breath == 0:
                opened = source.open
                patch.setattr(source, "open", lambda k: die() if k == "shot_3" else opened(k))
            elif last_breath == 1:
                write = precompute.write_shard
                patch.setattr(
                    precompute,
                    "write_shard",
                    lambda f, n, s: die() if n.endswith("1") else write(f, n, s),
                )
            else:
                append = precompute.ItemLog.append
                calls: list[int] = []

                def append_once(item_log: Any, records: Any) -> None:
                    calls.append(1)
                    if len(calls) == 2:
                        raise Killed
                    append(item_log, records)

                patch.setattr(precompute.ItemLog, "append", append_once)
            with pytest.raises(Killed):
                _run(source, tmp_path / "killed", model_files, shard_samples=2)
        _run(Squares(4), tmp_path / "killed", model_files, shard_samples=2)
        _run(Squares(4), tmp_path / "whole", model_files, shard_samples=2)
        _assert_same(tmp_path / "killed", tmp_path / "whole")
        assert not list((tmp_path / "killed" / SHARDS).glob(".*"))

    @pytest.mark.slow
    def test_parts_together_are_the_whole(self, tmp_path: Path, model_files: EncoderFiles) -> None:
        for part in range(3):
            _run(Squares(6), tmp_path / "parts", model_files, Work(part=part, parts=3))
        _run(Squares(6), tmp_path / "whole", model_files)
        _assert_same(tmp_path / "parts", tmp_path / "whole")

    def test_damaged_shots_are_skipped_and_counted(
        self, tmp_path: Path, model_files: EncoderFiles
    ) -> None:
        summary = _run(Squares(4, damaged=frozenset({"shot_0", "shot_2"})), tmp_path, model_files)
        assert (summary.num_made, summary.skips) == (2, {"AudioError": 2})
        assert read_records(tmp_path)["shot_2"][SKIPPED] == "shot_2 is damaged"
        assert [record["key"] for record in read_manifest(tmp_path)] == ["shot_1", "shot_3"]
        mended = Squares(4)
        assert _run(mended, tmp_path, model_files).num_made == 0
        assert _run(mended, tmp_path, model_files, Work(retries=True)).num_made == 2
        assert [record["key"] for record in read_manifest(tmp_path)] == mended.keys

    @pytest.mark.slow
    def test_lost_and_cut_shards_are_made_anew(
        self, tmp_path: Path, model_files: EncoderFiles
    ) -> None:
        _run(Squares(6), tmp_path / "set", model_files, shard_samples=2)
        _run(Squares(6), tmp_path / "whole", model_files, shard_samples=2)
        first, second, _ = sorted((tmp_path / "set" / SHARDS).iterdir())
        first.unlink()
        second.write_bytes(second.read_bytes()[:-1])
        with pytest.raises(OutputError, match=r"000000\.safetensors is damaged: no such file"):
            read_manifest(tmp_path / "set")
        for part in range(2):  # other parts than those that made them
            _run(Squares(6), tmp_path / "set", model_files, Work(part=part, parts=2))
        _assert_same(tmp_path / "set", tmp_path / "whole")
        assert _run(Squares(6), tmp_path / "set", model_files).num_made == 0

    def test_other_settings_or_models_are_refused(
        self, tmp_path: Path, model_files: EncoderFiles
    ) -> None:
        _run(Squares(2), tmp_path / "set", model_files)
        with pytest.raises(RequestError, match="other settings: frames 9, now 5"):
            _run(Squares(2, frames=5), tmp_path / "set", model_files)
        other = tmp_path / "vae.safetensors"
        weights = load_file(model_files.vae)
        save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other)
        with pytest.raises(RequestError, match="other settings: models"):
            _run(Squares(2), tmp_path / "set", replace(model_files, vae=other))
        _run(Squares(2, frames=5), tmp_path / "set", model_files, Work(overwrites=True))
        assert {record["num_latents"] for record in read_manifest(tmp_path / "set")} == {2}

    def test_nothing_to_do_is_refused(self, tmp_path: Path, model_files: EncoderFiles) -> None:
        with pytest.raises(RequestError, match="got 0 shots"):
            _run(Squares(0), tmp_path, model_files)
        with pytest.raises(RequestError, match="shards of 0"):
            _run(Squares(1), tmp_path, model_files, shard_samples=0)

    def test_a_full_disk_is_told_and_nothing_half_is_left(
        self, tmp_path: Path, model_files: EncoderFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_all = Path.write_bytes

        def write_half(path: Path, data: bytes) -> int:
            write_all(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", write_half)
            with pytest.raises(OutputError, match="No space left"):
                _run(Squares(2), tmp_path, model_files)
        assert list((tmp_path / SHARDS).iterdir()) == []
        assert read_manifest(tmp_path) == []
        assert _run(Squares(2), tmp_path, model_files).num_made == 2


def _assert_same(left: Path, right: Path) -> None:
    manifests = [read_manifest(folder) for folder in (left, right)]
    for one, other in zip(*manifests, strict=True):
        samples = [
            read_sample(ShardReader(folder), record)
            for folder, record in ((left, one), (right, other))
        ]
        assert one["key"] == other["key"]
        assert samples[0].keys() == samples[1].keys()
        assert all(torch.equal(tensor, samples[1][name]) for name, tensor in samples[0].items())


class TestPrompts:
    @pytest.fixture
    def files(self, tmp_path: Path, model_files: EncoderFiles) -> EncoderFiles:
        folder = tmp_path / "text"
        save_text_encoder(folder, 8)
        return replace(
            model_files, text=folder / "bare.safetensors", tokenizer=folder / "spiece.model"
        )

    def test_prompts_and_the_negative_one_are_stored(
        self, tmp_path: Path, files: EncoderFiles
    ) -> None:
        _run(Squares(2), tmp_path / "set", files, negative_prompt="bad")
        assert files.text is not None
        encoder, tokenizer = load_text_encoder(files.text, files.tokenizer, torch.bfloat16)
        reader = ShardReader(tmp_path / "set")
        for number, record in enumerate(read_manifest(tmp_path / "set")):
            expected = encode_prompt(f"Square {number}", tokenizer, encoder)[0]
            assert record["text_tokens"] == len(expected)
            assert torch.equal(reader.read(record, "text_ND"), expected.half())
        null_text = load_file(tmp_path / "set" / NULL_TEXT)["text_ND"]
        assert torch.equal(null_text, encode_prompt("bad", tokenizer, encoder)[0])
        with pytest.raises(RequestError, match="other settings: negative_prompt 'bad', now 'no'"):
            _run(Squares(2), tmp_path / "set", files, negative_prompt="no")

    def test_a_tokenizer_alone_is_refused(self, files: EncoderFiles) -> None:
        with pytest.raises(RequestError, match="give --text-encoder too"):
            replace(files, text=None)

    def test_a_file_of_another_kind_is_refused(self, files: EncoderFiles) -> None:
        with pytest.raises(CheckpointError, match="needed here: image encoder"):
            load_encoders(replace(files, image=files.vae), CPU)
