"""The comparison of encoding whole and in sections, with a fake encoder of single frames."""

from pathlib import Path
from typing import cast

import pytest
import torch

from tests.family import FakeEncoder, make_request
from training.evaluation import chunked_encoding
from training.evaluation.chunked_encoding import (
    PAUSE_LEVEL,
    SectionNormalized,
    compare_rows,
    draw_voice,
    encode_sections,
    main,
)
from turbotalk_core.audio.conversation import encode_speech
from turbotalk_core.pipeline import Models
from turbotalk_core.types import SoundMoments

REQUEST = make_request(num_inference_steps=1)


def test_the_voice_rests_in_the_middle() -> None:
    voice = draw_voice(3, 4.0, 1.0)
    assert voice.num_samples == 64_000
    pause_S = voice.samples_CS[0, 24_000:40_000]
    assert pause_S.std().item() == pytest.approx(PAUSE_LEVEL, rel=0.05)
    assert voice.samples_CS[0, :24_000].std() > 10 * PAUSE_LEVEL


def test_an_encoder_of_single_frames_returns_the_same_in_sections() -> None:
    voice, encoder = draw_voice(3, 4.0, 1.0), FakeEncoder()
    whole_TLD = encode_speech(voice, encoder, hearing="whole").features.rows()
    assert compare_rows(encode_sections(voice, encoder, 30, 10).features_TLD, whole_TLD) == (
        0.0,
        0.0,
    )


def test_rows_are_compared_with_their_size() -> None:
    whole_TLD = torch.full((200, 2, 3), 2.0)
    rows_TLD = whole_TLD.clone()
    rows_TLD[:3] += 1.0
    overall, worst = compare_rows(rows_TLD, whole_TLD)
    assert overall == pytest.approx((3 / 200) ** 0.5 / 2)
    assert worst == pytest.approx(0.5)


def test_a_section_is_encoded_without_the_statistics_of_the_whole() -> None:
    received = []

    class Recording(FakeEncoder):
        first_kernel = (10, 5)

        def encode(
            self,
            waveform_S: torch.Tensor,
            num_frames: int,
            moments: SoundMoments | None = None,
        ) -> torch.Tensor:
            received.append(moments)
            return super().encode(waveform_S, num_frames)

    voice = draw_voice(3, 1.0, 0.2)
    encode_sections(voice, SectionNormalized(Recording()), 10, 5)
    assert received
    assert not any(received)


def test_the_table_has_a_row_for_each_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family = (REQUEST, cast(Models, None), FakeEncoder())
    monkeypatch.setattr(chunked_encoding, "load_family", lambda *_: family)
    monkeypatch.setattr(chunked_encoding, "SETTINGS", ((30, 10),))
    assert main(["--weights", str(Path()), "--minutes", "0.1", "--chunks", "0"]) == 0
    *_, head, _, plain, received = capsys.readouterr().out.splitlines()
    assert head.endswith("| normalised by | speech | with a pause |")
    assert plain == "| 30 | 10 | the section | 0.000, 0.000 | 0.000, 0.000 |"
    assert received == "| 30 | 10 | the whole | 0.000, 0.000 | 0.000, 0.000 |"
