"""The pipeline on toy networks whose output shows their input.

The toy VAE pools pixels: latent channel 0 is the mean of its video frames, eight by eight, so
that a frame's brightness can be followed through the whole pipeline.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.family import make_request, make_speech
from turbotalk_core.chunking.plan import plan_chunks
from turbotalk_core.conditioning.reference import reference_clip
from turbotalk_core.errors import MismatchError, OutOfMemoryError, RequestError
from turbotalk_core.geometry import count_decoded_frames, count_latent_frames
from turbotalk_core.pipeline import Models, count_work, generate, plan_video
from turbotalk_core.request import TalkRequest
from turbotalk_core.types import (
    AudioTokens,
    AudioWindows,
    Conditioning,
    FrameChunk,
    Speech,
)

HEIGHT, WIDTH = 32, 16
REQUEST = make_request(
    num_inference_steps=2,
    seed=3,
    height=HEIGHT,
    width=WIDTH,
    chunk_frames=13,
    num_motion_frames=5,
)
REFERENCE = torch.full((1, 3, HEIGHT, WIDTH), 0.25)


class Codec:
    """VAE with means of 1, 4, 4, ... frames by 8 by 8 pixels in channel 0; decode repeats them."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.encoded: list[Tensor] = []

    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        num_latents = count_latent_frames(frames_BCTHW.shape[2])
        self.log.append(f"encode {frames_BCTHW.shape[2]}")
        self.encoded.append(frames_BCTHW)
        padded = torch.cat((frames_BCTHW[:, :, :1].expand(-1, -1, 3, -1, -1), frames_BCTHW), 2)
        pooled = F.avg_pool3d(padded.mean(1, keepdim=True), (4, 8, 8))
        assert pooled.shape[2] == num_latents
        return F.pad(pooled, (0, 0, 0, 0, 0, 0, 0, 15))

    def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
        self.log.append(f"reference {num_frames}")
        return Codec([]).encode(reference_clip(picture_BCHW, num_frames))

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        self.log.append("decode")
        repeated = F.interpolate(latents_BCFHW[:, :1], scale_factor=(4, 8, 8))
        assert repeated.shape[2] - 3 == count_decoded_frames(latents_BCFHW.shape[2])
        return repeated[:, :, 3:].expand(-1, 3, -1, -1, -1)


class Adapter:
    """Audio adapter with one token per latent frame: the mean of its window."""

    def __init__(self) -> None:
        self.windows: list[AudioWindows] = []

    def __call__(self, windows: AudioWindows) -> AudioTokens:
        self.windows.append(windows)
        means_F = torch.cat((windows.first_KLD.mean().view(1), windows.later_FKLD.mean((1, 2, 3))))
        return AudioTokens(tokens_FND=means_F.view(-1, 1, 1))


class Denoiser:
    """Denoiser of one video: a latent frame is as bright as its audio token, less 0.01 for text."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.calls: list[tuple[Tensor, float, Conditioning, AudioTokens]] = []

    def __call__(
        self, latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> Tensor:
        assert not torch.is_grad_enabled()
        self.log.append("call")
        self.calls.append((latents_BCFHW, sigma, conditioning, tokens))
        told = 0.0 if conditioning.text_BND is None else conditioning.text_BND.mean().item()
        last_voice_F = tokens.tokens_FND[:, -1]
        denoised = last_voice_F.view(1, 1, -1, 1, 1) - told / 100
        return (latents_BCFHW - denoised) / sigma


class Watch:
    """Progress and stop callbacks; logs calls, counts units, keeps previews."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.units = 0
        self.asked = 0
        self.previews: list[Tensor] = []
        self.stop_before = stop_before

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        self.units += units
        if preview_HWC is not None:
            self.previews.append(preview_HWC)

    def check_stop(self) -> None:
        if self.asked == self.stop_before:
            raise InterruptedError
        self.asked += 1


class Toy:
    """All toy networks, with one common log of their calls."""

    def __init__(self, **told: Any) -> None:
        self.log: list[str] = []
        self.vae = Codec(self.log)
        self.adapter = Adapter()
        self.denoiser = Denoiser(self.log)
        self.models = Models(vae=self.vae, denoiser=self.denoiser, adapter=self.adapter, **told)


def _speech(num_frames: int) -> Speech:
    """Return a voice whose features rise by 0.01 per frame, and a tail of silence."""
    rows = torch.cat((torch.arange(num_frames) / 100, torch.zeros(25)))
    return make_speech(rows[:, None, None].expand(-1, 2, 3), num_frames)


