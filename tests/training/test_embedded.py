"""The shipped student: no mouth motion in silence, and every sound in time, at any length.

Portrait and voice are the shipped ones; the mouth is measured in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.avatars.mouth import mouth_curve
from training.evaluation.generation import collect_frames
from training.evaluation.mouth import estimate_aperture, mouth_share, sync
from turbotalk_core.audio.conversation import encode_speech
from turbotalk_core.audio.io import read_audio
from turbotalk_core.checkpoints.audio_encoder import load_audio_encoder
from turbotalk_core.conditioning.reference import prepare_reference, read_image
from turbotalk_core.loading import find_model_files, load_models, read_request
from turbotalk_core.pipeline import generate
from turbotalk_core.types import Waveform

pytestmark = [pytest.mark.slow, pytest.mark.weights]

ASSETS = Path(__file__).parents[2] / "assets"
RATE = 16_000
FRAME = RATE // 25  # samples
NEAR_SPEECH = 3  # frames beside speech, in which the mouth still closes or opens already

Talk = Callable[..., Tensor]


@pytest.fixture(scope="module")
def voice_S() -> Tensor:
    waveform = read_audio(ASSETS / "speech.wav")
    assert waveform.sample_rate == RATE
    return waveform.samples_CS[0]


@pytest.fixture(scope="module")
def talk() -> Talk:
    """Animate the portrait with samples; return frames [3, T, H, W]."""
    files = find_model_files()
    shipped = read_request(files.dit)
    models, encoder = (
        load_models(files, torch.device("cpu")),
        load_audio_encoder(files.audio_encoder),
    )
    picture = prepare_reference(read_image(ASSETS / "portrait.png"), shipped.height, shipped.width)

    def run(samples_S: Tensor, chunk_frames: int) -> Tensor:
        waveform = Waveform(samples_CS=samples_S[None], sample_rate=RATE)
        speech = encode_speech(waveform, encoder, normalizes_loudness=True)
        request = replace(shipped, chunk_frames=chunk_frames)
        return collect_frames(generate(request, [picture], [speech], models))

    return run


def _pause(num_frames: int) -> Tensor:
    return torch.zeros(num_frames * FRAME)


@dataclass(frozen=True, slots=True)
class Said:
    """Measurements of a clip with silence at its start, in a pause and at its end, and of silence.

    Attributes:
        spoken_T: mouth area in the first clip, pixels.
        silent_T: mouth area in the silent clip, at the same place.
        spoken_change_T: mean change from one frame to the next at the mouth, full range 2.
        silent_change_T: the same in the silent clip.
    """

    spoken_T: Tensor
    silent_T: Tensor
    spoken_change_T: Tensor
    silent_change_T: Tensor


PAUSES = ((0, 16), (32, 49), (65, 81))


@pytest.fixture(scope="module")
def said(talk: Talk, voice_S: Tensor) -> Said:
    words = voice_S[4 * FRAME : 20 * FRAME], voice_S[20 * FRAME : 36 * FRAME]
    spoken = talk(torch.cat((_pause(16), words[0], _pause(17), words[1], _pause(16))), 81)
    silent = talk(_pause(41), 41)
    num_spoken = spoken.shape[1]
    # As one clip, so that the mouth is looked for at one place.
    aperture_T = estimate_aperture(torch.cat((spoken, silent), 1))
    mouth_HW = mouth_share(spoken).amax(0) > 0.5

    def measure_change(frames_CTHW: Tensor) -> Tensor:
        return frames_CTHW.diff(dim=1).abs()[:, :, mouth_HW].mean((0, 2))

    return Said(
        aperture_T[:num_spoken],
        aperture_T[num_spoken:],
        measure_change(spoken),
        measure_change(silent),
    )


def _is_pause() -> Tensor:
    """Return the silent frames that are not beside speech."""
    is_pause_T = torch.zeros(81, dtype=torch.bool)
    for start, stop in PAUSES:
        first = start + NEAR_SPEECH if start else 0
        is_pause_T[first : stop - NEAR_SPEECH if stop < 81 else stop] = True
    return is_pause_T


def test_the_mouth_is_shut_in_silence(said: Said) -> None:
    open_T = said.spoken_T[~_is_pause()]
    assert open_T.max() > 200  # pixels, of 128x128
    assert said.spoken_T[_is_pause()].max() < 0.01 * open_T.max()  # 0 as measured
    assert said.silent_T.max() < 0.01 * open_T.max()


def test_nothing_moves_where_the_mouth_is_in_silence(said: Said) -> None:
    still_T = _is_pause()[1:] & _is_pause()[:-1]
    spoken = said.spoken_change_T[~still_T].mean()
    # The very first step is from the picture to what the model makes of it.
    pauses_T = torch.cat((said.spoken_change_T[still_T][1:], said.silent_change_T[1:]))
    assert pauses_T.mean() < 0.05 * spoken  # 0.03 as measured
    assert pauses_T.max() < 0.25 * spoken  # 0.17


@pytest.mark.parametrize(
    ("num_samples", "num_frames"),
    [
        (FRAME, 1),
        (13 * FRAME - 1, 12),  # less than a chunk, and less than a frame more
        (13 * FRAME, 13),  # a chunk
        (13 * FRAME + 1, 13),
        (14 * FRAME, 14),  # a second chunk, for one frame
    ],
)
def test_the_video_has_each_whole_frame_of_the_voice(
    talk: Talk, voice_S: Tensor, num_samples: int, num_frames: int
) -> None:
    assert talk(voice_S[:num_samples], 13).shape[1] == num_frames


def test_the_mouth_is_in_time_from_the_first_chunk_to_the_last(talk: Talk, voice_S: Tensor) -> None:
    frames_CTHW = talk(voice_S[: 105 * FRAME], 41)
    assert frames_CTHW.shape[1] == 105  # 41 + 32 + 32: three chunks
    seen_T, true_T = estimate_aperture(frames_CTHW), mouth_curve(voice_S, RATE, 105).aperture_T
    for start, stop in ((0, 41), (73, 105)):
        correlation, lag = sync(seen_T[start:stop], true_T[start:stop])
        assert lag == 0
        assert correlation > 0.95  # 0.98 as measured
