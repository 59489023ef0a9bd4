"""Comparison of the nodes, the core and the command line with ComfyUI's own InfiniteTalk nodes.

    python -m tools.benchmark.run --json FILE --markdown FILE

All arms run on one machine, one after the other:

1. ``python -m turbotalk_core bench``: bare calls and chunks by part. Then the same videos in the
   order of the reference (``reference_way``).
2. ComfyUI's own nodes, our nodes, the core and the reference's order make the same video with the
   same weights, in one process, in turns.
3. The command line makes a long video of the shipped portrait in another process. Recorded from
   outside are the time when each chunk is on the disk, and the memory until then. The command line
   and the core also make the same shorter video in one process, in turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.benchmark.command_line import WARM, compare_talk, watch_talk
from tools.benchmark.page import to_page
from tools.benchmark.random_family import RELEASED_SIZES, TEXT_DIM, write_released_sizes
from tools.benchmark.reference_way import add_reference_way, time_reference
from tools.comfy.download import COMFYUI_VERSION, find_host
from tools.comfy.in_process import PACK, import_host, load_pack, run_node
from training.benchmark.hardware import name_cpu
from turbotalk_core import types
from turbotalk_core.benchmark.timing import VideoTiming, time_video
from turbotalk_core.geometry import FPS, SAMPLE_RATE, TEXT_LENGTH, count_samples
from turbotalk_core.loading import VAE, ModelFiles, load_models
from turbotalk_core.request import CHUNK_FRAMES, NUM_MOTION_FRAMES, TalkRequest
from turbotalk_core.safe_io.atomic import write_text
from turbotalk_core.safe_io.tensor_header import read_tensor_header

PAIRED_CHUNKS = 16  # of the video that talk and the core make in turns: the voice has two sections
SIGMAS = torch.tensor([1.0, 0.0])  # one call per chunk
Parts = dict[str, float]  # seconds by part of the work; empty where parts are not measured
Arm = Callable[[int], Parts]  # makes the video with a seed
LIKE_THE_STUDENT = {"dim": 200, "ffn_dim": 520, "num_heads": 5, "num_layers": 6}


# --- one process: the host's own nodes, ours, and the core --------------------------------------


@dataclass(frozen=True)
class Scene:
    """Video that all arms make.

    Attributes:
        height: height, pixels.
        width: width, pixels.
        chunk_frames: frames of a chunk.
        motion_frames: frames at the start of a later chunk that the chunk before made.
        num_chunks: number of chunks.
    """

    height: int = 128
    width: int = 128
    chunk_frames: int = CHUNK_FRAMES
    motion_frames: int = NUM_MOTION_FRAMES
    num_chunks: int = 6

    @property
    def num_frames(self) -> int:
        """Frames of the video."""
        new_frames = self.chunk_frames - self.motion_frames
        return self.chunk_frames + (self.num_chunks - 1) * new_frames

    @property
    def picture(self) -> Tensor:
        """Portrait, [1, H, W, 3] in [0, 1]."""
        return _draw(0, 1, self.height, self.width, 3).sigmoid()

    @property
    def layers(self) -> list[Tensor]:
        """Output of the host's audio encoder for the voice: 13 layers, 50 rows per second."""
        return [_draw(seed, 1, 2 * self.num_frames, 768) for seed in range(13)]

    @property
    def silence(self) -> Tensor:
        """Sound of the video, [1, S]."""
        return torch.zeros(1, count_samples(self.num_frames, SAMPLE_RATE))


def compare(
    host: SimpleNamespace, pack: ModuleType, scene: Scene, *, rounds: int
) -> dict[str, dict[str, Any]]:
    """Make the same video with all arms in turns, in this process, and time it.

    Args:
        host: result of ``import_host``, with the files of ``write_released_sizes``.
        pack: result of ``load_pack``.
        scene: video to make.
        rounds: number of rounds, of which the median counts; an untimed one before them pays for
            what is set up once.

    Returns:
        For each arm the seconds of each round, their median, frames per second, and for the core
        and our nodes the median seconds of each part.
    """
    arms = {
        "host_native": _prepare_native(host, scene),
        "our_nodes": _prepare_nodes(host, pack, scene),
        "our_nodes_pytorch": _prepare_nodes(host, pack, scene, uses_pytorch_attention=True),
        "core": _prepare_core(host, scene, time_video),
        "reference_way": _prepare_core(host, scene, time_reference),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    parts: dict[str, list[Parts]] = {name: [] for name in arms}
    for number in range(1 + rounds):
        for name, make in arms.items():
            started = time.perf_counter()
            parts[name].append(make(number))
            seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "all_seconds": taken[1:],
            "seconds": median(taken[1:]),
            "frames_per_second": scene.num_frames / median(taken[1:]),
            "parts": {
                part: median(round_parts[part] for round_parts in parts[name][1:])
                for part in parts[name][0]
            },
        }
        for name, taken in seconds.items()
    }


