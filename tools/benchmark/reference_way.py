"""The order of work of the reference, with the same networks, as an arm of the comparison.

Axes: B batch, C channels, T video frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbotalk_core.benchmark.report import NUM_CHUNKS, make_inputs, plain_request, read_sizes
from turbotalk_core.benchmark.timing import ChunkTimer, VideoTiming, time_chunks
from turbotalk_core.conditioning.reference import prepare_reference, reference_clip
from turbotalk_core.loading import EMBEDDED_MODELS, find_model_files, load_models, read_request
from turbotalk_core.pipeline import Models, generate, plan_video
from turbotalk_core.protocols import VideoVAE
from turbotalk_core.request import TalkRequest
from turbotalk_core.types import Conversation
from turbotalk_core.video.mux import assemble, quantize_frames

_BATCH = 16  # frames that are encoded at a time


def time_reference(
    models: Models,
    request: TalkRequest,
    conversation: Conversation,
    picture_HWC: Tensor,
    device: torch.device,
) -> VideoTiming:
    """Make the video of ``timing.time_video`` in the order of the reference, and delete it.

    Args:
        models: networks and their conditions.
        request: settings that give two chunks or more.
        conversation: of one speaker.
        picture_HWC: portrait at the request's size, in [0, 1].
        device: device of the networks.

    Returns:
        Its seconds. The picture and all grey frames behind it are encoded for each chunk; all
        frames are kept in float32, and encoded after the last chunk.

    Source: the loop of the reference's ``wan/multitalk.py``, generate_infinitetalk. That writes the
    file twice, and runs CLIP for each chunk; here neither is done.
    """

    def make(timer: ChunkTimer, folder: Path) -> int:
        kept: list[Tensor] = []
        plain = replace(timer.models, vae=_PlainVAE(timer.models.vae))
        picture_BCHW = prepare_reference(picture_HWC, request.height, request.width)
        pictures = _Always(picture_BCHW, plan_video(request, conversation.speeches).num_frames)
        for made in generate(request, pictures, conversation.speeches, plain):
            timer.end_chunk()
            kept.append(made.frames_BCTHW)
            timer.finish_chunk()
        frames_THWC = quantize_frames(torch.cat(kept, 2))
        return assemble(folder / "video.mp4", frames_THWC.split(_BATCH), conversation.waveform)

    return time_chunks(make, models, device)


def add_reference_way(speeds: Sequence[dict[str, Any]]) -> None:
    """Measure the videos of ``bench`` in the order of the reference, on the CPU.

    Args:
        speeds: records of ``bench --json`` for the embedded models. Each gets the timing of the
            same video in this order, and how many times as many frames per second ``bench`` made.
    """
    cpu = torch.device("cpu")
    files = find_model_files(EMBEDDED_MODELS)
    request = plain_request(read_request(files.inspect(files.dit)), None)
    inputs = make_inputs(load_models(files, cpu), read_sizes(files), request, cpu, NUM_CHUNKS)
    for speed in speeds:
        steps = speed["num_steps"]
        timing = time_reference(
            inputs.models,
            replace(request, num_inference_steps=steps),
            inputs.conversation,
            inputs.picture_HWC,
            cpu,
        )
        steady = timing.steady
        speed["reference_way"] = {
            "steady_chunk": asdict(steady) | {"chunk": steady.chunk},
            "frames_per_second": timing.throughput,
        }
        gain = speed["frames_per_second"] / timing.throughput
        speed["throughput_in_the_reference_ways"] = gain


class _PlainVAE:
    """VAE without the shortcut for the grey frames of a reference; a ``protocols.VideoVAE``."""

    def __init__(self, vae: VideoVAE) -> None:
        self.encode, self.decode = vae.encode, vae.decode

    def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
        return self.encode(reference_clip(picture_BCHW, num_frames))


class _Always(Sequence[Tensor]):
    """Sequence of one picture as the frames of a video to dub, so that each chunk encodes it."""

    def __init__(self, picture_BCHW: Tensor, length: int) -> None:
        self._picture_BCHW, self._length = picture_BCHW, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._picture_BCHW
