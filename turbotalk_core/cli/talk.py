"""Command ``talk``, which makes a talking video: its arguments and its call of the pipeline.

Separate from the other commands because no other one reads files of every kind.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..audio.conversation import LONE_SPEAKER, encode_conversation, mix_voices
from ..audio.io import open_sound
from ..checkpoints.audio_encoder import load_audio_encoder
from ..conditioning.reference import NoPictureError, read_image
from ..conditioning.regions import parse_box
from ..errors import ImageError, OutputError
from ..geometry import FPS, count_frames, fit_size
from ..loading import (
    AUDIO_ENCODER,
    EMBEDDED_MODELS,
    VAE,
    ModelFiles,
    Models,
    compile_networks,
    find_model_files,
    fingerprint_weights,
    load_models,
    read_request,
)
from ..quality_warnings import find_quality_warnings
from ..render import Rendering, find_regions, render_video
from ..request import ENCODE_MODES, SCHEDULES, UPDATES, TalkRequest
from ..safe_io.paths import show
from ..sound import Sound, cut
from ..takes.take import Take, delete_take, lock_take
from ..types import Speaker
from ..video.mux import FRAME_RATES, open_mp4
from ..video.reader import VideoFrames
from .arguments import (
    DTYPES,
    find_device,
    parse_device,
    parse_number,
    parse_seconds,
    parse_size,
    parse_text,
    parse_threads,
    parse_whole,
)
from .console import MESSAGES, note, say
from .output import check_output, take_folder

TEACACHE = 0.2  # InfiniteTalk's threshold
SILENT = "-"
AUTO = "auto"
# Arguments by the settings of the request that they set. Those without a value leave it as shipped.
_SETTINGS = {
    "num_inference_steps": "steps",
    "schedule": "schedule",
    "shift": "shift",
    "update": "update",
    "seed": "seed",
    "guidance_scale": "text_guidance",
    "audio_guidance_scale": "audio_guidance",
    "audio_scale": "audio_scale",
    "chunk_frames": "chunk_frames",
    "num_motion_frames": "motion_frames",
    "normalizes_loudness": "loudness",
    "uses_apg": "apg",
    "color_strength": "color_strength",
    "max_frames": "max_seconds",
    "teacache_threshold": "teacache",
    "hearing": "hearing",
    "anchors_chunks": "anchor",
}
_OPTIONS = {
    **{setting: f"--{name.replace('_', '-')}" for setting, name in _SETTINGS.items()},
    "crf": "--crf",
}


def talk(arguments: argparse.Namespace) -> None:
    """Make a talking video.

    Args:
        arguments: parsed arguments of ``add_talk``.
    """
    started = time.monotonic()
    out = check_output(arguments.out, _list_inputs(arguments))
    folder = take_folder(out)
    # Before all work, so that a second run of the same command touches nothing of the first.
    with lock_take(folder):
        num_frames = _make_video(arguments, out, folder)
    # Not earlier: now the video is complete, and what fails here is no reason for an error.
    with suppress(OSError):
        delete_take(folder)
    taken = time.monotonic() - started
    seconds = float(num_frames / FRAME_RATES[arguments.fps])
    with suppress(OSError):
        say(
            f"{show(str(arguments.out))}: {num_frames} frames, {seconds:.2f} s, made in "
            f"{taken:.1f} s\n"
        )


def _make_video(arguments: argparse.Namespace, out: Path, folder: Path) -> int:
    """Make a video and its take in a folder that is locked; return the number of frames."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    files = find_model_files(
        arguments.models,
        dit=arguments.dit,
        adapter=arguments.adapter,
        audio_encoder=arguments.encoder,
        vae=arguments.vae,
        text_encoder=arguments.text_encoder,
        tokenizer=arguments.tokenizer,
        image_encoder=arguments.image_encoder,
        loras=arguments.lora,
        num_steps=arguments.steps,
    )
    pictures = _open_pictures(arguments.image)
    request = _make_request(arguments, read_request(files.inspect(files.dit)), pictures[0])
    speakers = _list_speakers(arguments)
    _print_quality_warnings(request, files, len(speakers))
    waveform = mix_voices(speakers)
    # Opened first, so that settings of the file are refused before networks are loaded.
    with open_mp4(
        out,
        waveform,
        crf=arguments.crf,
        fps=arguments.fps,
        metadata={"turbotalk": request.to_json()},
        # In the take, so that a killed program leaves no other file. A take may be a link to
        # another disk, from which no file can be moved at once.
        part_folder=folder if folder.stat().st_dev == out.parent.stat().st_dev else None,
    ) as video:
        find_regions(request, pictures[0], speakers)  # impossible regions are refused early, too
        conversation = encode_conversation(
            speakers,
            load_audio_encoder(files.audio_encoder),
            normalizes_loudness=request.normalizes_loudness,
            hearing=request.hearing,
            mix=waveform,
            on_note=note,
        )
        models, weights = _load_networks(request, files, arguments)
        with (
            _notes_kept_frames(folder),
            render_video(
                request, pictures, conversation, models, folder, weights=weights, is_locked=True
            ) as run,
            _report_progress(run) as bar,
        ):
            video.write(run.frames(bar))
    return video.num_frames