def _run(
    request: TalkRequest, num_frames: int, toy: Toy | None = None, watch: Watch | None = None
) -> Tensor:
    return torch.cat([c.frames_BCTHW for c in _iterate(request, num_frames, toy, watch)], 2)


def _iterate(
    request: TalkRequest, num_frames: int, toy: Toy | None = None, watch: Watch | None = None
) -> Iterator[FrameChunk]:
    toy, watch = toy or Toy(), watch or Watch()
    return generate(
        request,
        [REFERENCE],
        [_speech(num_frames)],
        toy.models,
        progress=watch,
        check_stop=watch.check_stop,
    )


@pytest.mark.parametrize("num_frames", [1, 12, 13, 14, 29, 30])
def test_the_video_is_as_long_as_the_voice(num_frames: int) -> None:
    chunks = list(_iterate(REQUEST, num_frames))
    assert [c.chunk for c in chunks] == list(plan_chunks(num_frames, 13, 5).chunks)
    frames_BCTHW = torch.cat([c.frames_BCTHW for c in chunks], 2)
    assert frames_BCTHW.shape == (1, 3, num_frames, HEIGHT, WIDTH)
    assert frames_BCTHW.dtype == torch.float32


def test_each_frame_follows_its_own_part_of_the_voice() -> None:
    frames_BCTHW = _run(REQUEST, 29)
    assert torch.equal(frames_BCTHW[:, :, 0], REFERENCE)
    brightness_T = frames_BCTHW.mean((0, 1, 3, 4))
    # A latent frame covers 4j - 3 ... 4j, and its window's mean lies half a frame before 4j - 1.
    for t in range(5, 21):  # before, windows reach past the start
        centre = 4 * ((t - 1) // 4) + 2.5
        assert brightness_T[t].item() == pytest.approx(centre / 100, abs=1e-5)


def test_work_is_done_in_order_and_a_chunk_is_handed_on_before_the_next() -> None:
    toy = Toy()
    iterator = _iterate(REQUEST, 25, toy)
    assert toy.log == []
    next(iterator)
    first = ["reference 13", "encode 1", "call", "call", "decode"]
    assert toy.log == first
    next(iterator)
    later = ["encode 5", "call", "call", "decode"]
    assert toy.log == first + later
    assert len(list(iterator)) == 1


def test_the_reference_lengths_encode_81_frames_once_then_1_then_9() -> None:
    toy = Toy()
    _run(replace(REQUEST, chunk_frames=81, num_motion_frames=9), 200, toy)
    encoded = [entry for entry in toy.log if entry not in ("call", "decode")]
    assert encoded == ["reference 81", "encode 1", "encode 9", "encode 9"]


def test_the_network_is_told_the_reference_once_for_all_chunks() -> None:
    toy = Toy(image_embeds_BND=torch.ones(1, 2, 3))
    _run(REQUEST, 29, toy)
    conditionings = {id(conditioning) for _, _, conditioning, _ in toy.denoiser.calls}
    assert len(conditionings) == 1
    conditioning = toy.denoiser.calls[0][2]
    mask, latents = conditioning.reference_BCFHW.split([4, 16], 1)
    assert mask[:, :, 0].eq(1).all()
    assert mask[:, :, 1:].eq(0).all()
    assert latents[:, 0, 0].eq(0.25).all()
    assert latents[:, :, 1:].eq(0).all()  # grey is 0 in [-1, 1]
    assert conditioning.text_BND is None
    assert conditioning.image_embeds_BND is toy.models.image_embeds_BND


def test_a_chunk_begins_with_the_frames_that_ended_the_one_before() -> None:
    toy = Toy()
    frames_BCTHW = _run(REQUEST, 29, toy)
    image, *motions = toy.vae.encoded
    assert torch.equal(image[:, :, 0], REFERENCE)
    for motion, stop in zip(motions, (13, 21), strict=True):
        assert torch.equal(motion, frames_BCTHW[:, :, stop - 5 : stop])
    for latents, _, _, _ in toy.denoiser.calls[2:4]:
        torch.testing.assert_close(latents[:, 1:, :2], torch.zeros_like(latents[:, 1:, :2]))


def test_guidance_hears_windows_of_zeros_made_once() -> None:
    toy = Toy()
    _run(replace(REQUEST, audio_guidance_scale=4.0), 29, toy)
    null, *heard = toy.adapter.windows
    assert len(heard) == 3
    assert null.first_KLD.eq(0).all()
    assert null.later_FKLD.eq(0).all()
    assert null.later_FKLD.shape == heard[0].later_FKLD.shape
    voices = [tokens.tokens_FND.abs().max().item() for _, _, _, tokens in toy.denoiser.calls]
    assert [voice > 0 for voice in voices] == [True, False] * 6


def test_audio_guidance_pushes_away_from_silence() -> None:
    plain = _run(REQUEST, 13)
    pushed = _run(replace(REQUEST, audio_guidance_scale=3.0), 13)
    torch.testing.assert_close(pushed[:, :, 1:], 3 * plain[:, :, 1:], rtol=1e-4, atol=1e-5)


def test_text_guidance_pushes_towards_the_prompt() -> None:
    def make(text_scale: float) -> Tensor:
        toy = Toy(text_BND=torch.ones(1, 2, 3), null_text_BND=torch.zeros(1, 2, 3))
        return _run(replace(REQUEST, guidance_scale=text_scale), 13, toy)[:, :, 1:]

    torch.testing.assert_close(make(1) - make(6), torch.full_like(make(1), 0.05))


def test_a_chunk_is_told_the_prompt_of_its_middle() -> None:
    """Chunks keep [0, 13), [13, 21), [21, 29), [29, 37): their middles are 6, 17, 25, 33."""
    first, second, third = (torch.full((1, 2, 3), float(level)) for level in (1, 2, 3))
    toy = Toy(text_BND=first, later_texts=((17, second), (26, third)))
    _run(REQUEST, 37, toy)
    told = [conditioning.text_BND for _, _, conditioning, _ in toy.denoiser.calls]
    for text, expected in zip(told[::2], (first, second, second, third), strict=True):
        assert text is expected
    assert toy.log.count("reference 13") == 1
    assert list(toy.models.cache_fields()) == [
        "prompt",
        "negative prompt",
        "clip vision",
        "prompt from frame 17",
        "prompt from frame 26",
    ]


@pytest.mark.parametrize("update", ["euler", "renoise"])
def test_the_same_request_gives_the_same_frames(update: Any) -> None:
    request = replace(REQUEST, update=update)
    frames = []
    for seed in (3, 3, 4):
        toy = Toy()
        _run(replace(request, seed=seed), 29, toy)
        frames.append(torch.stack([latents for latents, _, _, _ in toy.denoiser.calls]))
    assert torch.equal(frames[0], frames[1])
    assert not torch.equal(frames[0], frames[2])


def test_noise_is_drawn_per_chunk_and_then_per_step() -> None:
    toy = Toy()
    _run(REQUEST, 20, toy)
    generator = torch.Generator().manual_seed(REQUEST.seed)
    shape = (1, 16, 4, HEIGHT // 8, WIDTH // 8)
    for chunk, num_pinned in enumerate((1, 2)):
        noise, fresh = (torch.randn(shape, generator=generator) for _ in range(2))
        first, second = toy.denoiser.calls[2 * chunk : 2 * chunk + 2]
        assert torch.equal(first[0][:, :, num_pinned:], noise[:, :, num_pinned:])
        sigma, tokens = second[1], second[3].tokens_FND.view(1, 1, -1, 1, 1)
        expected = (1 - sigma) * tokens + sigma * fresh
        torch.testing.assert_close(second[0][:, :, num_pinned:], expected[:, :, num_pinned:])


def test_global_randomness_is_neither_used_nor_moved() -> None:
    before = torch.get_rng_state()
    _run(REQUEST, 13)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_are_off_inside_and_untouched_outside() -> None:
    for _ in _iterate(REQUEST, 29):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(("scales", "calls"), [((1, 1), 1), ((1, 2), 2), ((2, 1), 3)])
@pytest.mark.parametrize("num_frames", [5, 29])
def test_announced_work_is_done_work(num_frames: int, scales: tuple[int, int], calls: int) -> None:
    request = replace(REQUEST, guidance_scale=scales[0], audio_guidance_scale=scales[1])
    toy, watch = Toy(text_BND=torch.ones(1, 2, 3)), Watch()
    _run(request, num_frames, toy, watch)
    plan = plan_video(request, [_speech(num_frames)])
    assert watch.units == count_work(plan, request) == len(toy.log)
    assert toy.log.count("call") == 2 * calls * len(plan.chunks)


def test_each_finished_chunk_is_shown() -> None:
    watch = Watch()
    chunks = list(_iterate(REQUEST, 20, watch=watch))
    for chunk, preview_HWC in zip(chunks, watch.previews, strict=True):
        assert preview_HWC.shape == (HEIGHT, WIDTH, 3)
        last_CHW = chunk.frames_BCTHW[0, :, -1]
        torch.testing.assert_close(2 * preview_HWC.permute(2, 0, 1) - 1, last_CHW)


@pytest.mark.parametrize("stop_before", range(9))
def test_a_stop_at_any_point_lets_nothing_later_run(stop_before: int) -> None:
    toy, watch = Toy(), Watch(stop_before)
    with pytest.raises(InterruptedError):
        _run(REQUEST, 20, toy, watch)
    assert len(toy.log) == watch.units == stop_before


@pytest.mark.parametrize("part", ["denoiser", "codec"])
def test_where_memory_does_not_suffice_it_says_what_to_do(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second chunk; the first is handed on."""
    toy = Toy()

    def fail(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    iterator = _iterate(REQUEST, 29, toy)
    first = next(iterator)
    broken, method = {"denoiser": (Denoiser, "__call__"), "codec": (Codec, "decode")}[part]
    monkeypatch.setattr(broken, method, fail)
    with pytest.raises(OutOfMemoryError) as refused:
        next(iterator)
    for told in ("16x32", "13 frames", "Tried to allocate", "run the same again", "chunk_frames"):
        assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    # Whoever holds the error does not hold what lay in memory.
    assert refused.value.__cause__ is refused.value.__context__ is None
    monkeypatch.undo()
    rest = generate(
        REQUEST, [REFERENCE], [_speech(29)], Toy().models, chunk_state=first.chunk_state
    )
    frames_BCTHW = torch.cat([chunk.frames_BCTHW for chunk in (first, *rest)], 2)
    assert torch.equal(frames_BCTHW, _run(REQUEST, 29))


def test_other_errors_pass_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Denoiser, "__call__", fail)
    with pytest.raises(RuntimeError, match="shapes") as raised:
        _run(REQUEST, 13)
    assert type(raised.value) is RuntimeError


def _lose(toy: Toy) -> Toy:
    """VAE with a loss: each encoding is darker by 0.1."""
    encode = toy.vae.encode
    toy.vae.encode = lambda frames_BCTHW: encode(frames_BCTHW) - 0.1  # type: ignore[method-assign]
    return toy


def test_what_the_codec_loses_makes_no_seam() -> None:
    """The toy's new frames rise by 0.04 in four; its motion frames are given back darker."""
    steps = []
    for follows in (False, True):
        request = replace(REQUEST, follows_reference=follows)
        frames_T = _run(request, 21, _lose(Toy())).mean((0, 1, 3, 4))
        steps.append(frames_T[13] - frames_T[12])
    torch.testing.assert_close(steps[1], torch.tensor(0.04), atol=1e-5, rtol=0)
    torch.testing.assert_close(steps[0], torch.tensor(0.04 + 0.1), atol=1e-5, rtol=0)


def test_an_anchored_chunk_begins_with_its_reference_image() -> None:
    pictures = [_grey(-t / 64) for t in range(40)]
    plain, anchored = Toy(), Toy()
    request = replace(REQUEST, anchors_chunks=True)
    for toy, asked in ((plain, REQUEST), (anchored, request)):
        chunks = list(generate(asked, pictures, [_speech(29)], toy.models))
    frames_BCTHW = torch.cat([chunk.frames_BCTHW for chunk in chunks], 2)
    assert anchored.log == plain.log  # it costs nothing
    for chunk, frame in enumerate((0, 8, 16)):
        latents, _, conditioning, _ = anchored.denoiser.calls[2 * chunk]
        assert torch.equal(latents[:, :, 0], conditioning.reference_BCFHW[:, 4:, 0])
        assert latents[:, 0, 0].eq(-frame / 64).all()
        if chunk > 0:
            shown = frames_BCTHW[:, :, 8 * chunk + 1 : 8 * chunk + 5]
            torch.testing.assert_close(latents[:, 0, 1], F.avg_pool3d(shown, (4, 8, 8))[:, 0, 0])


def test_a_single_motion_frame_is_not_anchored() -> None:
    request = replace(REQUEST, num_motion_frames=1)
    assert torch.equal(_run(replace(request, anchors_chunks=True), 29), _run(request, 29))


@pytest.mark.parametrize("anchors", [False, True])
@pytest.mark.parametrize("update", ["euler", "renoise"])
@pytest.mark.parametrize("num_finished", [1, 2, 3, 4])
def test_going_on_is_as_if_it_had_never_stopped(
    update: Any, num_finished: int, anchors: bool
) -> None:
    request = replace(REQUEST, update=update, audio_guidance_scale=2.0, anchors_chunks=anchors)
    whole = Toy()
    chunks = list(_iterate(request, 37, whole))
    assert [chunk.chunk_state.num_chunks for chunk in chunks if chunk.chunk_state] == [1, 2, 3, 4]
    toy, watch = Toy(), Watch()
    rest = list(
        generate(
            request,
            [REFERENCE],
            [_speech(37)],
            toy.models,
            progress=watch,
            chunk_state=chunks[num_finished - 1].chunk_state,
        )
    )
    assert [c.chunk for c in rest] == [c.chunk for c in chunks[num_finished:]]
    for made, expected in zip(rest, chunks[num_finished:], strict=True):
        assert torch.equal(made.frames_BCTHW, expected.frames_BCTHW)
    given = [latents for latents, _, _, _ in whole.denoiser.calls[4 * num_finished :]]
    for call, latents in zip(toy.denoiser.calls, given, strict=True):
        assert torch.equal(call[0], latents)
    if rest:  # else there is nothing to do, and nobody would count
        plan = plan_video(request, [_speech(37)])
        assert watch.units == count_work(plan, request, num_finished=num_finished)


@pytest.mark.parametrize(
    "changes",
    [
        {"motion_frames_BCTHW": torch.zeros(1, 3, 9, HEIGHT, WIDTH)},
        {"motion_frames_BCTHW": torch.zeros(1, 3, 5, HEIGHT, WIDTH, dtype=torch.float64)},
        {"noise_state_S": torch.zeros(7, dtype=torch.uint8)},
        {"noise_state_S": torch.Generator("cpu").get_state().float()},
        {"noise_state_S": torch.full_like(torch.Generator("cpu").get_state(), 255)},
    ],
)
def test_what_another_video_handed_on_is_refused(changes: dict[str, Tensor]) -> None:
    chunk_state = next(_iterate(REQUEST, 29)).chunk_state
    assert chunk_state is not None
    with pytest.raises(MismatchError, match="begin anew"):
        generate(
            REQUEST,
            [REFERENCE],
            [_speech(29)],
            Toy().models,
            chunk_state=replace(chunk_state, **changes),
        )


def _grey(level: float) -> Tensor:
    return torch.full((1, 3, HEIGHT, WIDTH), level)


def test_a_dubbed_video_shows_each_chunk_its_frame() -> None:
    pictures = [_grey(t / 64) for t in range(12)]
    toy, watch = Toy(), Watch()
    models = replace(toy.models, image_encoder=lambda image_BCHW: image_BCHW.mean().view(1, 1, 1))
    speech = _speech(29)
    list(generate(REQUEST, pictures, [speech], models, progress=watch))
    for chunk, frame in enumerate((0, 8, 11)):  # the last, where the source has ended
        conditioning = toy.denoiser.calls[2 * chunk][2]
        assert conditioning.reference_BCFHW[0, 4, 0].eq(frame / 64).all()
        assert conditioning.image_embeds_BND is not None
        assert conditioning.image_embeds_BND.item() == frame / 64
    plan = plan_video(REQUEST, [speech])
    assert watch.units == len(toy.log) == count_work(plan, REQUEST, len(pictures))


def test_frames_of_a_source_are_asked_for_when_they_are_needed() -> None:
    class Source(list[Tensor]):
        asked: ClassVar[list[int]] = []

        def __getitem__(self, index: Any) -> Any:
            self.asked.append(index)
            return super().__getitem__(index)

    source = Source(_grey(0.1) for _ in range(40))
    iterator = generate(REQUEST, source, [_speech(29)], Toy().models)
    for expected in (0, 8, 16):
        next(iterator)
        assert source.asked[-1] == expected
    assert set(source.asked) == {0, 8, 16}


def test_several_voices_are_heard_one_beside_the_other() -> None:
    regions_PHW = torch.ones(3, HEIGHT // 8, WIDTH // 8)
    toy, alone = Toy(), Toy()
    guided = replace(REQUEST, audio_guidance_scale=3.0)
    voices = [_speech(5), _speech(29)]
    chunks = list(generate(guided, [REFERENCE], voices, toy.models, regions_PHW=regions_PHW))
    assert sum(chunk.frames_BCTHW.shape[2] for chunk in chunks) == 29
    _run(guided, 29, alone)
    assert len(toy.denoiser.calls) == len(alone.denoiser.calls)
    for (*_, told, together), (*_, lone) in zip(
        toy.denoiser.calls, alone.denoiser.calls, strict=True
    ):
        assert told.regions_PHW is regions_PHW
        if together.num_speakers == 2:
            assert torch.equal(together.tokens_FND[:, 1:], lone.tokens_FND)
        else:  # no voice is one voice of zeros
            assert not together.tokens_FND.any()
    last = toy.denoiser.calls[-2][3]
    assert last.num_speakers == 2
    assert not last.tokens_FND[:, 0].any()  # the short voice has long been silent


@pytest.mark.parametrize(("voices", "has_regions"), [(2, False), (1, True), (3, True)])
def test_each_voice_needs_its_region(voices: int, has_regions: bool) -> None:
    regions_PHW = torch.ones(3, HEIGHT // 8, WIDTH // 8) if has_regions else None
    with pytest.raises(MismatchError, match=f"got {voices} voices and {1 + has_regions} regions"):
        generate(REQUEST, [REFERENCE], [_speech(5)] * voices, Toy().models, regions_PHW=regions_PHW)


@pytest.mark.parametrize(("most", "num_frames"), [(1, 1), (13, 13), (20, 20), (99, 29)])
def test_a_video_may_be_cut_short(most: int, num_frames: int) -> None:
    request = replace(REQUEST, max_frames=most)
    assert _run(request, 29).shape[2] == num_frames
    assert plan_video(request, [_speech(29)]).num_frames == num_frames


def test_the_reference_cuts_to_the_last_voice() -> None:
    request = replace(REQUEST, follows_reference=True)
    first, last = _speech(22), _speech(31)
    assert plan_video(request, [first, last]).num_frames == 29  # whole chunks of the first
    assert plan_video(request, [last, first]).num_frames == 22
    assert plan_video(REQUEST, [first, last]).num_frames == 31


def test_colours_are_those_of_the_first_picture() -> None:
    drifting = _run(REQUEST, 29)
    kept = _run(replace(REQUEST, color_strength=1.0), 29)
    assert (drifting[:, :, 1:] - 0.25).abs().max() > 0.1
    torch.testing.assert_close(kept, torch.full_like(kept, 0.25), atol=1e-3, rtol=0)


def test_the_reference_draws_noise_that_it_does_not_use() -> None:
    seen: list[list[Tensor]] = []
    for follows in (False, True):
        toy = Toy()
        _run(replace(REQUEST, update="euler", follows_reference=follows), 29, toy)
        seen.append([toy.denoiser.calls[2 * chunk][0][:, :, 2:] for chunk in range(3)])
    same = [torch.equal(ours, theirs) for ours, theirs in zip(*seen, strict=True)]
    assert same == [True, True, False]


def test_the_reference_hears_the_end_of_the_voice_backwards() -> None:
    def hear_last(follows: bool) -> Tensor:
        toy = Toy()
        _run(replace(REQUEST, follows_reference=follows), 25, toy)
        return toy.adapter.windows[-1].later_FKLD[:, :, 0, 0]

    rows = torch.cat((torch.arange(25), torch.arange(24, -1, -1))) / 100
    frames_FK = 16 + torch.tensor([[4 * j - 5 + k for k in range(8)] for j in (1, 2, 3)])
    torch.testing.assert_close(hear_last(True), rows[frames_FK])
    assert not hear_last(False)[-1, 4:].any()  # silence


def test_a_reference_of_another_size_is_refused_at_once() -> None:
    with pytest.raises(MismatchError, match=r"\(1, 3, 32, 32\).*needs \(1, 3, 32, 16\)"):
        generate(REQUEST, [torch.zeros(1, 3, 32, 32)], [_speech(5)], Toy().models)


def test_text_guidance_without_a_prompt_is_refused_at_once() -> None:
    with pytest.raises(RequestError, match=r"guidance_scale 5.* without a prompt"):
        generate(replace(REQUEST, guidance_scale=5.0), [REFERENCE], [_speech(5)], Toy().models)
