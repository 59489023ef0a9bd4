"""Value types reject contents that would fail later."""

from typing import Any

import pytest
import torch

from turbotalk_core.errors import AudioError, ChunkError, GeometryError, MismatchError, RequestError
from turbotalk_core.types import (
    AudioFeatures,
    AudioTokens,
    AudioWindows,
    Chunk,
    ChunkPlan,
    Conditioning,
    Conversation,
    FrameChunk,
    Speaker,
    Speech,
    Waveform,
)


def _chunk(*, index: int = 0, start: int = 0, keep: tuple[int, int] = (0, 5)) -> Chunk:
    return Chunk(index=index, start=start, stop=start + 5, keep_start=keep[0], keep_stop=keep[1])


def test_a_waveform_knows_its_length() -> None:
    waveform = Waveform(samples_CS=torch.zeros(2, 44_100), sample_rate=44_100)
    assert waveform.num_frames == 25
    assert waveform.seconds == 1


def test_a_waveform_refuses_what_is_no_sound() -> None:
    with pytest.raises(AudioError, match="no samples"):
        Waveform(samples_CS=torch.zeros(1, 0), sample_rate=16_000)
    with pytest.raises(AudioError, match="NaN"):
        Waveform(samples_CS=torch.tensor([[0.0, float("nan")]]), sample_rate=16_000)
    with pytest.raises(AudioError, match="0 Hz"):
        Waveform(samples_CS=torch.zeros(1, 5), sample_rate=0)
    with pytest.raises(MismatchError, match="axes CS"):
        Waveform(samples_CS=torch.zeros(5), sample_rate=16_000)


@pytest.mark.parametrize("num_frames", [0, 4])
def test_features_need_a_row_for_each_frame(num_frames: int) -> None:
    with pytest.raises(AudioError, match=f"for {num_frames} video frames"):
        AudioFeatures(features_TLD=torch.zeros(3, 2, 2), num_frames=num_frames)


def test_a_chunk_counts_its_frames() -> None:
    chunk = _chunk(index=1, start=4, keep=(5, 9))
    assert chunk.num_frames == 5
    assert chunk.num_motion_frames == 1


@pytest.mark.parametrize("keep", [(-1, 5), (3, 3), (0, 6)])
def test_a_chunk_keeps_only_what_it_makes(keep: tuple[int, int]) -> None:
    with pytest.raises(ChunkError, match="cannot keep"):
        _chunk(keep=keep)


def test_a_chunk_has_4n_plus_1_frames() -> None:
    with pytest.raises(GeometryError, match="got 6 frames"):
        Chunk(index=0, start=0, stop=6, keep_start=0, keep_stop=6)


def test_a_plan_refuses_gaps_and_wrong_ends() -> None:
    first, second = _chunk(), _chunk(index=1, start=4, keep=(5, 9))
    assert ChunkPlan(num_frames=9, chunks=(first, second)).chunks[1] is second
    with pytest.raises(ChunkError, match=r"frames \[0, 5\) belong to no chunk"):
        ChunkPlan(num_frames=9, chunks=(second,))
    with pytest.raises(ChunkError, match="keeps 5 of 9 frames"):
        ChunkPlan(num_frames=9, chunks=(first,))


def test_tensors_of_another_rank_are_refused() -> None:
    with pytest.raises(MismatchError, match="first window must have axes KLD"):
        AudioWindows(first_KLD=torch.zeros(5), later_FKLD=torch.zeros(1, 8, 2, 2))
    with pytest.raises(MismatchError, match="later windows must have axes FKLD"):
        AudioWindows(first_KLD=torch.zeros(5, 2, 2), later_FKLD=torch.zeros(8, 2, 2))
    with pytest.raises(MismatchError, match="axes FND"):
        AudioTokens(tokens_FND=torch.zeros(2, 2))
    with pytest.raises(MismatchError, match="axes BCFHW"):
        Conditioning(reference_BCFHW=torch.zeros(20, 2, 4, 4))


def test_a_frame_chunk_holds_the_kept_frames() -> None:
    with pytest.raises(ChunkError, match="keeps 5 frames, got 4"):
        FrameChunk(chunk=_chunk(), frames_BCTHW=torch.zeros(1, 3, 4, 2, 2))


def test_a_speaker_has_a_name_and_a_region_of_one_kind() -> None:
    assert Speaker(name="Anna").region is None
    with pytest.raises(RequestError, match="without a name"):
        Speaker(name=" ")
    with pytest.raises(MismatchError, match="region of Anna must have axes HW"):
        Speaker(name="Anna", region=torch.zeros(1, 4, 4))
    with pytest.raises(MismatchError, match="got 3 numbers as the region of Anna"):
        Speaker(name="Anna", region=(1, 2, 3))  # pyright: ignore[reportArgumentType]


def test_a_conversation_has_equally_long_speeches() -> None:
    waveform = Waveform(samples_CS=torch.zeros(1, 640), sample_rate=16_000)
    speeches = tuple(
        Speech(
            features=AudioFeatures(features_TLD=torch.zeros(3, 1, 1), num_frames=num_frames),
            waveform=waveform,
        )
        for num_frames in (1, 2)
    )
    speakers = (Speaker(name="Anna"), Speaker(name="Bob"))
    for who, said in ((speakers, speeches), (speakers, speeches[:1]), (speakers[:0], ())):
        with pytest.raises(MismatchError, match="all equally long"):
            Conversation(speakers=who, speeches=said, waveform=waveform)


@pytest.mark.parametrize(
    "name",
    [
        "Anna",
        "Zoë",
        "李雷",
        "Анна",
        "محمد",
        "\u0639\u0644\u06cc\u200c\u0631\u0636\u0627",
        "👩\u200d🚀",
        "../..",
        "x" * 100,
    ],
)
def test_a_speaker_may_have_any_name_that_can_be_read(name: str) -> None:
    assert Speaker(name=name).name == name


@pytest.mark.parametrize(
    "name", ["", "a\nb", "a\0", "a\x1b[2J", "\u202eannA", "a\u2028b", "\ud800", "x" * 101]
)
def test_a_name_that_cannot_be_drawn_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="got a speaker"):
        Speaker(name=name)


@pytest.mark.parametrize(
    "region", [(1, 2, 3, 4.0), (1, 2, 3, True), ("1", 2, 3, 4), (None,) * 4, (1, 2, 3, 4, 5)]
)
def test_a_box_of_other_things_is_refused(region: Any) -> None:
    with pytest.raises(MismatchError, match="a box has four whole ones"):
        Speaker(name="Anna", region=region)


def test_a_rate_beyond_all_recorders_is_refused() -> None:
    samples_CS = torch.zeros(1, 5)
    assert Waveform(samples_CS=samples_CS, sample_rate=384_000).sample_rate == 384_000
    with pytest.raises(AudioError, match="384001 Hz; it must be positive, and at most 384000"):
        Waveform(samples_CS=samples_CS, sample_rate=384_001)