def _list_inputs(arguments: argparse.Namespace) -> list[Path]:
    """Return the pictures and sounds that the command reads, which the video must not replace."""
    inputs = [arguments.image]
    if arguments.audio is not None:
        inputs.append(arguments.audio)
    for _, audio, region in arguments.speaker or ():
        inputs += [Path(audio), Path(region)]
    return inputs


@contextmanager
def _notes_kept_frames(folder: Path) -> Iterator[None]:
    """Print what is kept if the block fails or is interrupted."""
    try:
        yield
    except BaseException:
        with suppress(OutputError):
            take = Take.open(folder)
            note(
                f"{take.num_frames} of {take.length} frames are kept in {show(str(folder))}; the "
                "same command goes on after them"
            )
        raise


class _Bar:
    """Progress bar over the units of ``count_work``."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def advance(self, units: int = 1, preview_HWC: Tensor | None = None) -> None:
        self._bar.update(units)


def _open_pictures(path: Path) -> Sequence[Tensor]:
    """Open a file as a picture, or else as a video."""
    try:
        return [read_image(path)]
    except NoPictureError as no_picture:
        try:
            return VideoFrames(path)
        except ImageError as no_video:
            raise ImageError(f"{no_picture}, or a video ({no_video})") from no_video


def _make_request(
    arguments: argparse.Namespace, shipped: TalkRequest, picture_HWC: Tensor
) -> TalkRequest:
    if arguments.size == "auto":
        height, width = fit_size(*picture_HWC.shape[:2], area=shipped.height * shipped.width)
    else:
        width, height = arguments.size
    chosen = {setting: getattr(arguments, name) for setting, name in _SETTINGS.items()}
    return replace(
        shipped,
        height=height,
        width=width,
        **{setting: value for setting, value in chosen.items() if value is not None},
    )


def _list_speakers(arguments: argparse.Namespace) -> list[Speaker]:
    if arguments.audio is not None:
        return [Speaker(name=LONE_SPEAKER, waveform=_open_voice(arguments.audio, arguments))]
    return [
        Speaker(
            name=name,
            waveform=None if audio == SILENT else _open_voice(audio, arguments),
            follows=arguments.turns,
            region=_read_region(region),
        )
        for name, audio, region in arguments.speaker
    ]


def _open_voice(path: str | Path, arguments: argparse.Namespace) -> Sound:
    sound = open_sound(path, arguments.end, on_note=note)
    return cut(sound, arguments.start, arguments.end)


def _read_region(text: str) -> Tensor | tuple[int, int, int, int] | None:
    if text == AUTO:
        return None
    box = parse_box(text)
    if box is not None:
        return box
    try:
        pixels_HWC = read_image(text)
    except ImageError as error:
        raise ImageError(
            f"got the region {text}; give x,y,width,height in pixels of the image, a picture of "
            f"the same size that is white inside, or {AUTO}: {error}"
        ) from error
    mask_HW = pixels_HWC[..., :3].mean(2)
    return mask_HW * pixels_HWC[..., 3] if pixels_HWC.shape[2] == 4 else mask_HW


def _print_quality_warnings(request: TalkRequest, files: ModelFiles, num_speakers: int) -> None:
    """Print quality warnings, before the long computation."""
    info = files.inspect(files.dit)
    adapter = files.inspect(files.adapter)
    messages = find_quality_warnings(request, info.settings, bool(files.loras), adapter.settings)
    if info.sizes.get("image width") and files.image_encoder is None:
        messages.append(
            f"{files.dit.name} has an image branch, which sees nothing without --image-encoder"
        )
    fit = adapter.speakers or ""
    if num_speakers > 1 and fit.startswith("one") and "perhaps" not in fit:
        messages.append(f"{num_speakers} speakers, and {files.adapter.name} is for {fit}")
    for message in messages:
        note(message)


def _load_networks(
    request: TalkRequest, files: ModelFiles, arguments: argparse.Namespace
) -> tuple[Models, str]:
    """Load the networks; return them and the fingerprint of their weights for the cache key."""
    models = load_models(
        files,
        arguments.device,
        request.audio_scale,
        DTYPES[arguments.dtype],
        request.teacache_threshold,
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
    )
    weights = fingerprint_weights(models)
    if arguments.compile:
        compile_networks(models, arguments.device)
        weights += ", compiled"  # equal up to rounding only, so frames differ
    return models, weights


@contextmanager
def _report_progress(run: Rendering) -> Iterator[_Bar]:
    """Report whether an earlier take is continued, and show the progress of this run."""
    for change in run.changes:
        note(f"{run.take.folder} is begun anew: {change}")
    if run.num_finished:
        note(
            f"goes on with {show(str(run.take.folder))}, of which {run.num_finished} of "
            f"{run.num_chunks} chunks are finished"
        )
    with tqdm(
        total=run.num_units,
        unit="call",
        dynamic_ncols=True,
        disable=run.found.is_whole,
        file=MESSAGES,
    ) as bar:
        yield _Bar(bar)


def add_talk(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``talk``.

    Args:
        parser: parser of this command.
    """
    parser.set_defaults(command=talk, options=_OPTIONS)
    parser.add_argument("--image", type=Path, required=True, help="the portrait; or a video to dub")
    voices = parser.add_mutually_exclusive_group(required=True)
    voices.add_argument("--audio", type=Path, help="the voice: sound or video file")
    voices.add_argument(
        "--speaker",
        nargs=3,
        action="append",
        metavar=("NAME", "AUDIO", "REGION"),
        help=f"one of several, again for each: the voice, or {SILENT} for a silent bystander; and "
        "x,y,width,height in pixels of the image, or a picture of its size that is white where the "
        f"speaker is, or {AUTO}, which is half of the image for each of two",
    )
    parser.add_argument(
        "--turns",
        action="store_true",
        help="each speaker begins when the one before has ended (default: all at the start)",
    )
    parser.add_argument(
        "--start",
        type=parse_seconds,
        default=Fraction(0),
        metavar="SECONDS",
        help="of each sound file, leave out what lies before (0)",
    )
    parser.add_argument(
        "--end",
        type=parse_seconds,
        metavar="SECONDS",
        help="of each sound file, leave out what lies after",
    )
    parser.add_argument(
        "--prompt",
        type=parse_text,
        help='what the video shows, or "0-4s: he smiles | 4-9s: he frowns"; needs --text-encoder',
    )
    parser.add_argument(
        "--negative-prompt", type=parse_text, help="what --text-guidance leads away from"
    )
    parser.add_argument("--out", type=Path, required=True, help="the .mp4 to make")
    parser.add_argument("--crf", type=parse_whole, default=18, help="H.264 quality, 0 (best) to 51")
    parser.add_argument(
        "--fps",
        choices=FRAME_RATES,
        default="25",
        help="of the .mp4 (%(default)s); frames are left out or repeated, the sound stays",
    )
    parser.add_argument("--device", type=parse_device, default=find_device(), help="%(default)s")
    parser.add_argument("--threads", type=parse_threads, help="CPU threads of the networks")
    _add_models(parser.add_argument_group("models", "file names in the sub-folders of --models"))
    _add_settings(
        parser.add_argument_group(
            "settings", "each defaults to what the video transformer ships with"
        )
    )


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--models", type=Path, default=EMBEDDED_MODELS, metavar="FOLDER")
    group.add_argument("--dit", help="video transformer; default: the embedded one for --steps")
    group.add_argument(
        "--adapter", help="audio adapter; default: the one inside --dit, else the embedded one"
    )
    group.add_argument("--encoder", default=AUDIO_ENCODER, help="audio encoder (%(default)s)")
    group.add_argument("--vae", default=VAE, help="video VAE (%(default)s)")
    group.add_argument("--text-encoder", metavar="FILE", help="umT5, for --prompt")
    group.add_argument(
        "--tokenizer", metavar="FILE", help="its spiece.model; default: the one inside its file"
    )
    group.add_argument(
        "--image-encoder", metavar="FILE", help="CLIP, for a transformer with an image branch"
    )
    group.add_argument(
        "--lora",
        type=_parse_lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="merged into the transformer; again for each",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of transformer, adapter and text encoder in memory, whatever the files hold "
        "(%(default)s)",
    )

    group.add_argument(
        "--compile",
        action="store_true",
        help="let torch compile transformer and VAE: later chunks are quicker, the first takes a "
        "minute or more longer; the same up to rounding",
    )


