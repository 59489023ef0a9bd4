"""The values that travel between rooms; each checks its own shape.

Axes: B batch, C channels, S audio samples, T video frames, F latent frames, H height, W width,
K window length (or samples of a stretch), L encoder layers, N tokens per latent frame (or text
tokens), D feature width, P speakers and last the background.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from .errors import AudioError, ChunkError, MismatchError, RequestError
from .geometry import MAX_SAMPLE_RATE, count_frames, count_latent_frames
from .sound import BLOCK_SAMPLES, Sound
from .trust import is_shown

MAX_NAME = 100  # characters of a speaker's name


def _check_rank(name: str, tensor: Tensor, axes: str) -> None:
    if tensor.ndim != len(axes):
        raise MismatchError(
            f"{name} must have axes {axes}, got a tensor of shape {tuple(tensor.shape)}"
        )


def _is_box(region: tuple[object, ...]) -> bool:
    return len(region) == 4 and all(type(number) is int for number in region)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waveform:
    """Sound as it was recorded, in memory; a ``Sound``.

    Attributes:
        samples_CS: float32 in [-1, 1], at least one channel and one sample.
        sample_rate: Hz.

    Raises:
        AudioError: no samples, a NaN or infinity, or a rate that is not positive or above
            ``MAX_SAMPLE_RATE``.
    """

    samples_CS: Tensor
    sample_rate: int

    def __post_init__(self) -> None:
        _check_rank("samples", self.samples_CS, "CS")
        if not 1 <= self.sample_rate <= MAX_SAMPLE_RATE:
            raise AudioError(
                f"got a sample rate of {self.sample_rate} Hz; it must be positive, and at most "
                f"{MAX_SAMPLE_RATE}"
            )
        if self.samples_CS.numel() == 0:
            raise AudioError("the audio has no samples; give at least one video frame (40 ms)")
        # A NaN comes through as both; and unlike isfinite it takes no memory.
        if not all(map(math.isfinite, map(float, self.samples_CS.aminmax()))):
            raise AudioError(
                "the audio holds NaN or infinite samples; re-export it from its editor"
            )

    @property
    def num_channels(self) -> int:
        """Channels."""
        return self.samples_CS.shape[0]

    @property
    def num_samples(self) -> int:
        """Length in samples per channel."""
        return self.samples_CS.shape[1]

    @property
    def num_frames(self) -> int:
        """Whole video frames that this sound covers."""
        return count_frames(self.num_samples, self.sample_rate)

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.num_samples / self.sample_rate

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Read from a sample on, without copying; see ``Sound``."""
        yield from self.samples_CS[:, start:].split(BLOCK_SAMPLES, dim=1)


