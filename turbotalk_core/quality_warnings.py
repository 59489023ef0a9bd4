"""Quality warnings about settings of a request that do not fit the weights.

They are derived from the request and the metadata of the transformer's and the adapter's file. They
forbid nothing, as metadata may be incomplete. Separate because the command line and the nodes show
the same warnings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .request import CHUNK_FRAMES, MAX_DISTILLED_STEPS, SCHEDULES, UPDATES, TalkRequest
from .safe_io.json import is_number

STUDENT, TEACHER = "student", "teacher"
MANY_STEPS = 40  # InfiniteTalk: the defaults of its command line
AUDIO_GUIDANCE = 4.0


def find_quality_warnings(
    request: TalkRequest,
    settings: Mapping[str, Any] | None,
    has_lora: bool = False,
    adapter_settings: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return warnings about settings of a request that do not fit the weights.

    Args:
        request: as it will be sampled.
        settings: ``CheckpointInfo.settings`` of the video transformer's file; None
            or empty for a file without, which is taken for InfiniteTalk's own. What is no number
            where a number is needed, or an unknown word, counts as left out.
        has_lora: whether a LoRA is merged in. It may distil steps and guidance, so that nothing is
            said about them.
        adapter_settings: as ``settings``, of the audio adapter's file.

    Returns:
        One sentence per setting that does not fit, with the value to use.
    """
    settings = _keep_valid(settings or {})
    adapter_settings = _keep_valid(adapter_settings or {})
    is_student = settings.get("kind") == STUDENT
    warnings = _find_student_warnings(request, settings) if is_student else []
    if not is_student and not has_lora:
        warnings = _find_teacher_warnings(request, settings)
    shift = settings.get("shift", request.shift)
    if request.sigmas is None and request.shift != shift and not has_lora:
        warnings.append(
            f"shift is {request.shift:g}, the model was trained with {shift:g}: use that"
        )
    longest = settings.get("chunk_frames", CHUNK_FRAMES)
    if request.chunk_frames > longest:
        warnings.append(
            f"chunks have {request.chunk_frames} frames, the model was trained on {longest}: "
            f"towards their ends faces may change, so use at most {longest}"
        )
    kind, adapter_kind = settings.get("kind"), adapter_settings.get("kind")
    if kind is not None and adapter_kind is not None and kind != adapter_kind:
        warnings.append(
            f"the audio adapter was trained with a {adapter_kind}, the model is a {kind}: lips "
            f"may miss the voice, so load the {kind}'s own adapter"
        )
    return warnings


def _keep_valid(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keep valid values: warnings are shown to users and must not repeat a file's own text."""
    words = {"kind": (STUDENT, TEACHER), "schedule": SCHEDULES, "update": UPDATES}
    return {
        name: value
        for name, value in settings.items()
        if (value in words[name] if name in words else is_number(value))
    }


def _find_student_warnings(request: TalkRequest, settings: Mapping[str, Any]) -> list[str]:
    warnings = []
    num_steps = settings.get("steps", MAX_DISTILLED_STEPS)
    if request.num_inference_steps > num_steps:
        warnings.append(
            f"steps are {request.num_inference_steps}, the student was distilled for {num_steps}: "
            "more make it slower, not better"
        )
    for name, scale, shipped in (
        ("text guidance", request.guidance_scale, 1.0),
        ("audio guidance", request.audio_guidance_scale, settings.get("audio_guidance_scale", 1.0)),
    ):
        if scale != shipped:
            warnings.append(
                f"{name} is {scale:g}, the student has its teacher's guidance inside: use "
                f"{shipped:g}" + " (off)" * (shipped == 1)
            )
    schedule = settings.get("schedule", "distilled")
    if request.sigmas is None and request.schedule != schedule:
        warnings.append(
            f"the schedule is {request.schedule}, the student knows the noise levels of {schedule} "
            "alone: use that"
        )
    update = settings.get("update", "renoise")
    if request.update != update:
        warnings.append(f"the update is {request.update}, the student was distilled with {update}")
    return warnings


def _find_teacher_warnings(request: TalkRequest, settings: Mapping[str, Any]) -> list[str]:
    num_steps = settings.get("steps", MANY_STEPS)
    if request.num_inference_steps <= MAX_DISTILLED_STEPS:
        return [
            f"steps are {request.num_inference_steps}, and the model is not known to be distilled: "
            f"load a student or a step-distilled LoRA, or use about {num_steps} steps"
        ]
    warnings = []
    scale = settings.get("audio_guidance_scale", AUDIO_GUIDANCE)
    if request.audio_guidance_scale == 1 and scale != 1:
        warnings.append(
            f"audio guidance is 1 (off), and the model is not distilled: use {scale:g}, or lips "
            "follow the voice weakly"
        )
    if request.update == "renoise":
        warnings.append(
            "the update is renoise, which is for distilled models: use euler, or load a student or "
            "a step-distilled LoRA"
        )
    return warnings