def _add_settings(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", type=parse_whole, default=0, help="of all noise (0)")
    group.add_argument(
        "--size", type=parse_size, default="auto", metavar="WxH", help="default: from the image"
    )
    group.add_argument("--steps", type=parse_whole, help="network evaluations per chunk")
    group.add_argument("--schedule", choices=SCHEDULES)
    group.add_argument("--shift", type=parse_number, help="of the schedule")
    group.add_argument("--update", choices=UPDATES, help="from one noise level to the next")
    group.add_argument(
        "--audio-guidance", type=parse_number, help="push towards the voice, 1 is off"
    )
    group.add_argument("--audio-scale", type=parse_number, default=1.0, help="adapter strength (1)")
    group.add_argument("--chunk-frames", type=parse_whole, help="4n + 1")
    group.add_argument("--motion-frames", type=parse_whole, help="4m + 1")
    group.add_argument(
        "--anchor",
        action=argparse.BooleanOptionalAction,
        help="show each later chunk the image in the place of its first motion frame, so that "
        "looks do not drift",
    )
    group.add_argument(
        "--loudness",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="bring the voice to -23 LUFS before it is heard; the video keeps the original",
    )
    group.add_argument(
        "--hearing",
        choices=ENCODE_MODES,
        default="auto",
        help="let the audio encoder hear a voice whole, which takes memory in proportion to its "
        "length, or in sections; auto: whole up to five minutes (%(default)s)",
    )
    group.add_argument(
        "--text-guidance",
        type=parse_number,
        default=1.0,
        help="push towards the prompt, 1 is off (1)",
    )
    group.add_argument(
        "--apg", action="store_true", help="adaptive projected guidance, for strong guidance"
    )
    group.add_argument(
        "--color-strength",
        type=parse_number,
        default=0.0,
        help="bring all frames to the colours of the image, 0 (off) to 1",
    )
    group.add_argument("--max-seconds", type=_parse_length, metavar="SECONDS", help="longest video")
    group.add_argument(
        "--teacache",
        type=parse_number,
        nargs="?",
        const=TEACACHE,
        metavar="THRESHOLD",
        help=f"leave out network blocks that would change little, for many steps ({TEACACHE})",
    )


def _parse_lora(text: str) -> tuple[str, float]:
    name, colon, strength = text.rpartition(":")
    try:
        return (name, float(strength)) if colon else (text, 1.0)
    except ValueError:  # a colon in the name
        return text, 1.0


def _parse_length(text: str) -> int:
    """Convert seconds to whole frames, at least one."""
    seconds = parse_seconds(text)
    num_frames = count_frames(seconds.numerator, seconds.denominator)
    if num_frames < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; the shortest video lasts {1 / FPS} s")
    return num_frames
