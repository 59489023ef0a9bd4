"""Request: all settings that can change the output, in one frozen value, stored as JSON.

All packages may import it, so that each can read its own settings and each rule about a setting is
written once. The same request, weights and inputs produce the same frames.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import pairwise
from typing import Literal, get_args

from .errors import GeometryError, RequestError, ScheduleError
from .geometry import check_size, count_latent_frames
from .safe_io.json import is_number, parse_json

Schedule = Literal["reference", "distilled"]
Update = Literal["euler", "renoise"]
EncodeMode = Literal["auto", "whole", "sections"]

SCHEDULES: tuple[str, ...] = get_args(Schedule)
UPDATES: tuple[str, ...] = get_args(Update)
ENCODE_MODES: tuple[str, ...] = get_args(EncodeMode)
MAX_CHARACTERS = 100_000  # of a request as JSON; a thousand sigmas take a quarter of it
MAX_CHUNK_FRAMES = 10_001  # seven minutes at once, far more than any model was trained on
MIN_SHIFT = 1e-6
MAX_STEPS = 1000  # the reference's noise levels are 1000 whole timesteps
MAX_DISTILLED_STEPS = 4  # TurboTalk distils to 4, 3, 2 and 1 steps
CHUNK_FRAMES = 81  # InfiniteTalk, frame_num
NUM_MOTION_FRAMES = 9  # InfiniteTalk, motion_frame


@dataclass(frozen=True, slots=True, kw_only=True)
class TalkRequest:
    """All settings of one talking video.

    Attributes:
        num_inference_steps: network evaluations per chunk and guidance branch, 1 to 1000, with
            the distilled schedule 1 to 4.
        schedule: noise schedule, ``reference`` or ``distilled``.
        shift: flow shift of the schedule, 1e-6 to 1e6.
        update: update rule: a step along the velocity (euler), or prediction of the clean latents
            and addition of fresh noise (renoise).
        seed: seed of all noise, 0 to 2**64 - 1.
        height: height of the video in pixels, a multiple of 16.
        width: width of the video in pixels, a multiple of 16.
        guidance_scale: text guidance scale, >= 0; 1 is off. Needs a prompt.
        audio_guidance_scale: audio guidance scale, >= 0; 1 is off.
        audio_scale: factor on the output of the audio attention, >= 0. Applied where the adapter
            is attached to the model.
        chunk_frames: video frames made by one sampling run, 4n + 1, at most 10,001.
        num_motion_frames: frames that begin the next chunk, 4m + 1, fewer than chunk_frames.
        normalizes_loudness: whether the voice is brought to -23 LUFS before it is encoded. Applied
            where the speech is encoded.
        sigmas: noise levels to use instead of schedule and shift, strictly descending from at most
            1 to 0, [num_inference_steps + 1].
        uses_apg: whether guidance is adaptive projected guidance, which avoids oversaturation.
        color_strength: strength with which the colours of all frames are matched to the reference
            image, 0 (off) to 1.
        max_frames: greatest length of the video in frames; None for the length of the voice.
        follows_reference: whether to do as InfiniteTalk where TurboTalk deviates, to compare the
            two; see docs/numerics.md.
        teacache_threshold: threshold of TeaCache, which skips the transformer blocks in steps where
            they change little; a higher one skips more. InfiniteTalk uses 0.2 with 40 steps; None
            is off. Applied where the denoiser is built.
        hearing: whether the audio encoder encodes the voice at once (whole), in memory proportional
            to its length, or in sections; auto is whole up to five minutes. Applied where the
            speech is encoded.
        anchors_chunks: whether the reference image replaces the first motion latent of each later
            chunk, so that appearance does not drift; for models that tolerate the jump. No effect
            with 1 motion frame, which is then all that continues the movement.

    Raises:
        RequestError: if a setting is outside its range.
        GeometryError: if the model cannot make videos of that height and width.
        ScheduleError: if the sigmas cannot be sampled.
    """

    num_inference_steps: int
    schedule: Schedule
    shift: float
    update: Update
    seed: int
    height: int
    width: int
    guidance_scale: float = 1.0
    audio_guidance_scale: float = 1.0
    audio_scale: float = 1.0
    chunk_frames: int = CHUNK_FRAMES
    num_motion_frames: int = NUM_MOTION_FRAMES
    normalizes_loudness: bool = True
    sigmas: tuple[float, ...] | None = None
    uses_apg: bool = False
    color_strength: float = 0.0
    max_frames: int | None = None
    follows_reference: bool = False
    teacache_threshold: float | None = None
    hearing: EncodeMode = "auto"
    anchors_chunks: bool = False

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("update", self.update, UPDATES)
        _check_choice("hearing", self.hearing, ENCODE_MODES)
        _check_integer("seed", self.seed, 0, 2**64 - 1)
        for name in ("height", "width"):
            _check_integer(name, getattr(self, name), 1)
        check_size(self.height, self.width)
        _check_number("shift", self.shift)
        if not MIN_SHIFT <= self.shift <= 1 / MIN_SHIFT:  # beyond, rounding leaves no schedule
            raise RequestError(
                f"got shift {self.shift}; it must be above 0, from {MIN_SHIFT} to "
                f"{1 / MIN_SHIFT:g}, and 1 leaves the schedule as it is"
            )
        for name in ("guidance_scale", "audio_guidance_scale", "audio_scale", "color_strength"):
            _check_number(name, getattr(self, name))
        if self.color_strength > 1:
            raise RequestError(f"got color_strength {self.color_strength}; use 0 (off) to 1")
        for name in ("normalizes_loudness", "uses_apg", "follows_reference", "anchors_chunks"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"got {name} {getattr(self, name)!r}; it must be true or false")
        if self.teacache_threshold is not None:
            _check_number("teacache_threshold", self.teacache_threshold)
        if self.max_frames is not None:
            _check_integer("max_frames", self.max_frames, 1)
        check_chunk_lengths(self.chunk_frames, self.num_motion_frames)
        self._check_steps()

    def _check_steps(self) -> None:
        if self.sigmas is None:
            most = MAX_DISTILLED_STEPS if self.schedule == "distilled" else MAX_STEPS
            _check_integer("num_inference_steps", self.num_inference_steps, 1, most)
            return
        _check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        check_sigmas(self.sigmas)
        if len(self.sigmas) != self.num_inference_steps + 1:
            raise RequestError(
                f"got {len(self.sigmas)} sigmas for {self.num_inference_steps} steps; give one "
                "more than there are steps, the last of them 0"
            )

    def to_json(self) -> str:
        """Return all settings as one JSON object."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> TalkRequest:
        """Parse the output of ``to_json``; settings with a default may be left out.

        Args:
            text: one JSON object.

        Returns:
            The request.

        Raises:
            RequestError: if the text is no JSON object or longer than ``MAX_CHARACTERS``, or a
                setting is unknown, given twice, missing or outside its range.
            GeometryError: if the model cannot make videos of that height and width.
            ScheduleError: if the sigmas cannot be sampled.
        """
        if len(text) > MAX_CHARACTERS:
            raise RequestError(
                f"got {len(text)} characters as a request; it has at most {MAX_CHARACTERS}"
            )
        try:
            settings = parse_json(text)
        except ValueError as error:
            raise RequestError(f"the request is no JSON: {error}") from error
        if not isinstance(settings, dict):
            raise RequestError(
                f"got a JSON {type(settings).__name__} as a request; it must be an object"
            )
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(settings.keys() - known.keys()):
            raise RequestError(
                f"got unknown settings {', '.join(unknown)}; known are {', '.join(known)}"
            )
        required = {name for name, field in known.items() if field.default is MISSING}
        if missing := sorted(required - settings.keys()):
            raise RequestError(f"the request lacks {', '.join(missing)}; add them")
        if isinstance(settings.get("sigmas"), list):
            settings["sigmas"] = tuple(settings["sigmas"])
        return cls(**settings)


