"""One run: begun, stopped, continued and read, with the toy networks of the pipeline's tests."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.core.test_pipeline import HEIGHT, REQUEST, WIDTH, Toy, Watch, _speech
from tests.family import make_conversation
from turbotalk_core.errors import ImageError
from turbotalk_core.pipeline import generate
from turbotalk_core.render import Rendering, find_regions, render_video
from turbotalk_core.takes.cache_key import CacheKey
from turbotalk_core.takes.take import Take
from turbotalk_core.types import Conversation, Speaker
from turbotalk_core.video.mux import quantize_frames

PICTURE = torch.full((HEIGHT, WIDTH, 3), 0.625)  # 0.25 in [-1, 1]
NUM_FRAMES = 29  # chunks that keep 13, 8 and 8


def _converse(num_speakers: int = 1, num_frames: int = NUM_FRAMES) -> Conversation:
    return make_conversation(_speech(num_frames), num_speakers)


def _expected() -> Tensor:
    reference = torch.full((1, 3, HEIGHT, WIDTH), 0.25)
    chunks = generate(REQUEST, [reference], [_speech(NUM_FRAMES)], Toy().models)
    return torch.cat([quantize_frames(chunk.frames_BCTHW) for chunk in chunks])


def _open(
    folder: Path, toy: Toy | None = None, weights: str = ""
) -> AbstractContextManager[Rendering]:
    toy = toy or Toy()
    return render_video(REQUEST, [PICTURE], _converse(), toy.models, folder, weights=weights)


def test_all_frames_are_those_of_the_pipeline_and_of_the_take(tmp_path: Path) -> None:
    with _open(tmp_path / "take") as run:
        assert (run.num_chunks, run.num_finished, run.changes) == (3, 0, ())
        batches = list(run.frames())
    assert [len(batch) for batch in batches] == [13, 8, 8]
    assert torch.equal(torch.cat(batches), _expected())
    assert run.take.is_whole
    assert run.take == Take.open(tmp_path / "take")
    assert torch.equal(run.take.read(), _expected())


def test_announced_work_is_done_work(tmp_path: Path) -> None:
    toy, watch = Toy(), Watch()
    with _open(tmp_path / "take", toy) as run:
        assert run.num_units == 1 + 3 * 4
        list(run.generate(watch, watch.check_stop))
    assert watch.units == run.num_units == len(toy.log)
    assert watch.asked > 0


@pytest.mark.parametrize("num_finished", [1, 2])
def test_a_stopped_run_is_continued(tmp_path: Path, num_finished: int) -> None:
    def begin(run: Rendering) -> None:
        frames = run.frames()
        for _ in range(num_finished):
            next(frames)
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt), _open(tmp_path / "take") as run:
        begin(run)
    assert len(run.take.chunks) == num_finished
    toy, watch = Toy(), Watch()
    with _open(tmp_path / "take", toy) as run:
        assert run.num_finished == num_finished
        assert run.num_units == 1 + (3 - num_finished) * 4
        finished = torch.cat(list(run.read_finished()))
        new = torch.cat(list(run.generate(watch)))
    assert watch.units == run.num_units == len(toy.log)
    assert torch.equal(finished, _expected()[: 13 + 8 * (num_finished - 1)])
    assert torch.equal(torch.cat((finished, new)), _expected())


def test_a_whole_take_needs_no_network(tmp_path: Path) -> None:
    with _open(tmp_path / "take") as run:
        list(run.frames())
    toy = Toy()
    with _open(tmp_path / "take", toy) as run:
        assert run.found.is_whole
        assert run.num_units == 0
        assert list(run.generate()) == []
        assert torch.equal(torch.cat(list(run.frames())), _expected())
    assert toy.log == []


def test_another_key_begins_anew_and_says_why(tmp_path: Path) -> None:
    with _open(tmp_path / "take", weights="5b") as run:
        list(run.frames())
    changed = replace(REQUEST, seed=4)
    toy = Toy()
    with render_video(
        changed, [PICTURE], _converse(), toy.models, tmp_path / "take", weights="6c"
    ) as run:
        assert run.changes == ("seed was 3 and is 4", "weights was 5b and is 6c")
        assert run.num_finished == 0
        assert list(run.read_finished()) == []


def test_the_key_may_choose_the_folder(tmp_path: Path) -> None:
    keys: list[CacheKey] = []

    def choose(key: CacheKey) -> Path:
        keys.append(key)
        return tmp_path / "chosen"

    told = {"nodes before it": "7d"}
    text = torch.ones(1, 2, 3)
    with render_video(
        REQUEST, [PICTURE], _converse(), Toy(text_BND=text).models, choose, weights="w", others=told
    ) as run:
        assert run.take.folder == tmp_path / "chosen"
        assert run.take.cache_key == keys[0]
    fields = keys[0].fields
    assert (fields["nodes before it"], fields["weights"], fields["seed"]) == ("7d", "w", "3")
    assert {"prompt", "picture", "voice", "hearing"} <= fields.keys()
    assert "regions" not in fields
    assert not (tmp_path / "chosen").exists()  # no chunk was finished


def test_several_speakers_take_the_same_way(tmp_path: Path) -> None:
    toy = Toy()
    request = replace(REQUEST, height=64, width=64)
    picture = torch.rand(80, 80, 3, generator=torch.Generator().manual_seed(0))
    conversation = _converse(2)
    with render_video(request, [picture], conversation, toy.models, tmp_path / "take") as run:
        list(run.frames())
    expected = find_regions(request, picture, conversation.speakers)
    assert expected is not None
    assert expected.shape == (3, 8, 8)
    assert run.regions_PHW is not None
    assert torch.equal(run.regions_PHW, expected)
    assert "regions" in run.take.cache_key.fields
    assert toy.denoiser.calls[0][3].num_speakers == 2


def test_regions_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    speakers = [Speaker(name=name) for name in ("Anna", "Bob", "Carl")]
    with pytest.raises(ImageError, match="no region for Anna, Bob, Carl"):
        find_regions(REQUEST, PICTURE, speakers)
    assert find_regions(REQUEST, PICTURE, speakers[:1]) is None
    conversation = _converse(3)
    with (
        pytest.raises(ImageError, match="no region for"),
        render_video(REQUEST, [PICTURE], conversation, Toy().models, tmp_path / "take"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
