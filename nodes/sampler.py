"""Node: a portrait, or a video to dub, and a speech to a take, chunk by chunk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from logging import getLogger
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..turbotalk_core.errors import ScheduleError
from ..turbotalk_core.geometry import FPS, SIZE_MULTIPLE, TEMPORAL_STRIDE, fit_size
from ..turbotalk_core.pipeline import Models
from ..turbotalk_core.render import render_video
from ..turbotalk_core.request import (
    CHUNK_FRAMES,
    MAX_DISTILLED_STEPS,
    MAX_STEPS,
    NUM_MOTION_FRAMES,
    UPDATES,
    TalkRequest,
    Update,
)
from ..turbotalk_core.takes.take import Take
from ..turbotalk_core.types import Conversation
from .host.audio_adapter import HostAdapter, find_audio_adapter
from .host.checks import checks_values
from .host.convert import describe_pictures, open_pictures
from .host.denoiser import HostDenoiser
from .host.encoders import make_image_encoder, read_texts
from .host.messages import read_shipped, show_quality_warnings
from .host.progress import HostProgress, check_stop
from .host.results import count_losses, remember
from .host.takes import (
    GRAPH_FIELD,
    SAMPLER_ID,
    choose_folder,
    describe_graph,
    describe_samplers,
    fingerprint_networks,
    is_unchanged,
)
from .host.vae import HostVAE
from .sockets import CATEGORY, SpeechSocket, TakeSocket

_log = getLogger(__name__)

SIZES_FROM = ("image", "custom")
ANCHORS = ("auto", "on", "off")


class Sampler(io.ComfyNode):
    """Node that samples a take."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id=SAMPLER_ID,
            display_name="TurboTalk · Sampler (1-4 steps)",
            category=CATEGORY,
            description="Makes the portrait say the speech. The clip grows chunk by chunk in a "
            "lossless file on disk, so memory does not grow with its length. Stopped in the middle "
            "by whatever cause, the same work queued again goes on after the last whole chunk.",
            search_aliases=["infinitetalk", "talking head", "avatar", "lip sync", "ksampler"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="Wan 2.1 image-to-video that hears: from Apply audio adapter."
                ),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE, from the host's Load VAE."),
                io.MultiType.Input(
                    "reference_image",
                    types=[io.Image, io.Video],
                    tooltip="One portrait, or a video to dub: a VIDEO of any frame rate, or its "
                    "frames as images, 25 a second. It is resized to cover the video and cut at "
                    "the centre; transparency becomes white.",
                ),
                SpeechSocket.Input(
                    "speech",
                    tooltip="From Encode speech, or Encode speakers for several; sets the length.",
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=MAX_STEPS,
                    tooltip=f"Network calls per chunk, 1 to {MAX_DISTILLED_STEPS}, for a distilled "
                    "model. With sigmas connected these count instead.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Of all noise. The same seed and inputs give the same frames.",
                ),
                io.Combo.Input(
                    "size_from",
                    options=list(SIZES_FROM),
                    default="image",
                    tooltip="image: the portrait's shape, with as many pixels as width x height. "
                    "custom: exactly width x height.",
                ),
                io.Int.Input(
                    "width",
                    default=640,
                    min=SIZE_MULTIPLE,
                    max=4096,
                    step=SIZE_MULTIPLE,
                    tooltip=f"Pixels, a multiple of {SIZE_MULTIPLE}.",
                ),
                io.Int.Input(
                    "height",
                    default=640,
                    min=SIZE_MULTIPLE,
                    max=4096,
                    step=SIZE_MULTIPLE,
                    tooltip=f"Pixels, a multiple of {SIZE_MULTIPLE}.",
                ),
                io.Float.Input(
                    "audio_guidance",
                    default=1.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="Push towards the voice; 1 is off. Anything else doubles the work. A "
                    "distilled model has it built in; the original one likes 2 to 4.",
                ),
                io.Float.Input(
                    "text_guidance",
                    default=1.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="Push towards the positive prompt; 1 is off. Anything else triples the "
                    "work and needs a positive prompt.",
                    advanced=True,
                ),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.05,
                    max=100.0,
                    step=0.05,
                    tooltip="Of the noise levels: the one that the model was distilled with. With "
                    "sigmas connected these count instead.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "update",
                    options=list(UPDATES),
                    default="renoise",
                    tooltip="renoise: predict the clean video, then add fresh noise; for distilled "
                    "models. euler: follow the velocity; for the original model.",
                    advanced=True,
                ),
                io.Int.Input(
                    "chunk_frames",
                    default=CHUNK_FRAMES,
                    min=TEMPORAL_STRIDE + 1,
                    max=1001,
                    step=TEMPORAL_STRIDE,
                    tooltip="Video frames made at a time, 4n + 1. Fewer need less memory.",
                    advanced=True,
                ),
                io.Int.Input(
                    "motion_frames",
                    default=NUM_MOTION_FRAMES,
                    min=1,
                    max=997,
                    step=TEMPORAL_STRIDE,
                    tooltip="Last frames of a chunk that begin the next one, 4m + 1, fewer than "
                    "chunk_frames.",
                    advanced=True,
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The prompt, or several from Prompt schedule. Without it the model "
                    "gets no text.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What text guidance pushes away from; used with text_guidance only.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="The portrait as CLIP sees it, for models with an image branch, such "
                    "as Wan2.1-I2V-14B. The embedded models have none.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels from Schedule or any scheduler of the host, instead of "
                    "steps and shift.",
                ),
                io.Boolean.Input(
                    "apg",
                    default=False,
                    optional=True,
                    tooltip="Adaptive projected guidance: strong guidance keeps its colours. Does "
                    "nothing where both guidances are 1.",
                    advanced=True,
                ),
                io.Float.Input(
                    "color_strength",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How far all frames take on the colours of the first picture; 0 is "
                    "off. Against colours that drift in long videos of the original model.",
                    advanced=True,
                ),
                io.Float.Input(
                    "max_seconds",
                    default=0.0,
                    min=0.0,
                    max=86_400.0,
                    step=0.04,
                    optional=True,
                    tooltip="Stop after this much of the voice, for a quick look; 0 is all of it.",
                    advanced=True,
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Instead of clip_vision_output: looks at the portrait by itself, or at "
                    "each frame of a video to dub. For models with an image branch.",
                ),
                io.Combo.Input(
                    "anchor",
                    options=list(ANCHORS),
                    default="auto",
                    optional=True,
                    tooltip="Show each later chunk the portrait in the place of its first motion "
                    "frame, so that looks do not drift in long videos. auto: where the model's "
                    "file says that it was measured so. With other models heads may leap.",
                    advanced=True,
                ),
            ],
            outputs=[
                TakeSocket.Output(
                    display_name="take",
                    tooltip="The clip on disk, lossless, with its sound, for Assemble video and "
                    "Take frames.",
                )
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @staticmethod
    def find_conflicts(inputs: Mapping[str, Any]) -> dict[str, str]:
        """Find what does not fit together; see ``checks.find_faults``."""
        conflicts = {}
        steps, guidance = inputs.get("steps"), inputs.get("text_guidance")
        if isinstance(steps, int) and steps > MAX_DISTILLED_STEPS and inputs.get("sigmas") is None:
            conflicts["steps"] = (
                f"got {steps} steps; use 1 to {MAX_DISTILLED_STEPS}, or connect sigmas from "
                "Schedule, kind reference"
            )
        if isinstance(guidance, int | float) and guidance != 1 and inputs.get("positive") is None:
            conflicts["text_guidance"] = (
                f"got text_guidance {guidance} without a prompt; connect positive, or use 1 (off)"
            )
        chunk, motion = inputs.get("chunk_frames"), inputs.get("motion_frames")
        if isinstance(chunk, int) and isinstance(motion, int) and motion >= chunk:
            conflicts["motion_frames"] = (
                f"got {motion} motion frames in chunks of {chunk}; a chunk must make new frames "
                "too, so use fewer motion_frames or more chunk_frames"
            )
        return conflicts

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        """Return a number that changes when a take of this node was deleted or damaged."""
        return count_losses(cls, inputs)

    @classmethod
    @checks_values
    def execute(
        cls,
        model: ModelPatcher,
        vae: VAE,
        reference_image: Tensor | io.Video.Type | None,
        speech: Conversation,
        steps: int,
        seed: int,
        size_from: str,
        width: int,
        height: int,
        audio_guidance: float,
        text_guidance: float,
        shift: float,
        update: Update,
        chunk_frames: int,
        motion_frames: int,
        positive: list[Any] | None = None,
        negative: list[Any] | None = None,
        clip_vision_output: Any = None,
        sigmas: Tensor | None = None,
        apg: bool = False,
        color_strength: float = 0.0,
        max_seconds: float = 0.0,
        clip_vision: Any = None,
        anchor: str = "auto",
    ) -> io.NodeOutput:
        """Sample the take."""
        model_patch = find_audio_adapter(model)
        shipped = read_shipped(model, model_patch)
        graph = describe_graph(cls.hidden.dynprompt, cls.hidden.unique_id)
        levels = None if sigmas is None else _list_levels(sigmas)
        with open_pictures(reference_image) as pictures:
            if size_from == "image":
                height, width = fit_size(*pictures[0].shape[:2], area=height * width)
            request = TalkRequest(
                num_inference_steps=steps if levels is None else len(levels) - 1,
                schedule="distilled",
                shift=shift,
                update=update,
                seed=seed,
                height=height,
                width=width,
                guidance_scale=text_guidance,
                audio_guidance_scale=audio_guidance,
                chunk_frames=chunk_frames,
                num_motion_frames=motion_frames,
                sigmas=levels,
                uses_apg=apg,
                color_strength=color_strength,
                max_frames=max(1, round(FPS * max_seconds)) if max_seconds else None,
                anchors_chunks=shipped.anchors_chunks if anchor == "auto" else anchor == "on",
            )
            show_quality_warnings(
                shipped, request, cls.hidden.unique_id, note=describe_pictures(reference_image)
            )
            image_embeds_BND, image_encoder = make_image_encoder(
                model, clip_vision_output, clip_vision
            )
            with HostDenoiser.of_request(model, request) as denoiser:
                text_BND, later_texts = read_texts(positive)
                models = Models(
                    vae=HostVAE(vae),
                    denoiser=denoiser,
                    adapter=HostAdapter(model_patch),
                    text_BND=text_BND,
                    null_text_BND=read_texts(negative)[0],
                    image_embeds_BND=image_embeds_BND,
                    image_encoder=image_encoder,
                    later_texts=later_texts,
                )
                networks = (
                    model.model.diffusion_model,
                    model_patch.model,
                    vae.first_stage_model,
                )
                weights = fingerprint_networks(networks)
                in_use = describe_samplers(cls.hidden.dynprompt)
                take = _record(request, pictures, speech, models, weights, graph, in_use)
        remember(cls, partial(is_unchanged, take))
        return io.NodeOutput(take)


def _list_levels(sigmas: Tensor) -> tuple[float, ...]:
    """Return the values of SIGMAS; the core checks them."""
    if sigmas.ndim != 1 or not 2 <= len(sigmas) <= MAX_STEPS + 1:
        raise ScheduleError(
            f"got sigmas of shape {tuple(sigmas.shape)}; connect a list of 2 to {MAX_STEPS + 1} "
            "noise levels, from 1 down to 0, such as that of Schedule"
        )
    return tuple(sigmas.tolist())


def _record(
    request: TalkRequest,
    pictures: Sequence[Tensor],
    speech: Conversation,
    models: Models,
    weights: str,
    graph: str,
    in_use: Collection[str],
) -> Take:
    """Generate a take, or continue an unfinished one with the same cache key."""
    with render_video(
        request,
        pictures,
        speech,
        models,
        partial(choose_folder, graph=graph, in_use=in_use),
        weights=weights,
        others={GRAPH_FIELD: graph},
    ) as run:
        name = run.take.folder.name
        for change in run.changes:
            _log.warning("the take %s is begun anew: %s", name, change)
        if run.num_finished:
            _log.info(
                "goes on with the take %s, of which %d of %d chunks are finished",
                name,
                run.num_finished,
                run.num_chunks,
            )
        if not run.found.is_whole:
            for _ in run.generate(HostProgress(run.num_units), check_stop):
                pass
    return run.take
