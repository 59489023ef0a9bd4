"""Node: take to VIDEO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from comfy_api.latest import InputImpl, io
from torch import Tensor

from ..turbotalk_core.audio.io import open_sound
from ..turbotalk_core.geometry import count_samples
from ..turbotalk_core.sound import Sound, Span
from ..turbotalk_core.takes.take import Take
from ..turbotalk_core.video.mux import CODECS, FRAME_RATES, MAX_CRF, PIXEL_FORMATS, assemble
from .host.checks import checks_values, is_connected
from .host.convert import waveform_from_audio
from .host.folders import new_temporary_path
from .host.progress import HostProgress, check_stop
from .host.results import count_losses, remember
from .host.takes import read_take
from .sockets import CATEGORY, TakeSocket
from .widgets import find_stop, make_trim_inputs


class AssembleVideo(io.ComfyNode):
    """Node that encodes a take as an mp4."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id="TurboTalkAssembleVideo",
            display_name="TurboTalk · Assemble video",
            category=CATEGORY,
            description="Encodes a take with its original sound as an mp4. Save Video then copies "
            "the file and adds the workflow. Changing a setting here does not sample again.",
            search_aliases=["combine", "encode", "mp4", "infinitetalk"],
            inputs=[
                TakeSocket.Input("take", tooltip="From the TurboTalk sampler."),
                io.Combo.Input(
                    "codec",
                    options=list(CODECS),
                    default="h264",
                    tooltip="h264 plays everywhere; h265 makes smaller files.",
                ),
                io.Int.Input(
                    "crf",
                    default=18,
                    min=0,
                    max=MAX_CRF,
                    tooltip="Quality: 18 looks lossless, every 6 more about halve the file.",
                ),
                io.Combo.Input(
                    "pixel_format",
                    options=list(PIXEL_FORMATS),
                    default="yuv420p",
                    tooltip="yuv420p plays everywhere; yuv420p10le has finer gradients; yuv444p "
                    "keeps all colour detail.",
                    advanced=True,
                ),
                *make_trim_inputs(num_frames=0),
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="Other sound for the video, such as the voice with music. Without it "
                    "the take's own is used.",
                ),
                io.Combo.Input(
                    "fps",
                    options=list(FRAME_RATES),
                    default="25",
                    optional=True,
                    tooltip="Frames per second of the file. The take has 25; for others frames are "
                    "left out or repeated, each where its time is, and the sound stays.",
                    advanced=True,
                ),
            ],
            outputs=[io.Video.Output(display_name="video", tooltip="For Save Video.")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        """Return a number that changes when a video of this node was deleted."""
        return count_losses(cls, inputs)

    @classmethod
    @checks_values
    def execute(
        cls,
        take: Take,
        codec: str,
        crf: int,
        pixel_format: str,
        start_frame: int,
        num_frames: int,
        audio: dict[str, Any] | None = None,
        fps: str = "25",
    ) -> io.NodeOutput:
        """Encode the take."""
        stop = find_stop(take, start_frame, num_frames)
        takes_own = audio is None and not is_connected(cls, "audio")
        sound = open_sound(take.sound_file) if takes_own else waveform_from_audio(audio)
        path = new_temporary_path(".mp4")
        assemble(
            path,
            _watch(read_take(take, start_frame, stop), HostProgress(stop - start_frame)),
            _skip(sound, start_frame),
            codec=codec,
            crf=crf,
            pixel_format=pixel_format,
            fps=fps,
        )
        remember(cls, path.is_file)
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)))


def _watch(frames: Iterator[Tensor], progress: HostProgress) -> Iterator[Tensor]:
    for frames_THWC in frames:
        check_stop()
        yield frames_THWC
        progress.advance(len(frames_THWC))


def _skip(sound: Sound, num_frames: int) -> Sound | None:
    """Skip the sound of the first frames; return None if nothing is left."""
    start = count_samples(num_frames, sound.sample_rate)
    if start >= sound.num_samples:
        return None
    return Span(sound=sound, start=start, num_samples=sound.num_samples - start)
