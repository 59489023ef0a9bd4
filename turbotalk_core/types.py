"""Values passed between the packages of the core; each checks its own shape.

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
from .safe_io.paths import is_shown
from .sound import BLOCK_SAMPLES, Sound

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
    """Sound in memory, as recorded; a ``Sound``.

    Attributes:
        samples_CS: samples, float32 in [-1, 1], at least one channel and one sample.
        sample_rate: sample rate, Hz.

    Raises:
        AudioError: if there are no samples, one is NaN or infinite, or the rate is not positive or
            above ``MAX_SAMPLE_RATE``.
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
        # aminmax returns NaN if any sample is NaN and, unlike isfinite, allocates no memory.
        if not all(map(math.isfinite, map(float, self.samples_CS.aminmax()))):
            raise AudioError(
                "the audio holds NaN or infinite samples; re-export it from its editor"
            )

    @property
    def num_channels(self) -> int:
        """Number of channels."""
        return self.samples_CS.shape[0]

    @property
    def num_samples(self) -> int:
        """Length in samples per channel."""
        return self.samples_CS.shape[1]

    @property
    def num_frames(self) -> int:
        """Number of whole video frames that this sound covers."""
        return count_frames(self.num_samples, self.sample_rate)

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.num_samples / self.sample_rate

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the samples from ``start`` to the end, without copies; see ``Sound``."""
        yield from self.samples_CS[:, start:].split(BLOCK_SAMPLES, dim=1)


class FeatureRows(Protocol):
    """Audio features with one row per video frame, in memory or computed on access."""

    @property
    def num_frames(self) -> int:
        """Number of video frames that the sound itself covers, at least one."""
        ...

    @property
    def num_rows(self) -> int:
        """Number of rows, at least one for each of these frames."""
        ...

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows [start, stop), [T, L, D]; all from ``start`` on if stop is None."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioFeatures:
    """Audio features in memory, one row per video frame; ``FeatureRows``.

    Attributes:
        features_TLD: hidden states of the audio encoder; rows past ``num_frames`` hold encoded
            silence, so that the mouth closes at the end.
        num_frames: number of video frames that the sound itself covers, 1 <= num_frames <= T.
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
        """Number of rows, including those of silence."""
        return self.features_TLD.shape[0]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows [start, stop); see ``FeatureRows``."""
        return self.features_TLD[start:stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundMoments:
    """Statistics of a whole sound, by which an audio encoder normalises a section of it.

    Attributes:
        mean_K: mean of all stretches of K samples, one every few samples; float64, on the CPU.
        covariance_KK: covariance of the same stretches; float64, on the CPU.
    """

    mean_K: Tensor
    covariance_KK: Tensor

    def __post_init__(self) -> None:
        _check_rank("mean", self.mean_K, "K")
        _check_rank("covariance", self.covariance_KK, "KK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """Encoded voice: audio features and the original waveform.

    Attributes:
        features: audio features.
        waveform: the original sound, unchanged.
        origin: digest of all settings that determine the features besides the waveform. Equal
            origin and waveform imply equal features. None if the settings are not known.
    """

    features: FeatureRows
    waveform: Sound
    origin: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """One person in the picture.

    Attributes:
        name: name of the person, shown in messages and drawn regions; not empty, on one line, at
            most ``MAX_NAME`` characters.
        waveform: the voice; None for a bystander, whose audio is encoded silence, so that the mouth
            stays shut.
        follows: whether the person begins to speak when the nearest earlier speaker with a voice
            has ended. If false, or if there is none, the person begins at the start.
        region: region of the person in the source picture: a mask [H, W] of the picture's size,
            above 0.5 inside, or a box (x, y, width, height) in its pixels; None leaves it to
            ``regions.find_masks``.

    Raises:
        RequestError: if the name is empty, too long or cannot be drawn on one line.
        MismatchError: if the region is neither a mask nor a box of whole numbers.
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
    """Encoded voices of one speaker or several in the same picture.

    Attributes:
        speakers: the speakers.
        speeches: one per speaker, all equally long; silence where a speaker is silent.
        waveform: mix of all voices, for the video.

    Raises:
        MismatchError: if there is not one speech per speaker, or the speeches differ in length.
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
    """Span of the video made by one sampling run, in video frames, half-open.

    Attributes:
        index: 0 for the first chunk.
        start: first frame made, including motion frames.
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
        """Number of frames made, kept or not."""
        return self.stop - self.start

    @property
    def num_motion_frames(self) -> int:
        """Number of frames given by the chunk before; 0 in the first chunk."""
        return self.keep_start - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlan:
    """All chunks of a video; their kept frames tile [0, num_frames) exactly."""

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
    """Audio windows of one chunk: the audio features around each latent frame.

    Attributes:
        first_KLD: window of the chunk's first frame, which is a latent frame by itself.
        later_FKLD: windows of the later latent frames (four video frames each), F = latent frames
            - 1.
    """

    first_KLD: Tensor
    later_FKLD: Tensor

    def __post_init__(self) -> None:
        _check_rank("first window", self.first_KLD, "KLD")
        _check_rank("later windows", self.later_FKLD, "FKLD")


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioTokens:
    """Audio tokens of one chunk, the output of the audio adapter.

    Attributes:
        tokens_FND: N tokens per latent frame, all of one speaker before those of the next.
        num_speakers: number of speakers, each with an equal part of the N tokens.
    """

    tokens_FND: Tensor
    num_speakers: int = 1

    def __post_init__(self) -> None:
        _check_rank("audio tokens", self.tokens_FND, "FND")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """Inputs of the denoiser besides latents, sigma and audio tokens; fixed during one chunk.

    Attributes:
        reference_BCFHW: 20 channels that are concatenated to the noisy latents: 4 of the mask (1 on
            the first latent frame, else 0) and the 16 latent channels of [reference image, grey,
            grey, ...].
        text_BND: text embedding, or None for the null text (all zeros).
        image_embeds_BND: CLIP image tokens, or None if the model has no image branch.
        regions_PHW: regions of several speakers in the first frame, on latent cells, 1 inside, else
            0, and last the background; None for one speaker, who may be anywhere.
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
class ChunkState:
    """Chunk state: all that the next chunk needs from the finished ones.

    Attributes:
        num_chunks: number of finished chunks, at least 1.
        motion_frames_BCTHW: the last frames as decoded, float32 on the CPU.
        noise_state_S: state of the generator of all noise, uint8.
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
    """Finished frames of one chunk, without motion frames.

    Attributes:
        chunk: span of the chunk.
        frames_BCTHW: [1, 3, keep_stop - keep_start, H, W], float in [-1, 1].
        chunk_state: chunk state for the next chunk; None if it was not requested.
    """

    chunk: Chunk
    frames_BCTHW: Tensor
    chunk_state: ChunkState | None = None

    def __post_init__(self) -> None:
        _check_rank("frames", self.frames_BCTHW, "BCTHW")
        kept = self.chunk.keep_stop - self.chunk.keep_start
        if self.frames_BCTHW.shape[2] != kept:
            raise ChunkError(
                f"chunk {self.chunk.index} keeps {kept} frames, got {self.frames_BCTHW.shape[2]}"
            )
