"""What InfiniteTalk does otherwise, piece by piece; whole videos: tests/golden/test_pipe.py."""

from dataclasses import replace

import pytest
import torch

from tests.family import make_request
from turbotalk_core.chunking.plan import plan_chunks
from turbotalk_core.reference_behaviour import (
    Behaviour,
    ReferenceBehaviour,
    choose_behaviour,
    drop_silence,
    mirror_end,
    select_lora_tensors,
)
from turbotalk_core.request import TalkRequest
from turbotalk_core.types import AudioFeatures, ChunkPlan, FeatureRows

REQUEST = make_request(update="euler")
ROWS = torch.arange(9, dtype=torch.float32)[:, None, None]
WITH_TAIL = AudioFeatures(features_TLD=ROWS, num_frames=6)


def _rows(features: FeatureRows) -> list[int]:
    return features.rows().flatten().int().tolist()


def test_the_request_decides() -> None:
    assert type(choose_behaviour(REQUEST)) is Behaviour
    assert type(choose_behaviour(replace(REQUEST, follows_reference=True))) is ReferenceBehaviour


def test_a_request_of_before_is_read() -> None:
    old = replace(REQUEST, follows_reference=True)
    assert '"follows_reference": true' in old.to_json()
    assert TalkRequest.from_json(old.to_json()) == old


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (5, [0, 1, 2, 3, 4, 5]),
        (6, [0, 1, 2, 3, 4, 5, 5, 4, 3]),
        (8, [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1]),
        (20, [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]),
    ],
)
def test_the_reference_mirrors_the_end_of_a_voice(stop: int, expected: list[int]) -> None:
    assert _rows(mirror_end(WITH_TAIL, stop)) == expected


def test_the_silence_after_a_voice_is_dropped() -> None:
    assert _rows(drop_silence(WITH_TAIL)) == [0, 1, 2, 3, 4, 5]
    chunk = plan_chunks(6, 9, 1).chunks[0]
    ours, theirs = Behaviour(), ReferenceBehaviour()
    for is_last in (False, True):
        assert ours.select_rows(WITH_TAIL, chunk, is_last=is_last) is WITH_TAIL
    assert _rows(theirs.select_rows(WITH_TAIL, chunk, is_last=False)) == [0, 1, 2, 3, 4, 5]
    assert _rows(theirs.select_rows(WITH_TAIL, chunk, is_last=True)) == _rows(
        mirror_end(WITH_TAIL, 9)
    )


def test_lengths() -> None:
    def plan(num_frames: int) -> ChunkPlan:
        return plan_chunks(num_frames, 13, 5)

    assert Behaviour().count_frames([22, 31], plan) == 31
    assert ReferenceBehaviour().count_frames([22, 31], plan) == 29


def test_unused_noise_moves_the_generator() -> None:
    latents = torch.zeros(1, 16, 2, 4, 4)
    expected = torch.Generator().manual_seed(0)
    for _ in range(3):
        torch.randn(latents.shape, generator=expected)
    for behaviour, moves in ((Behaviour(), False), (ReferenceBehaviour(), True)):
        generator = torch.Generator().manual_seed(0)
        start = generator.get_state()
        behaviour.draw_unused_noise(REQUEST, latents, generator)
        assert torch.equal(generator.get_state(), expected.get_state() if moves else start)


def test_frames_are_joined_or_not() -> None:
    frames, motion = torch.zeros(1, 3, 5, 2, 2), torch.ones(1, 3, 1, 2, 2)
    assert Behaviour().join(frames, motion)[:, :, 1].eq(1).all()
    assert ReferenceBehaviour().join(frames, motion) is frames


def test_alphas_and_one_spelling_are_passed_over() -> None:
    names = ("a.lora_down.weight", "a.lora_up.weight", "a.alpha", "b.lora_A.weight")
    names += ("b.lora_B.weight", "c.diff")
    selected = select_lora_tensors({name: torch.zeros(1) for name in names})
    assert list(selected) == ["a.lora_down.weight", "a.lora_up.weight", "c.diff"]
