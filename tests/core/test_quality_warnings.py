"""Quality warnings for settings that do not fit the weights, and none for good settings."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.checkpoints.inspect import inspect
from turbotalk_core.loading import EMBEDDED_MODELS, find_model_files, read_request
from turbotalk_core.quality_warnings import find_quality_warnings
from turbotalk_core.request import TalkRequest

STUDENT = {
    "kind": "student",
    "steps": 2,
    "schedule": "distilled",
    "shift": 5.0,
    "update": "renoise",
    "audio_guidance_scale": 1.0,
    "chunk_frames": 33,
}
TEACHER = {
    "kind": "teacher",
    "steps": 20,
    "schedule": "reference",
    "shift": 3.0,
    "update": "euler",
    "audio_guidance_scale": 1.5,
    "chunk_frames": 33,
}
DISTILLED = TalkRequest(
    num_inference_steps=2,
    schedule="distilled",
    shift=5.0,
    update="renoise",
    seed=0,
    height=32,
    width=32,
    chunk_frames=33,
)
MANY = replace(
    DISTILLED,
    num_inference_steps=20,
    schedule="reference",
    shift=3.0,
    update="euler",
    audio_guidance_scale=1.5,
)
FEW = {"num_inference_steps": 4}


@pytest.mark.parametrize(
    ("request_", "settings"),
    [
        (DISTILLED, STUDENT),
        (replace(DISTILLED, num_inference_steps=1), STUDENT),
        (MANY, TEACHER),
        (replace(MANY, num_inference_steps=5), TEACHER),
        (replace(MANY, shift=8.0, chunk_frames=81, audio_guidance_scale=4.0), None),
        (replace(MANY, shift=11.0, guidance_scale=5.0), {}),
        (replace(DISTILLED, schedule="reference", sigmas=(1.0, 0.5, 0.0), shift=1.0), STUDENT),
    ],
)
def test_settings_that_fit_need_no_note(
    request_: TalkRequest, settings: dict[str, Any] | None
) -> None:
    assert find_quality_warnings(request_, settings) == []


def test_an_adapter_of_the_other_kind_is_told() -> None:
    (note,) = find_quality_warnings(DISTILLED, STUDENT, adapter_settings=TEACHER)
    assert "trained with a teacher, the model is a student" in note
    assert "student's own adapter" in note
    (note,) = find_quality_warnings(MANY, TEACHER, adapter_settings={"kind": "student"})
    assert "trained with a student, the model is a teacher" in note


@pytest.mark.parametrize("adapter_settings", [None, {}, {"kind": "student"}])
def test_an_adapter_that_fits_or_says_nothing_needs_no_note(
    adapter_settings: dict[str, Any] | None,
) -> None:
    assert find_quality_warnings(DISTILLED, STUDENT, adapter_settings=adapter_settings) == []


def test_a_model_that_says_nothing_goes_with_any_adapter() -> None:
    request = replace(MANY, shift=7.0, chunk_frames=81, audio_guidance_scale=4.0)
    assert find_quality_warnings(request, {}, adapter_settings={"kind": "student"}) == []


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"num_inference_steps": 3}, "steps are 3, the student was distilled for 2"),
        ({"audio_guidance_scale": 4.0}, "audio guidance is 4, .* inside: use 1 (off)"),
        ({"guidance_scale": 5.0}, "text guidance is 5, .* inside: use 1 (off)"),
        ({"schedule": "reference"}, "the schedule is reference, .* levels of distilled alone"),
        ({"update": "euler"}, "the update is euler, the student was distilled with renoise"),
        ({"shift": 3.0}, "shift is 3, the model was trained with 5"),
        ({"chunk_frames": 81}, "chunks have 81 frames, the model was trained on 33"),
    ],
)
def test_a_student_is_narrow(changes: dict[str, Any], note: str) -> None:
    (said,) = find_quality_warnings(replace(DISTILLED, **changes), STUDENT)
    start, _, end = note.partition(" .* ")
    assert said.startswith(start)
    assert end in said


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (FEW, "steps are 4, .* or use about 20 steps"),
        ({"audio_guidance_scale": 1.0}, "audio guidance is 1 (off), .* use 1.5,"),
        ({"update": "renoise"}, "the update is renoise, which is for distilled models"),
        ({"shift": 5.0}, "shift is 5, the model was trained with 3"),
        ({"chunk_frames": 37}, "chunks have 37 frames, the model was trained on 33"),
    ],
)
def test_a_teacher_takes_its_time(changes: dict[str, Any], note: str) -> None:
    (said,) = find_quality_warnings(replace(MANY, **changes), TEACHER)
    start, _, end = note.partition(" .* ")
    assert said.startswith(start)
    assert end in said


@pytest.mark.parametrize("settings", [None, {}])
def test_a_file_without_settings_is_taken_for_infinitetalk(
    settings: dict[str, Any] | None,
) -> None:
    (said,) = find_quality_warnings(replace(MANY, **FEW), settings)
    assert "load a student or a step-distilled LoRA, or use about 40 steps" in said
    (said,) = find_quality_warnings(replace(MANY, chunk_frames=85), settings)
    assert said.startswith("chunks have 85 frames, the model was trained on 81")
    (said,) = find_quality_warnings(replace(MANY, audio_guidance_scale=1.0), settings)
    assert "use 4," in said


@pytest.mark.parametrize("settings", [None, TEACHER])
def test_a_lora_may_have_distilled_it(settings: dict[str, Any] | None) -> None:
    assert find_quality_warnings(replace(DISTILLED, shift=2.0), settings, has_lora=True) == []
    (said,) = find_quality_warnings(replace(DISTILLED, chunk_frames=85), settings, has_lora=True)
    assert said.startswith("chunks have 85 frames")


def test_no_note_hides_another() -> None:
    wrong = replace(MANY, guidance_scale=2.0, chunk_frames=81)
    assert len(find_quality_warnings(wrong, STUDENT)) == 7


@pytest.mark.weights
def test_what_ships_fits_itself() -> None:
    dit = find_model_files(EMBEDDED_MODELS).dit
    assert find_quality_warnings(read_request(dit), inspect(dit).settings) == []


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none())


@given(st.dictionaries(st.sampled_from(sorted(STUDENT)), ANYTHING), st.booleans())
def test_settings_that_are_damaged_count_as_left_out(
    damage: dict[str, Any], is_student: bool
) -> None:
    base = STUDENT if is_student else {}
    notes = find_quality_warnings(DISTILLED, base | damage, adapter_settings=damage)
    assert all(isinstance(note, str) for note in notes)


def test_a_damaged_setting_changes_nothing() -> None:
    damaged = {name: [value] for name, value in STUDENT.items()}
    assert find_quality_warnings(DISTILLED, damaged) == find_quality_warnings(DISTILLED, {})
