"""The order of the data is a pure function, and batches equal the inputs at inference."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.training.data.sets import NUM_FRAMES
from tests.training.data.sets import make_sample as _make_sample
from tests.training.data.sets import write_set as _write
from training.data.reader import Draw, PreparedSet
from training.data.shards import (
    NULL_TEXT,
    Sample,
    fill_reference,
    read_manifest,
    write_tensors,
)
from training.models.batch import Batch
from turbotalk_core.audio.windows import take_windows
from turbotalk_core.errors import GeometryError, MismatchError, OutputError, RequestError
from turbotalk_core.types import AudioFeatures, AudioWindows, Chunk


@pytest.fixture(scope="module")
def one_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = {f"s{number:02d}": _make_sample(number) for number in range(11)}
    return _write(tmp_path_factory.mktemp("one"), samples)


@pytest.fixture(scope="module")
def three_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = {f"n{number:02d}": _make_sample(number) for number in range(9)}
    samples |= {f"w{number:02d}": _make_sample(number, columns=6) for number in range(17)}
    samples |= {f"p{n:02d}": _make_sample(n, rows=8, columns=16, voices=2) for n in range(8)}
    return _write(tmp_path_factory.mktemp("three"), samples)


def _take_windows(sample: Sample, voice: int, start: int) -> AudioWindows:
    chunk = Chunk(index=0, start=start, stop=start + 17, keep_start=start, keep_stop=start + 17)
    features_TLD = sample.features_PTLD[voice].float()
    return take_windows(AudioFeatures(features_TLD=features_TLD, num_frames=NUM_FRAMES), chunk)


def _draws(data: PreparedSet, seed: int, step: int, world_size: int, size: int) -> list[list[Draw]]:
    return [
        data.draw(seed, step, rank=rank, world_size=world_size, size=size)
        for rank in range(world_size)
    ]


class TestOrder:
    @given(
        seed=st.integers(0, 2**40),
        world_size=st.integers(1, 4),
        size=st.integers(1, 2),
        epochs=st.integers(1, 3),
    )
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_every_sample_comes_once_per_epoch(
        self, one_size: Path, seed: int, world_size: int, size: int, epochs: int
    ) -> None:
        data = PreparedSet(one_size)
        num_steps = -(-epochs * data.num_samples // (world_size * size))
        drawn = [
            draw
            for step in range(num_steps)
            for rank in _draws(data, seed, step, world_size, size)
            for draw in rank
        ]
        assert all(len(rank) == size for rank in _draws(data, seed, 0, world_size, size))
        for epoch in range(epochs):
            span = drawn[epoch * data.num_samples : (epoch + 1) * data.num_samples]
            assert len({draw.record["key"] for draw in span}) == data.num_samples
            assert {draw.epoch for draw in span} == {epoch}

    @given(seed=st.integers(0, 2**40), step=st.integers(0, 500), size=st.integers(1, 4))
    def test_buckets_come_as_often_as_their_sizes(
        self, three_sizes: Path, seed: int, step: int, size: int
    ) -> None:
        data = PreparedSet(three_sizes)
        bucket_sizes = Counter(
            (record["height"], record["width"], record["num_voices"])
            for record in read_manifest(three_sizes)
        )
        per_step = 2 * size
        ranks = _draws(data, seed, step, 2, size)
        # All of a step is of one size, and no sample is given to both ranks.
        shapes = {(d.record["width"], d.record["num_voices"]) for rank in ranks for d in rank}
        assert len(shapes) == 1
        keys = [
            draw.record["key"] for rank in ranks for draw in rank if draw.epoch == ranks[0][0].epoch
        ]
        assert len(keys) == len(set(keys))
        num_turns = sum(-(-count // per_step) for count in bucket_sizes.values())
        first = step - step % num_turns
        turns = Counter(
            data.locate(seed, number, per_step).bucket for number in range(first, first + num_turns)
        )
        assert turns == {key: -(-n // per_step) for key, n in bucket_sizes.items()}

    @given(seed=st.integers(0, 2**40))
    def test_each_buckets_stream_has_no_gap(self, three_sizes: Path, seed: int) -> None:
        data = PreparedSet(three_sizes)
        starts: dict[object, list[int]] = {}
        for step in range(40):
            place = data.locate(seed, step, 4)
            starts.setdefault(place.bucket, []).append(place.start)
        for stream in starts.values():
            assert stream == list(range(0, 4 * len(stream), 4))

    @given(seed=st.integers(0, 2**40), step=st.integers(0, 10_000), rank=st.integers(0, 2))
    def test_a_step_is_the_same_after_a_restart(
        self, three_sizes: Path, seed: int, step: int, rank: int
    ) -> None:
        one, other = PreparedSet(three_sizes), PreparedSet(three_sizes)
        for earlier in range(3):  # what was asked before makes no difference
            one.draw(seed, earlier, rank=0, world_size=3, size=2)
        assert one.draw(seed, step, rank=rank, world_size=3, size=2) == other.draw(
            seed, step, rank=rank, world_size=3, size=2
        )

    def test_seeds_and_epochs_differ(self, one_size: Path) -> None:
        data = PreparedSet(one_size)

        def order(seed: int, epoch: int) -> list[str]:
            return [
                data.draw(seed, 11 * epoch + step, rank=0, world_size=1, size=1)[0].record["key"]
                for step in range(11)
            ]

        assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16

    @given(seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
    def test_half_of_the_draws_have_context(self, one_size: Path, seed: int, epoch: int) -> None:
        data = PreparedSet(one_size)
        kinds: dict[str, list[bool]] = {}
        for step in range(11 * epoch, 11 * (epoch + 2)):
            (draw,) = data.draw(seed, step, rank=0, world_size=1, size=1)
            kinds.setdefault(draw.record["key"], []).append(draw.is_later)
        # In two epochs each sample shows both of its clips, and in one about half of all do.
        assert all(sorted(pair) == [False, True] for pair in kinds.values())
        assert sum(pair[0] for pair in kinds.values()) in (5, 6)

    def test_too_few_samples_are_refused(self, three_sizes: Path) -> None:
        data = PreparedSet(three_sizes)
        with pytest.raises(RequestError, match=r"17 samples of 48x16 with 1 voices, .* takes 27"):
            data.draw(0, 0, rank=0, world_size=3, size=9)
        pairs = PreparedSet(three_sizes, num_voices=2)
        with pytest.raises(RequestError, match=r"8 samples of 128x64 with 2 voices, .* takes 9"):
            pairs.draw(0, 0, rank=0, world_size=3, size=3)
        assert len(data.draw(0, 0, rank=0, world_size=4, size=2)) == 2

    def test_a_rare_size_does_not_end_a_run(
        self, three_sizes: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = PreparedSet(three_sizes)
        for step in range(6):  # 8 pairs are too few for 9, and no other bucket has two voices
            assert data.locate(0, step, 9).bucket != (64, 128, 2)
        (record,) = caplog.records
        assert "8 samples of 128x64 with 2 voices are left out" in record.message
        # 9 and 17 samples are too few for 18, and 26 of the common size are not.
        batch = data.batch(0, 0, rank=0, world_size=6, size=3)
        draws = data.draw(0, 0, rank=0, world_size=6, size=3)
        assert {(draw.height, draw.width) for draw in draws} == {(16, 32)}
        assert batch.latents_BCFHW.shape[3:] == (2, 4)
        assert batch.weight_BHW is not None
        keys = {d.record["key"] for ranks in _draws(data, 0, 0, 6, 3) for d in ranks}
        assert {key[0] for key in keys} == {"n", "w"}
        for row, draw in enumerate(draws):
            if draw.record["key"][0] == "w":
                sample = _make_sample(int(draw.record["key"][1:]), columns=6)
                clip = sample.later_CFHW if draw.is_later else sample.opening_CFHW
                assert torch.equal(batch.latents_BCFHW[row], clip[..., 1:5].float())
                assert batch.weight_BHW[row].mean().item() == pytest.approx(1)

    def test_the_digest_is_of_the_samples_and_their_order(
        self, one_size: Path, tmp_path: Path
    ) -> None:
        digests = {
            PreparedSet(one_size).digest,
            PreparedSet(one_size, num_frames=9).digest,
            PreparedSet(_write(tmp_path, {"s00": _make_sample(0)})).digest,
        }
        assert len(digests) == 3
        assert PreparedSet(one_size).digest in digests

    def test_ranks_and_steps_that_cannot_be_are_refused(self, one_size: Path) -> None:
        data = PreparedSet(one_size)
        with pytest.raises(RequestError, match="ranks count from 0"):
            data.draw(0, 0, rank=2, world_size=2, size=1)
        with pytest.raises(RequestError, match="step -1"):
            data.draw(0, -1, rank=0, world_size=1, size=1)


class TestBatches:
    def test_a_batch_is_what_inference_shows(self, one_size: Path) -> None:
        data = PreparedSet(one_size)
        seen = set()
        for step in range(4):
            batch = data.batch(7, step, rank=1, world_size=2, size=2)
            draws = data.draw(7, step, rank=1, world_size=2, size=2)
            assert isinstance(batch, Batch)
            for row, draw in enumerate(draws):
                sample = _make_sample(int(draw.record["key"][1:]))
                start = draw.record["later_start"] if draw.is_later else 0
                clip = sample.later_CFHW if draw.is_later else sample.opening_CFHW
                assert torch.equal(batch.latents_BCFHW[row], clip.float())
                reference = fill_reference(sample.reference_CFHW, 5).float()
                assert torch.equal(batch.reference_BCFHW[row, 4:], reference)
                assert batch.reference_BCFHW[row, :4, 0].eq(1).all()
                assert batch.reference_BCFHW[row, :4, 1:].eq(0).all()
                windows = _take_windows(sample, 0, start)
                assert torch.equal(batch.first_BPKLD[row, 0], windows.first_KLD)
                assert torch.equal(batch.later_BPFKLD[row, 0], windows.later_FKLD)
                pinned = [True] * (3 if draw.is_later else 1)
                assert batch.pinned_BF[row].tolist() == pinned + [False] * (5 - len(pinned))
                assert batch.weight_BHW is not None
                assert torch.equal(batch.weight_BHW[row], sample.weight_HW.float())
                seen.add(draw.is_later)
            assert batch.regions_PHW is None
            assert batch.text_BND is None
        assert seen == {False, True}

    def test_longer_clips_are_cut(self, one_size: Path) -> None:
        short = PreparedSet(one_size, num_frames=9).batch(7, 0, rank=0, world_size=1, size=2)
        whole = PreparedSet(one_size).batch(7, 0, rank=0, world_size=1, size=2)
        assert torch.equal(short.latents_BCFHW, whole.latents_BCFHW[:, :, :3])
        assert torch.equal(short.later_BPFKLD, whole.later_BPFKLD[:, :, :2])

    def test_pairs_have_a_region_for_each_voice(self, three_sizes: Path) -> None:
        data = PreparedSet(three_sizes, num_voices=2)
        batch = data.batch(0, 5, rank=0, world_size=2, size=2)
        for row, draw in enumerate(data.draw(0, 5, rank=0, world_size=2, size=2)):
            number = int(draw.record["key"][1:])
            sample = _make_sample(number, rows=8, columns=16, voices=2)
            start = draw.record["later_start"] if draw.is_later else 0
            for voice in range(2):
                windows = _take_windows(sample, voice, start)
                assert torch.equal(batch.first_BPKLD[row, voice], windows.first_KLD)
                assert torch.equal(batch.later_BPFKLD[row, voice], windows.later_FKLD)
        assert batch.regions_PHW is not None
        assert batch.regions_PHW.shape == (3, 8, 16)
        again = data.batch(0, 5, rank=0, world_size=2, size=2)
        assert again.regions_PHW is not None
        assert torch.equal(batch.regions_PHW, again.regions_PHW)

    def test_prompts_are_padded_to_the_longest(self, tmp_path: Path) -> None:
        samples = {f"s{n}": _make_sample(n, tokens=2 + n) for n in range(2)}
        folder = _write(tmp_path, samples)
        write_tensors(folder / NULL_TEXT, {"text_ND": torch.ones(3, 6)})
        batch = PreparedSet(folder).batch(0, 0, rank=0, world_size=1, size=2)
        assert batch.text_BND is not None
        assert batch.null_text_BND is not None
        assert batch.text_BND.shape == (2, 3, 6)
        lengths = [int(row.abs().sum(1).bool().sum()) for row in batch.text_BND]
        assert sorted(lengths) == [2, 3]
        assert torch.equal(batch.null_text_BND, torch.ones(2, 3, 6))
        (folder / NULL_TEXT).write_text("not tensors")
        with pytest.raises(OutputError, match=r"null_text\.safetensors is missing or damaged"):
            PreparedSet(folder)
        (folder / NULL_TEXT).unlink()
        with pytest.raises(OutputError, match="run part 0 of precompute again"):
            PreparedSet(folder)

    @pytest.mark.parametrize(
        ("texts", "captions", "expected"),
        [
            (([1.0], [1.0]), ("", None), True),  # no captions, and an empty negative prompt
            (([1.0], [1.0]), ("a man", "a man"), True),
            (([2.0], [2.0]), ("a man", "a man"), False),
            (([1.0], [2.0]), ("", "a man"), False),
        ],
    )
    def test_a_text_that_is_the_null_text_is_found(
        self,
        tmp_path: Path,
        texts: tuple[list[float], ...],
        captions: tuple[str, ...],
        expected: bool,
    ) -> None:
        samples = {
            f"s{n}": replace(_make_sample(n), text_ND=torch.tensor(value).expand(2, 6).half())
            for n, value in enumerate(texts)
        }
        folder = _write(tmp_path, samples, captions=dict(zip(samples, captions, strict=True)))
        write_tensors(folder / NULL_TEXT, {"text_ND": torch.ones(2, 6, dtype=torch.bfloat16)})
        assert PreparedSet(folder).text_is_null == expected

    def test_without_texts_there_is_no_null_text(self, one_size: Path) -> None:
        assert not PreparedSet(one_size).text_is_null

    def test_the_sound_of_a_clip_is_as_long_as_the_clip(self, three_sizes: Path) -> None:
        data = PreparedSet(three_sizes)
        (draw,) = data.draw(0, 0, rank=0, world_size=1, size=1)
        sound = data.read_sound(draw)
        assert sound.samples_CS.shape == (1, 17 * 640)
        assert sound.sample_rate == 16_000


class TestChoice:
    def test_tiers_lengths_and_voices_are_chosen(self, tmp_path: Path) -> None:
        samples = {"a": _make_sample(0), "b": _make_sample(1, num_latents=3), "c": _make_sample(2)}
        folder = _write(tmp_path, samples, {"a": 0, "b": 1, "c": 2})
        assert PreparedSet(folder).num_samples == 3
        assert PreparedSet(folder, num_frames=17).num_samples == 2
        assert PreparedSet(folder, worst_tier=1).num_samples == 2
        assert PreparedSet(folder, worst_tier=0, num_voices=1).num_samples == 1
        with pytest.raises(RequestError, match="holds 3 samples and none of"):
            PreparedSet(folder, num_voices=2)
        with pytest.raises(GeometryError, match="16 frames"):
            PreparedSet(folder, num_frames=16)

    def test_a_set_of_two_encoders_is_refused(self, tmp_path: Path) -> None:
        folder = _write(tmp_path, {"a": _make_sample(0), "b": _make_sample(1, layers=3)})
        with pytest.raises(
            MismatchError, match=r"b in .* has features of 3 layers.*a has features of 2"
        ):
            PreparedSet(folder)

    def test_what_is_no_set_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"cannot read .*settings\.json"):
            PreparedSet(tmp_path / "nowhere")

    def test_a_lost_shard_is_named(self, tmp_path: Path) -> None:
        folder = _write(tmp_path, {"a": _make_sample(0), "b": _make_sample(1)})
        data = PreparedSet(folder)
        (folder / "shards" / "00-of-01-000001.safetensors").unlink()
        with pytest.raises(OutputError, match=r"000001\.safetensors"):
            data.batch(0, 0, rank=0, world_size=1, size=2)
        with pytest.raises(OutputError, match=r"000001\.safetensors is damaged"):
            PreparedSet(folder)


class TestStream:
    def test_it_gives_the_batches_in_order(
        self, three_sizes: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = PreparedSet(three_sizes)
        read = data.batch

        def read_unevenly(seed: int, step: int, **options: int) -> Batch:
            time.sleep(0.02 * (step % 3 == 0))  # later steps are ready first
            return read(seed, step, **options)

        monkeypatch.setattr(data, "batch", read_unevenly)
        stream = data.stream(3, 5, rank=1, world_size=2, size=2, num_workers=4, ahead=6)
        for step, batch in enumerate(islice(stream, 12), 5):
            expected = read(3, step, rank=1, world_size=2, size=2)
            assert torch.equal(batch.latents_BCFHW, expected.latents_BCFHW)
            assert torch.equal(batch.pinned_BF, expected.pinned_BF)
        stream.close()  # pyright: ignore[reportAttributeAccessIssue] (it is a generator)

    def test_it_reads_ahead_and_no_further(
        self, one_size: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = PreparedSet(one_size)
        started: list[int] = []
        read = data.batch

        def note(seed: int, step: int, **options: int) -> Batch:
            started.append(step)
            return read(seed, step, **options)

        monkeypatch.setattr(data, "batch", note)
        stream = data.stream(0, 10, rank=0, world_size=1, size=1, num_workers=2, ahead=3)
        next(stream)
        next(stream)
        while len(started) < 4:
            time.sleep(0.01)
        time.sleep(0.1)
        assert sorted(started) == [10, 11, 12, 13]
        stream.close()  # pyright: ignore[reportAttributeAccessIssue] (it is a generator)

    def test_closing_ends_the_threads(self, one_size: Path) -> None:
        stream = PreparedSet(one_size).stream(0, 0, rank=0, world_size=1, size=1)
        next(stream)
        assert any("turbotalk-reader" in thread.name for thread in threading.enumerate())
        del stream
        gc.collect()
        assert not any("turbotalk-reader" in thread.name for thread in threading.enumerate())

    def test_damage_is_told_at_its_step(self, tmp_path: Path) -> None:
        folder = _write(tmp_path, {f"s{n}": _make_sample(n) for n in range(6)})
        data = PreparedSet(folder)
        key = data.draw(0, 2, rank=0, world_size=1, size=1)[0].record["shard"]
        (folder / key).write_bytes(b"no shard")
        stream = data.stream(0, 0, rank=0, world_size=1, size=1)
        next(stream)
        next(stream)
        with pytest.raises(OutputError, match=key):
            next(stream)

    def test_settings_that_cannot_be_are_refused(self, one_size: Path) -> None:
        with pytest.raises(RequestError, match="0 workers"):
            next(PreparedSet(one_size).stream(0, 0, rank=0, world_size=1, size=1, num_workers=0))