class FeatureRows(Protocol):
    """Audio features that give the rows asked for, whether they lie in memory or are made then."""

    @property
    def num_frames(self) -> int:
        """Video frames that the sound itself covers, at least one."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows, at least one for each of these frames."""
        ...

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Give the rows [start, stop), [T, L, D]; all that follow where stop is None."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioFeatures:
    """What the audio encoder heard, one row per video frame, in memory; ``FeatureRows``.

    Attributes:
        features_TLD: encoder hidden states; rows past ``num_frames`` hold encoded silence, so that
            the mouth closes at the end.
        num_frames: video frames that the sound itself covers, 1 <= num_frames <= T.
    """

    features_TLD: Tensor
    num_frames: int

    def __post_init__(self) -> None:
        _check_rank("features", self.features_TLD, "TLD")
        if not 1 <= self.num_frames <= self.features_TLD.shape[0]:
            raise AudioError(
                f"got {self.features_TLD.shape[0]} rows of audio features for {self.num_frames} "
                "video frames; at least one frame (40 ms of audio) and a row for each is needed"
            )

    @property
    def num_rows(self) -> int:
        """Rows, those of silence included."""
        return self.features_TLD.shape[0]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Give the rows [start, stop); see ``FeatureRows``."""
        return self.features_TLD[start:stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundMoments:
    """What an audio encoder that is given a part of a sound has to know of the whole.

    Attributes:
        mean_K: of all stretches of K samples, one every few samples; float64, on the CPU.
        covariance_KK: of the same; float64, on the CPU.
    """

    mean_K: Tensor
    covariance_KK: Tensor

    def __post_init__(self) -> None:
        _check_rank("mean", self.mean_K, "K")
        _check_rank("covariance", self.covariance_KK, "KK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """A voice, ready to drive a face.

    Attributes:
        features: what the encoder heard.
        waveform: the untouched original.
        origin: digest of all that decides the features besides the waveform: equal origins and
            waveforms imply equal features. None where it is not known.
    """

    features: FeatureRows
    waveform: Sound
    origin: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """One person in the picture.

    Attributes:
        name: of the person, for people who read messages and the drawn regions; not empty, on one
            line, at most ``MAX_NAME`` characters.
        waveform: the voice; None for a bystander, who hears encoded silence and so keeps the mouth
            shut.
        follows: begins to speak when the nearest speaker before who has a voice has ended; else,
            and where there is none before, at the start.
        region: where in the source picture the person is: a mask [H, W] of the picture's size,
            above 0.5 inside, or a box (x, y, width, height) in its pixels; None where that is left
            to ``regions.find_masks``.

    Raises:
        RequestError: no name, or one that is too long or cannot be drawn on one line.
        MismatchError: a region that is neither a mask nor a box of whole numbers.
    """

    name: str
    waveform: Sound | None = None
    follows: bool = False
    region: Tensor | tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise RequestError("got a speaker without a name; name each, as in Anna")
        if len(self.name) > MAX_NAME or not is_shown(self.name):
            raise RequestError(
                f"got a speaker named {self.name[:MAX_NAME]!r}; a name is one line of at most "
                f"{MAX_NAME} characters, all of which can be seen"
            )
        if isinstance(self.region, Tensor):
            _check_rank(f"the region of {self.name}", self.region, "HW")
        elif self.region is not None and not _is_box(self.region):
            raise MismatchError(
                f"got {len(self.region)} numbers as the region of {self.name}; a box has four "
                "whole ones: x, y, width, height"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Several speakers, or one, ready to drive the faces of one picture.

    Attributes:
        speakers: as they were given.
        speeches: one per speaker, all equally long; silence stands where a speaker is silent.
        waveform: all voices mixed, for the video.

    Raises:
        MismatchError: another number of speeches than of speakers, or speeches of unequal length.
    """

    speakers: tuple[Speaker, ...]
    speeches: tuple[Speech, ...]
    waveform: Sound

    def __post_init__(self) -> None:
        lengths = [speech.features.num_frames for speech in self.speeches]
        if len(lengths) != len(self.speakers) or len(set(lengths)) != 1:
            raise MismatchError(
                f"got {len(self.speakers)} speakers and speeches of {lengths} frames; a "
                "conversation has one speech per speaker, all equally long"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A span of the video made by one sampling run, in video frames, half-open.

    Attributes:
        index: 0 for the first chunk.
        start: first frame made, motion frames included.
        stop: one past the last frame made; may lie beyond the end of the video.
        keep_start: first frame that goes into the video (later than start after the first chunk).
        keep_stop: one past the last frame that goes into the video.
    """

    index: int
    start: int
    stop: int
    keep_start: int
    keep_stop: int

    def __post_init__(self) -> None:
        if not self.start <= self.keep_start < self.keep_stop <= self.stop:
            raise ChunkError(
                f"chunk {self.index} spans [{self.start}, {self.stop}) and cannot keep "
                f"[{self.keep_start}, {self.keep_stop})"
            )
        count_latent_frames(self.stop - self.start)

    @property
    def num_frames(self) -> int:
        """Frames made, kept or not."""
        return self.stop - self.start

    @property
    def num_motion_frames(self) -> int:
        """Frames given by the chunk before; 0 in the first chunk."""
        return self.keep_start - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlan:
    """All chunks of a video; what they keep tiles [0, num_frames) exactly."""

    num_frames: int
    chunks: tuple[Chunk, ...]

    def __post_init__(self) -> None:
        edge = 0
        for chunk in self.chunks:
            if chunk.keep_start != edge:
                raise ChunkError(f"frames [{edge}, {chunk.keep_start}) belong to no chunk")
            edge = chunk.keep_stop
        if edge != self.num_frames:
            raise ChunkError(f"the plan keeps {edge} of {self.num_frames} frames")


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioWindows:
    """The audio neighbourhood of each latent frame of one chunk.

    Attributes:
        first_KLD: around the chunk's first frame, which is a latent frame on its own.
        later_FKLD: around each later latent frame (four video frames), F = latent frames - 1.
    """

    first_KLD: Tensor
    later_FKLD: Tensor

    def __post_init__(self) -> None:
        _check_rank("first window", self.first_KLD, "KLD")
        _check_rank("later windows", self.later_FKLD, "FKLD")


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioTokens:
    """The adapter's output for one chunk.

    Attributes:
        tokens_FND: N tokens per latent frame, all of one speaker before those of the next.
        num_speakers: equal parts that the N tokens consist of.
    """

    tokens_FND: Tensor
    num_speakers: int = 1

    def __post_init__(self) -> None:
        _check_rank("audio tokens", self.tokens_FND, "FND")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What the denoiser is told besides the sound; fixed during one chunk.

    Attributes:
        reference_BCFHW: the 20 channels beside the noisy latents: 4 of mask (1 on the first latent
            frame, else 0) and the 16 latent channels of [reference image, grey, grey, ...].
        text_BND: text embedding, or None for the null text (all zeros).
        image_embeds_BND: CLIP image tokens, or None where the model has no image branch.
        regions_PHW: where each of several speakers is in the first frame, on latent cells, 1 inside
            and else 0, and last the background; None for one speaker, who may be anywhere.
    """

    reference_BCFHW: Tensor
    text_BND: Tensor | None = None
    image_embeds_BND: Tensor | None = field(default=None)
    regions_PHW: Tensor | None = None

    def __post_init__(self) -> None:
        _check_rank("reference latents", self.reference_BCFHW, "BCFHW")
        if self.regions_PHW is not None:
            _check_rank("regions", self.regions_PHW, "PHW")


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """What a finished chunk hands on: all that the next one needs of those before it.

    Attributes:
        num_chunks: finished so far, at least 1.
        motion_frames_BCTHW: the last frames as they were decoded, float32 on the CPU.
        noise_state_S: of the generator that all noise is drawn from, uint8.
    """

    num_chunks: int
    motion_frames_BCTHW: Tensor
    noise_state_S: Tensor

    def __post_init__(self) -> None:
        _check_rank("motion frames", self.motion_frames_BCTHW, "BCTHW")
        _check_rank("the state of the noise", self.noise_state_S, "S")
        if self.num_chunks < 1:
            raise ChunkError(f"got {self.num_chunks} finished chunks to go on from; one is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameChunk:
    """Finished frames of one chunk, motion frames already dropped.

    Attributes:
        chunk: where they belong.
        frames_BCTHW: [1, 3, keep_stop - keep_start, H, W], float in [-1, 1].
        carry: what the next chunk begins with; None where nobody asked for it.
    """

    chunk: Chunk
    frames_BCTHW: Tensor
    carry: Carry | None = None

    def __post_init__(self) -> None:
        _check_rank("frames", self.frames_BCTHW, "BCTHW")
        kept = self.chunk.keep_stop - self.chunk.keep_start
        if self.frames_BCTHW.shape[2] != kept:
            raise ChunkError(
                f"chunk {self.chunk.index} keeps {kept} frames, got {self.frames_BCTHW.shape[2]}"
            )