def _prepare_native(host: SimpleNamespace, scene: Scene) -> Arm:
    """Prepare ComfyUI's InfiniteTalk node, sampler and VAE, connected as in its own workflow."""
    bare = run_node(host, "UNETLoader", unet_name=RELEASED_SIZES, weight_dtype="default")
    (adapter,) = host.model_patch_nodes.ModelPatchLoader().load_model_patch(RELEASED_SIZES)
    vae = run_node(host, "VAELoader", vae_name=VAE)
    sound = {"waveform": scene.silence.unsqueeze(0), "sample_rate": SAMPLE_RATE}

    def make(seed: int) -> Parts:
        positive, negative = _prompts()
        frames = None
        with torch.inference_mode():
            for index in range(scene.num_chunks):
                model, cond, uncond, latent, trim = host.wan_nodes.WanInfiniteTalkToVideo.execute(
                    mode={"mode": "single_speaker"},
                    model=bare,
                    model_patch=adapter,
                    positive=positive,
                    negative=negative,
                    vae=vae,
                    width=scene.width,
                    height=scene.height,
                    length=scene.chunk_frames,
                    audio_encoder_output_1={"encoded_audio_all_layers": scene.layers},
                    motion_frame_count=scene.motion_frames,
                    start_image=scene.picture,
                    audio_scale=1.0,
                    previous_frames=frames,
                ).result
                drawn = host.sample.prepare_noise(latent["samples"], seed + index)
                euler = host.samplers.sampler_object("euler")
                latents = host.sample.sample_custom(
                    model, drawn, 1.0, euler, SIGMAS, cond, uncond, latent["samples"], seed=seed
                )
                made = run_node(host, "VAEDecode", samples={"samples": latents}, vae=vae)
                frames = made if frames is None else torch.cat((frames, made[trim:]))
        if frames is None or frames.shape[0] != scene.num_frames:
            raise RuntimeError(f"the host made another number of frames than {scene.num_frames}")
        (video,) = host.video_nodes.CreateVideo.execute(frames, float(FPS), sound).result
        video.save_to(str(host.base / "output" / f"native_{seed}.mp4"))
        return {}

    return make


def _prepare_nodes(
    host: SimpleNamespace, pack: ModuleType, scene: Scene, *, uses_pytorch_attention: bool = False
) -> Arm:
    """Prepare the sampler and *Assemble video* of this pack.

    ComfyUI's attention on a CPU is its own; with ``--use-pytorch-cross-attention`` it is torch's,
    which the core uses. An override has the same effect within this process.
    """
    name = "ours_pytorch" if uses_pytorch_attention else "ours"
    parts: Parts = dict.fromkeys(("encode", "forward", "decode"), 0.0)
    rooms = f"{pack.__name__}.nodes.host"
    vae_class = import_module(f"{rooms}.vae").HostVAE
    _time_method(vae_class, "encode", parts, "encode")
    _time_method(vae_class, "encode_reference", parts, "encode")
    _time_method(vae_class, "decode", parts, "decode")
    _time_method(import_module(f"{rooms}.denoiser").HostDenoiser, "__call__", parts, "forward")
    bare = run_node(host, "UNETLoader", unet_name=RELEASED_SIZES, weight_dtype="default")
    adapter = run_node(host, "TurboTalkLoadAudioAdapter", name=RELEASED_SIZES)
    model = run_node(
        host, "TurboTalkApplyAudioAdapter", model=bare, model_patch=adapter, strength=1.0
    )
    if uses_pytorch_attention:
        model.model_options["transformer_options"]["optimized_attention_override"] = (
            lambda _, *arguments, **named: host.attention.attention_pytorch(*arguments, **named)
        )
    vae = run_node(host, "VAELoader", vae_name=VAE)
    speech = _make_conversation(scene, import_module(f"{pack.__name__}.turbotalk_core.types"))

    def make(seed: int) -> Parts:
        positive, negative = _prompts()
        parts.update(dict.fromkeys(parts, 0.0))
        started = time.perf_counter()
        take = run_node(
            host,
            "TurboTalkSampler",
            model=model,
            vae=vae,
            reference_image=scene.picture,
            speech=speech,
            positive=positive,
            negative=negative,
            sigmas=SIGMAS,
            update="euler",
            seed=seed,
            size_from="custom",
            width=scene.width,
            height=scene.height,
            chunk_frames=scene.chunk_frames,
            motion_frames=scene.motion_frames,
            steps=1,
            shift=1.0,
            audio_guidance=1.0,
            text_guidance=1.0,
        )
        if take.num_frames != scene.num_frames:
            raise RuntimeError(f"the sampler made {take.num_frames} frames")
        sampled = time.perf_counter()
        video = run_node(
            host,
            "TurboTalkAssembleVideo",
            take=take,
            codec="h264",
            crf=18,
            pixel_format="yuv420p",
            start_frame=0,
            num_frames=0,
        )
        video.save_to(str(host.base / "output" / f"{name}_{seed}.mp4"))
        rest = sampled - started - sum(parts.values())
        return parts | {"rest": rest, "assemble": time.perf_counter() - sampled}

    return make