def check_chunk_lengths(chunk_frames: int, num_motion_frames: int) -> None:
    """Check that chunk and motion lengths can tile a video.

    Args:
        chunk_frames: video frames made by one sampling run.
        num_motion_frames: frames that begin the next chunk.

    Raises:
        RequestError: if a length is not 4n + 1 or above ``MAX_CHUNK_FRAMES``, or a chunk would
            make no new frame.
    """
    for name, count in (("chunk_frames", chunk_frames), ("num_motion_frames", num_motion_frames)):
        _check_integer(name, count, 1, MAX_CHUNK_FRAMES)
        try:
            count_latent_frames(count)
        except GeometryError as error:
            raise RequestError(f"{name}: {error}") from error
    if num_motion_frames >= chunk_frames:
        raise RequestError(
            f"got {num_motion_frames} motion frames in chunks of {chunk_frames}; a chunk must make "
            "new frames too, so use fewer motion frames or longer chunks"
        )


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Check that noise levels can be sampled.

    Args:
        sigmas: noise levels, first to last.

    Raises:
        ScheduleError: if they are not numbers that descend strictly from at most 1 to 0.
    """
    if not isinstance(sigmas, Sequence) or not all(is_number(sigma) for sigma in sigmas):
        raise ScheduleError(f"got sigmas {sigmas!r}; they must be a list of numbers in [0, 1]")
    descends = all(after < before for before, after in pairwise(sigmas))
    if len(sigmas) < 2 or sigmas[0] > 1 or sigmas[-1] != 0 or not descends:
        raise ScheduleError(
            f"got sigmas {list(sigmas)}; they must fall strictly from at most 1 to 0, as in [1, 0]"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"got {name} {value!r}; choose one of {', '.join(choices)}")


def _check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        allowed = f"from {low} on" if high is None else f"from {low} to {high}"
        raise RequestError(f"got {name} {value!r}; use a whole number {allowed}")


def _check_number(name: str, value: float) -> None:
    if not is_number(value) or value < 0:
        raise RequestError(f"got {name} {value!r}; use a finite number, not negative")
