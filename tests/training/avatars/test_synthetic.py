"""Complete clips with espeak-ng's speech."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.avatars.mouth import mouth_curve
from training.avatars.speech import draw_speech
from training.avatars.synthetic import draw_clip, draw_clip_with_reference, main
from training.avatars.vocabulary import WORDS
from training.evaluation.mouth import estimate_aperture, sync
from turbotalk_core.errors import AudioError, MissingToolError, RequestError


def test_splits_share_no_word() -> None:
    for words in WORDS.values():
        train, heldout = set(words.of("train")), set(words.of("heldout"))
        assert not train & heldout
        assert train | heldout == set(words.words)
        assert len(heldout) >= 12


def test_missing_espeak_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingToolError, match="apt-get install espeak-ng"):
        draw_speech("train", 0, 1.0)


def test_no_length_is_refused() -> None:
    with pytest.raises(AudioError):
        draw_speech("train", 0, 0.0)
    with pytest.raises(RequestError):
        draw_clip("train", 0, 0)
    with pytest.raises(RequestError):
        draw_clip_with_reference("train", 0, 9, -1)


@pytest.mark.usefixtures("_espeak")
@pytest.mark.parametrize("seconds", [0.04, 1.3, 6.0])
def test_speech_is_repeatable_and_exactly_as_long_as_asked(seconds: float) -> None:
    first = draw_speech("heldout", 11, seconds)
    assert torch.equal(first, draw_speech("heldout", 11, seconds))
    assert first.shape == (round(16000 * seconds),)
    assert first.dtype == torch.float32
    assert first.abs().max() <= 1
    if seconds > 1:
        assert not torch.equal(first, draw_speech("train", 11, seconds))


@pytest.mark.usefixtures("_espeak")
def test_speech_moves_the_mouth_over_its_range() -> None:
    curves = [mouth_curve(draw_speech("train", seed, 4.0)).opening_T for seed in range(12)]
    opening_T = torch.cat(curves)
    assert opening_T.quantile(0.05) < 0.02
    assert opening_T.quantile(0.95) > 0.75
    assert 0.25 < opening_T.mean() < 0.65


@pytest.mark.usefixtures("_espeak")
def test_clip_is_consistent() -> None:
    clip = draw_clip("heldout", 2, 41)
    assert clip.frames_CTHW.shape == (3, 41, 128, 128)
    assert clip.waveform_S.shape == (41 * 640,)
    torch.testing.assert_close(clip.mouth.opening_T, mouth_curve(clip.waveform_S).opening_T)
    assert sync(estimate_aperture(clip.frames_CTHW), clip.mouth.aperture_T)[0] > 0.98
    again = draw_clip("heldout", 2, 41)
    assert torch.equal(clip.frames_CTHW, again.frames_CTHW)


@pytest.mark.usefixtures("_espeak")
def test_reference_is_an_earlier_frame_of_the_take() -> None:
    own, first_CHW = draw_clip_with_reference("train", 6, 17, 0)
    assert torch.equal(first_CHW, own.frames_CTHW[:, 0])
    later, earlier_CHW = draw_clip_with_reference("train", 6, 17, 20)
    assert not torch.equal(earlier_CHW, later.frames_CTHW[:, 0])
    still = later.still_mask_HW
    assert torch.equal(earlier_CHW[:, still], later.frames_CTHW[:, -1, still])


@pytest.mark.usefixtures("_espeak")
def test_command_writes_its_files(tmp_path: Path) -> None:
    main(["--seed", "7", "--frames", "9", "--gap", "3", "--out", str(tmp_path / "clip")])
    names = {path.name for path in (tmp_path / "clip").iterdir()}
    assert names == {"portrait.png", "speech.wav", "clip.mp4", "sheet.png"}