def _time_method(owner: type, name: str, seconds: Parts, part: str) -> None:
    """Add the seconds of all later calls of a method to a part."""
    call = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = call(*arguments)
        seconds[part] += time.perf_counter() - started
        return result

    setattr(owner, name, timed)


def _prepare_core(host: SimpleNamespace, scene: Scene, way: Callable[..., VideoTiming]) -> Arm:
    """Prepare the core alone, in the order of work of the command line or of the reference."""
    models_folder = host.base / "models"
    dit = models_folder / "diffusion_models" / RELEASED_SIZES
    files = ModelFiles(
        dit=dit,
        adapter=_cut_adapter(models_folder / "model_patches" / RELEASED_SIZES, dit),
        audio_encoder=Path(),
        vae=PACK / "models" / "vae" / VAE,
    )
    cpu = torch.device("cpu")
    models = replace(load_models(files, cpu), text_BND=_prompts()[0][0][0])
    request = TalkRequest(
        num_inference_steps=1,
        schedule="reference",
        shift=1.0,
        update="euler",
        seed=0,
        height=scene.height,
        width=scene.width,
        chunk_frames=scene.chunk_frames,
        num_motion_frames=scene.motion_frames,
        audio_guidance_scale=1.0,
    )
    speech = _make_conversation(scene, types)
    (picture_HWC,) = scene.picture

    def make(seed: int) -> Parts:
        timing = way(models, replace(request, seed=seed), speech, picture_HWC, cpu)
        parts = {
            part: sum(getattr(chunk, part) for chunk in timing.chunks)
            for part in ("encode", "forward", "decode")
        }
        return parts | {"rest": timing.seconds - sum(parts.values()), "assemble": 0.0}

    return make


def _cut_adapter(path: Path, dit: Path) -> Path:
    """Remove the blocks that the transformer lacks; only ComfyUI requires them."""
    num_layers = len({name.split(".")[1] for name in load_file(dit) if name.startswith("blocks.")})
    _, metadata = read_tensor_header(path)
    kept = {
        name: tensor
        for name, tensor in load_file(path).items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) < num_layers
    }
    cut = path.with_name(f"cut_{path.name}")
    save_file(kept, cut, metadata)
    return cut


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _prompts() -> list[Any]:
    return [[[_draw(seed, 1, TEXT_LENGTH, TEXT_DIM), {}]] for seed in (1, 2)]


def _make_conversation(scene: Scene, types: Any) -> Any:
    features_TLD = torch.cat(scene.layers[1:])[:, ::2].movedim(0, 1)
    features = types.AudioFeatures(features_TLD=features_TLD, num_frames=scene.num_frames)
    waveform = types.Waveform(samples_CS=scene.silence, sample_rate=SAMPLE_RATE)
    return types.Conversation(
        speakers=(types.Speaker(name="the speaker", waveform=waveform),),
        speeches=(types.Speech(features=features, waveform=waveform),),
        waveform=waveform,
    )


# --- the report ---------------------------------------------------------------------------------


def _measure_core(threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "turbotalk_core", "bench", "--device", "cpu", "--json"]
    command += ["--threads", str(threads)]
    output = subprocess.run(command, cwd=PACK, check=True, capture_output=True, text=True).stdout
    report = json.loads(output)
    add_reference_way(report["speeds"])
    return report


def _compare_in_host(scene: Scene, rounds: int) -> dict[str, dict[str, Any]]:
    with TemporaryDirectory() as folder:
        host = import_host(find_host(), Path(folder))
        write_released_sizes(host.base / "models", **LIKE_THE_STUDENT)
        return compare(host, load_pack(host), scene, rounds=rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison from the command line.

    Args:
        argv: arguments; None takes those of the program.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark.run", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the arms in ComfyUI (%(default)s)"
    )
    parser.add_argument("--chunks", type=int, default=200, help="of the long video (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="report for programs")
    parser.add_argument("--markdown", type=Path, required=True, help="report for people")
    arguments = parser.parse_args(argv)
    if arguments.chunks < WARM + 2:
        parser.error(
            f"got --chunks {arguments.chunks}; memory is watched behind the first {WARM}, so make "
            f"at least {WARM + 2}"
        )
    torch.set_num_threads(arguments.threads)
    scene = Scene()
    report = {
        "machine": {
            "cpu": name_cpu(),
            "threads": arguments.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "comfyui": COMFYUI_VERSION,
        },
        "core": _measure_core(arguments.threads),
        "talk": watch_talk(arguments.chunks, arguments.threads),
        "talk_beside_core": compare_talk(PAIRED_CHUNKS, arguments.rounds),
        "scene": {"num_chunks": scene.num_chunks, "rounds": arguments.rounds} | LIKE_THE_STUDENT,
        "arms": _compare_in_host(scene, arguments.rounds),
    }
    write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    page = to_page(report)
    write_text(arguments.markdown, page)
    sys.stdout.write(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
