"""A request holds every setting, refuses bad ones and survives JSON."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.errors import GeometryError, RequestError, ScheduleError, TurboTalkError
from turbotalk_core.geometry import MAX_SIDE
from turbotalk_core.request import (
    ENCODE_MODES,
    MAX_CHARACTERS,
    MAX_CHUNK_FRAMES,
    SCHEDULES,
    UPDATES,
    TalkRequest,
    check_chunk_lengths,
)
from turbotalk_core.sampling.schedule import request_sigmas

REQUEST = TalkRequest(
    num_inference_steps=4,
    schedule="distilled",
    shift=5.0,
    update="renoise",
    seed=7,
    height=128,
    width=96,
)
SCALES = st.floats(0, 1e6)


@st.composite
def requests(draw: st.DrawFn) -> TalkRequest:
    num_new = draw(st.integers(1, 30))
    num_motion = draw(st.integers(0, 5))
    sigmas = draw(
        st.none()
        | st.lists(st.floats(1e-6, 1), min_size=1, max_size=8, unique=True).map(
            lambda levels: (*sorted(levels, reverse=True), 0.0)
        )
    )
    steps = draw(st.integers(1, 4)) if sigmas is None else len(sigmas) - 1
    return TalkRequest(
        num_inference_steps=steps,
        schedule=draw(st.sampled_from(SCHEDULES)),  # pyright: ignore[reportArgumentType]
        shift=draw(st.floats(1e-3, 100)),
        update=draw(st.sampled_from(UPDATES)),  # pyright: ignore[reportArgumentType]
        hearing=draw(st.sampled_from(ENCODE_MODES)),  # pyright: ignore[reportArgumentType]
        seed=draw(st.integers(0, 2**64 - 1)),
        height=16 * draw(st.integers(1, 100)),
        width=16 * draw(st.integers(1, 100)),
        guidance_scale=draw(SCALES),
        audio_guidance_scale=draw(SCALES),
        audio_scale=draw(SCALES),
        chunk_frames=4 * (num_motion + num_new) + 1,
        num_motion_frames=4 * num_motion + 1,
        normalizes_loudness=draw(st.booleans()),
        sigmas=sigmas,
    )


@given(request=requests())
def test_json_round_trip(request: TalkRequest) -> None:
    assert TalkRequest.from_json(request.to_json()) == request


def test_json_names_every_setting() -> None:
    assert json.loads(REQUEST.to_json()).keys() == {field.name for field in fields(TalkRequest)}


def test_settings_with_a_default_may_be_left_out_of_json() -> None:
    settings = json.loads(REQUEST.to_json())
    del settings["sigmas"], settings["chunk_frames"]
    assert TalkRequest.from_json(json.dumps(settings)) == REQUEST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "JSON list"),
        ("{}", "lacks height, num_inference_steps, schedule, seed, shift, update, width"),
        ('{"cfg": 1, "seed": 0}', "unknown settings cfg; known are num_inference_steps"),
        (REQUEST.to_json().replace('"seed": 7', '"seed": "7"'), "got seed '7'"),
        (REQUEST.to_json().replace('"shift": 5.0', '"shift": NaN'), "no JSON: it has NaN"),
        (REQUEST.to_json().replace('"shift": 5.0', '"shift": 1e999'), "no float holds"),
        (REQUEST.to_json().replace('"seed": 7', '"seed": 7, "seed": 8'), "names 'seed' twice"),
        (REQUEST.to_json().replace('"seed": 7', '"seed": ' + "9" * 5_000), "20 digits"),
        (REQUEST.to_json().replace('"seed": 7', '"seed": ' + "[" * 50_000), "nested too deeply"),
        (REQUEST.to_json().replace('"seed": 7', '"seed": [7]'), "got seed"),
        (REQUEST.to_json().replace('"seed": 7', '"seed": null'), "got seed None"),
        (" " * (MAX_CHARACTERS + 1), "got 100001 characters"),
    ],
)
def test_json_that_is_no_request_is_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TalkRequest.from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", 0),
        ("num_inference_steps", 5),
        ("num_inference_steps", 1.0),
        ("num_inference_steps", True),
        ("schedule", "karras"),
        ("update", "heun"),
        ("hearing", "windows"),
        ("shift", 0),
        ("shift", -1.0),
        ("shift", float("inf")),
        ("seed", -1),
        ("seed", 2**64),
        ("height", 0),
        ("width", 128.0),
        ("guidance_scale", -0.1),
        ("audio_guidance_scale", float("nan")),
        ("audio_scale", "1"),
        ("chunk_frames", 80),
        ("chunk_frames", MAX_CHUNK_FRAMES + 4),
        ("shift", 10**400),
        ("shift", 5e-324),
        ("shift", 1e7),
        ("guidance_scale", 10**400),
        ("num_motion_frames", 8),
        ("num_motion_frames", 81),
        ("normalizes_loudness", 1),
        ("sigmas", (1.0, 0.0)),
        ("uses_apg", 1),
        ("anchors_chunks", 1),
        ("color_strength", -0.1),
        ("color_strength", 1.1),
        ("max_frames", 0),
        ("max_frames", 12.0),
        ("follows_reference", "yes"),
        ("teacache_threshold", -0.1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        replace(REQUEST, **{name: value})
    told = str(caught.value)
    assert name in told or name.replace("num_", "").replace("_", " ") in told
    assert "use " in told or "choose " in told or "must " in told or "give " in told


@pytest.mark.parametrize("height", [100, MAX_SIDE + 16, 16 * 10**400])
def test_a_size_off_the_grid_is_refused(height: int) -> None:
    with pytest.raises(GeometryError, match=f"height {str(height)[:9]}"):
        replace(REQUEST, height=height)


@pytest.mark.parametrize(
    "sigmas",
    [
        (1.0, 10**400, 0.0),
        (0.0,),
        (1.0, 0.5),
        (0.5, 1.0, 0.0),
        (1.0, 1.0, 0.0),
        (1.5, 0.0),
        (1.0, "a"),
        1.0,
        (),
    ],
)
def test_sigmas_that_cannot_be_sampled_are_refused(sigmas: Any) -> None:
    with pytest.raises(ScheduleError, match="got sigmas"):
        replace(REQUEST, sigmas=sigmas)


def test_own_sigmas_may_have_more_steps_than_the_schedule() -> None:
    sigmas = tuple(1 - i / 8 for i in range(9))
    assert replace(REQUEST, num_inference_steps=8, sigmas=sigmas).sigmas == sigmas


def test_the_reference_schedule_takes_many_steps() -> None:
    assert replace(REQUEST, schedule="reference", num_inference_steps=40).num_inference_steps == 40


@given(chunk_frames=st.integers(-5, 100), num_motion_frames=st.integers(-5, 100))
def test_chunk_lengths_are_taken_exactly_when_they_tile(
    chunk_frames: int, num_motion_frames: int
) -> None:
    tiles = chunk_frames % 4 == 1 and num_motion_frames % 4 == 1
    tiles = tiles and 1 <= num_motion_frames < chunk_frames
    try:
        check_chunk_lengths(chunk_frames, num_motion_frames)
    except TurboTalkError:
        assert not tiles
    else:
        assert tiles


SETTINGS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(
    st.dictionaries(
        st.sampled_from([field.name for field in fields(TalkRequest)]), SETTINGS, max_size=4
    )
)
def test_any_settings_make_a_request_or_are_refused(changes: dict[str, Any]) -> None:
    text = json.dumps(json.loads(REQUEST.to_json()) | changes)
    try:
        request = TalkRequest.from_json(text)
    except TurboTalkError:
        return
    assert TalkRequest.from_json(request.to_json()) == request
    sigmas = request_sigmas(request)
    assert sigmas.isfinite().all()
    assert sigmas[-1] == 0


@given(st.text())
def test_any_text_is_a_request_or_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        TalkRequest.from_json(text)
