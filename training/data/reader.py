"""Batches of a prepared set; the samples of a training step follow from its number alone.

Input: a prepared set, and (seed, step, rank). Output: batches on the CPU. No state is kept between
steps, so a run that resumes at step k reads what an uninterrupted run would have read. This module
alone decides the order of the data.

Order of the samples. A batch has one size, so samples are grouped into buckets of one height,
width and number of voices. Each bucket is an endless stream: all its samples in a random order,
then all in a new random order, and so on. At each step the ranks take the next ``world_size *
size`` samples of one bucket's stream, in the order of the ranks. The buckets alternate in rounds.
In a round, each bucket has a number of steps proportional to its size, and the order of the steps
is random.
A bucket with fewer samples than a step takes is merged with another or left out; see
``data.buckets``.

Each sample has two clips: the opening one, whose given frame is the reference image, and the later
one, with 9 given context frames. In one epoch a sample supplies the opening clip, in the next the
later one; for half of the samples it is the other way round. So half of all draws have context
frames.

Axes: B batch, C channels, F latent frames, H height, W width, P voices, K window, L encoder layers,
N tokens, D width.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training.avatars.pairs import draw_halves
from training.data.buckets import BucketKey, crop_to, merge_small
from training.data.resumable_stage import Record, read_settings
from training.data.shards import NULL_TEXT, ShardReader, fill_reference, read_manifest
from training.models.batch import CONTEXT_LATENTS, Batch
from turbotalk_core.audio.windows import take_windows
from turbotalk_core.conditioning.reference import add_mask
from turbotalk_core.errors import MismatchError, OutputError, RequestError
from turbotalk_core.geometry import (
    SAMPLE_RATE,
    SPATIAL_STRIDE,
    count_decoded_frames,
    count_latent_frames,
    count_samples,
)
from turbotalk_core.types import AudioFeatures, Chunk, Waveform

logger = logging.getLogger(__name__)

MOST_VOICES = 2  # two speakers are in the left and right half; for more, no regions are known
ORDERS_KEPT = 8  # cached orders per bucket, because successive steps use the same ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Sample and clip of one row of a batch.

    Attributes:
        record: manifest line of the sample.
        height: height of the bucket in pixels; a merged bucket's samples are cropped to it.
        width: width of the bucket.
        is_later: whether the row has the later clip, with given context frames.
        epoch: how often the sample was drawn before.
    """

    record: Record
    height: int
    width: int
    is_later: bool
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Position of a step's samples.

    Attributes:
        bucket: bucket of the samples.
        start: index of the first sample of all ranks in the bucket's endless stream.
    """

    bucket: BucketKey
    start: int


class PreparedSet:
    """Prepared set, or a selection from it.

    Attributes:
        num_samples: number of selected samples.
        num_layers: layers of the audio features.
        feature_width: width of the audio features.
        fingerprint: fingerprint of the set's settings.
        digest: digest of these settings and of the selected samples in their order.
        text_is_null: whether all samples have the null text as their text, so that text guidance
            has no effect.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_frames: int | None = None,
        worst_tier: int | None = None,
        num_voices: int | None = None,
    ) -> None:
        """Read the manifest; no shard is opened yet.

        Args:
            folder: folder of the prepared set.
            num_frames: frames of the chunks, 4n + 1; longer clips are cut, shorter ones left out.
                None for the length of the shortest clip, so that none is left out.
            worst_tier: highest tier to select; None for all.
            num_voices: number of voices of samples to select; None for all.

        Raises:
            RequestError: if there is no prepared set, or nothing is selected.
            OutputError: if a shard is missing or truncated, or the manifest is damaged.
            MismatchError: if the features of the samples differ in shape.
            GeometryError: if ``num_frames`` is not 4n + 1.
        """
        self.fingerprint: str = read_settings(folder)["fingerprint"]
        self._folder = folder
        self._reader = ShardReader(folder)
        manifest = read_manifest(folder)
        lengths = [record["num_latents"] for record in manifest]
        self._num_latents = (
            min(lengths, default=1) if num_frames is None else count_latent_frames(num_frames)
        )
        chosen = [
            record
            for record in manifest
            if record["num_latents"] >= self._num_latents
            and (worst_tier is None or record.get("tier", 0) <= worst_tier)
            and num_voices in (None, record["num_voices"])
        ]
        if not chosen:
            raise RequestError(
                f"{folder} holds {len(manifest)} samples and none of {num_frames or 'any'} frames, "
                f"tier {worst_tier} or better and {num_voices or 'any number of'} voices; ask for "
                "less, or prepare more"
            )
        self.num_samples = len(chosen)
        self.num_layers, self.feature_width = _check_features(chosen, folder)
        self._buckets: dict[BucketKey, list[Record]] = {}
        for record in chosen:
            key = (record["height"], record["width"], record["num_voices"])
            self._buckets.setdefault(key, []).append(record)
        self._buckets = dict(sorted(self._buckets.items()))
        self._shuffle = lru_cache(maxsize=ORDERS_KEPT * len(self._buckets))(_shuffle)
        has_text = chosen[0]["text_tokens"] > 0
        self._null_text_BND = _read_null_text(folder) if has_text else None
        names = [f"{record['key']} {record.get('caption')}" for record in chosen]
        facts = f"{self.fingerprint} {self._num_latents} {names}"
        self.digest: str = hashlib.sha256(facts.encode()).hexdigest()[:16]
        self.text_is_null = has_text and self._compare_texts(chosen)
        self._merge = lru_cache(maxsize=8)(self._merge_small)

    def locate(self, seed: int, step: int, global_size: int) -> Place:
        """Find the samples that the ranks share at a step.

        Args:
            seed: seed of the order.
            step: number of the step, 0 or more.
            global_size: number of samples of all ranks together.

        Returns:
            Position of the samples.

        Raises:
            RequestError: if no bucket has as many samples as a step needs, or the step is negative.
        """
        if step < 0 or global_size < 1:
            raise RequestError(f"got step {step} of {global_size} samples; both must be positive")
        turns = [
            key
            for key, records in self._merge(global_size).items()
            for _ in range(-(-len(records) // global_size))
        ]
        number, place = divmod(step, len(turns))
        order = self._shuffle(len(turns), seed, f"turns {number}").tolist()
        key = turns[order[place]]
        before = sum(turns[turn] == key for turn in order[:place])
        return Place(bucket=key, start=(number * turns.count(key) + before) * global_size)

    def draw(self, seed: int, step: int, *, rank: int, world_size: int, size: int) -> list[Draw]:
        """Find the samples of one rank at a step: a pure function of the arguments and the set.

        Args:
            seed: seed of the order.
            step: number of the step, 0 or more.
            rank: data-parallel rank, 0 or more.
            world_size: number of data-parallel ranks.
            size: batch size of each rank.

        Returns:
            One draw per row of the batch.

        Raises:
            RequestError: if there are too few samples, or the rank is out of range.
        """
        if not 0 <= rank < world_size:
            raise RequestError(f"got rank {rank} of {world_size}; ranks count from 0")
        place = self.locate(seed, step, world_size * size)
        records = self._merge(world_size * size)[place.bucket]
        height, width, _ = place.bucket
        draws = []
        for position in range(place.start + rank * size, place.start + (rank + 1) * size):
            epoch, row = divmod(position, len(records))
            number = self._shuffle(len(records), seed, f"{place.bucket} {epoch}")[row].item()
            side = self._shuffle(len(records), seed, f"{place.bucket} side")[int(number)].item()
            is_later = (side + epoch) % 2 == 1
            record = records[int(number)]
            draws.append(
                Draw(record=record, height=height, width=width, is_later=is_later, epoch=epoch)
            )
        return draws

    def batch(self, seed: int, step: int, *, rank: int, world_size: int, size: int) -> Batch:
        """Read the batch of one rank at a step.

        Args:
            seed: seed of the order.
            step: number of the step, 0 or more.
            rank: data-parallel rank, 0 or more.
            world_size: number of data-parallel ranks.
            size: batch size of each rank.

        Returns:
            The batch, float32 on the CPU.

        Raises:
            RequestError: if there are too few samples, or the rank is out of range.
            OutputError: if a shard is damaged.
            MismatchError: if the tensors of a shard differ from the manifest.
        """
        draws = self.draw(seed, step, rank=rank, world_size=world_size, size=size)
        rows = [self._read(draw) for draw in draws]
        latents, references, first, later, pinned, weights = (
            torch.stack(column) for column in zip(*rows, strict=True)
        )
        voices, height, width = first.shape[1], *latents.shape[3:]
        regions_PHW = None
        if voices > 1:
            generator = torch.Generator().manual_seed(_hash(f"{seed} regions {step}"))
            regions_PHW = draw_halves(height, width, generator)
        null_text = self._null_text_BND
        return Batch(
            latents_BCFHW=latents,
            reference_BCFHW=references,
            first_BPKLD=first,
            later_BPFKLD=later,
            pinned_BF=pinned,
            weight_BHW=weights,
            regions_PHW=regions_PHW,
            text_BND=self._read_tokens([draw.record for draw in draws], "text"),
            null_text_BND=None if null_text is None else null_text.expand(size, -1, -1),
            image_embeds_BND=self._read_tokens([draw.record for draw in draws], "image"),
        )

    def stream(
        self,
        seed: int,
        first_step: int,
        *,
        rank: int,
        world_size: int,
        size: int,
        num_workers: int = 2,
        ahead: int = 4,
    ) -> Iterator[Batch]:
        """Read the batches of all steps from a given one on ahead of time, and yield them in order.

        Args:
            seed: seed of the order.
            first_step: step of the first batch.
            rank: data-parallel rank, 0 or more.
            world_size: number of data-parallel ranks.
            size: batch size of each rank.
            num_workers: number of threads that read.
            ahead: largest number of batches that were read and not yet yielded; they are in memory.

        Yields:
            Batches without end. Closing the iterator stops the threads.

        Raises:
            RequestError: if the settings are invalid.
        """
        if num_workers < 1 or ahead < 1:
            raise RequestError(
                f"got {num_workers} workers and {ahead} batches ahead; both must be at least 1"
            )
        step = first_step
        waiting: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(num_workers, thread_name_prefix="turbotalk-reader")
        try:
            while True:
                while len(waiting) < ahead:
                    waiting.append(
                        pool.submit(
                            self.batch, seed, step, rank=rank, world_size=world_size, size=size
                        )
                    )
                    step += 1
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def read_sound(self, draw: Draw) -> Waveform:
        """Read the sound of a drawn clip.

        Args:
            draw: result of ``draw``.

        Returns:
            The mix of its voices, as long as the clip.
        """
        start = draw.record["later_start"] if draw.is_later else 0
        stop = start + count_decoded_frames(self._num_latents)
        first, last = (count_samples(frame, SAMPLE_RATE) for frame in (start, stop))
        sound_PS = self._reader.read(draw.record, "sound_PS")[:, first:last].float()
        mixed_S = (sound_PS / torch.iinfo(torch.int16).max).sum(0).clamp(-1, 1)
        return Waveform(samples_CS=mixed_S.unsqueeze(0), sample_rate=SAMPLE_RATE)

    def _merge_small(self, global_size: int) -> dict[BucketKey, list[Record]]:
        merged, notes = merge_small(self._buckets, global_size)
        if not merged:
            key, records = max(self._buckets.items(), key=lambda item: len(item[1]))
            raise RequestError(
                f"there are {len(records)} samples of {key[1]}x{key[0]} with {key[2]} voices, "
                f"and a step takes {global_size} of them; prepare more, or make the batch or "
                "the number of ranks smaller"
            )
        for note in notes:
            logger.warning("%s: %s", self._folder, note)
        return merged

    def _compare_texts(self, chosen: Sequence[Record]) -> bool:
        """Return whether the text of all samples is the null text."""
        if len({record.get("caption") or "" for record in chosen}) > 1:
            return False
        text = self._read_tokens(chosen[:1], "text")
        null = self._null_text_BND
        if text is None or null is None:
            return False
        return torch.equal(text[0].half(), null[0].half())  # texts are stored in float16

    def _read(self, draw: Draw) -> tuple[Tensor, ...]:
        record, count = draw.record, self._num_latents
        latents_CFHW = self._reader.read(record, "later_CFHW" if draw.is_later else "opening_CFHW")[
            :, :count
        ]
        reference_CFHW = fill_reference(self._reader.read(record, "reference_CFHW"), count)
        start = record["later_start"] if draw.is_later else 0
        stop = start + count_decoded_frames(count)
        chunk = Chunk(index=0, start=start, stop=stop, keep_start=start, keep_stop=stop)
        windows = [
            take_windows(
                AudioFeatures(features_TLD=voice_TLD, num_frames=record["num_frames"]), chunk
            )
            for voice_TLD in self._reader.read(record, "features_PTLD")
        ]
        sides = (draw.height // SPATIAL_STRIDE, draw.width // SPATIAL_STRIDE)
        weight_HW = self._reader.read(record, "weight_HW").float()
        if weight_HW.shape != sides:
            weight_HW = crop_to(weight_HW, *sides)
            weight_HW = weight_HW / weight_HW.mean()
        return (
            crop_to(latents_CFHW, *sides).float(),
            crop_to(add_mask(reference_CFHW), *sides).float(),
            torch.stack([window.first_KLD for window in windows]).float(),
            torch.stack([window.later_FKLD for window in windows]).float(),
            torch.arange(count) < (CONTEXT_LATENTS if draw.is_later else 1),
            weight_HW,
        )

    def _read_tokens(self, records: Sequence[Record], kind: str) -> Tensor | None:
        if not records[0][f"{kind}_tokens"]:
            return None
        rows = [self._reader.read(record, f"{kind}_ND").float() for record in records]
        # Wan pads texts with zeros itself, and attends to the padding.
        most = max(len(row) for row in rows)
        return torch.stack([F.pad(row, (0, 0, 0, most - len(row))) for row in rows])


def _check_features(records: Sequence[Record], folder: Path) -> tuple[int, int]:
    """Check that all features are of one encoder, and that each voice has a known region."""
    first = _describe_features(records[0])
    for record in records:
        if _describe_features(record) != first:
            raise MismatchError(
                f"{record['key']} in {folder} has {_describe_features(record)}, "
                f"{records[0]['key']} has {first}; prepare a set with one choice of encoders"
            )
        if record["num_voices"] > MOST_VOICES:
            raise RequestError(
                f"{record['key']} in {folder} has {record['num_voices']} voices; training knows "
                f"where at most {MOST_VOICES} speakers are"
            )
    return records[0]["num_layers"], records[0]["feature_width"]


def _describe_features(record: Record) -> str:
    has_image, has_text = (
        "no" if record[name] == 0 else "some" for name in ("image_tokens", "text_tokens")
    )
    return (
        f"features of {record['num_layers']} layers, {record['feature_width']} wide, {has_image} "
        f"image tokens, {has_text} text tokens"
    )


def _read_null_text(folder: Path) -> Tensor:
    path = folder / NULL_TEXT
    try:
        return load_file(path)["text_ND"].float().unsqueeze(0)
    except (OSError, SafetensorError, KeyError) as error:
        raise OutputError(
            f"{path} is missing or damaged ({error}); delete it and run part 0 of precompute again"
        ) from error


def _shuffle(length: int, seed: int, purpose: str) -> Tensor:
    """Draw a permutation for a purpose of a seed; it is the same in all threads."""
    generator = torch.Generator().manual_seed(_hash(f"{seed} {purpose}"))
    return torch.randperm(length, generator=generator)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
