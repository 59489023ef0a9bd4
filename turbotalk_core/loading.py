"""Loading of model files on disk to networks for the pipeline, for programs without a host.

Input: a folder with the layout of ComfyUI's ``models``. Output: the request that a file ships with,
and ``Models``. Separate because the command line and the evaluation both need it, but not the
nodes, whose networks are the host's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which

import torch
from torch import Tensor

from .checkpoints.inspect import CheckpointInfo, ModelFile, inspect
from .checkpoints.networks import load_dit, load_image_encoder, load_text_encoder, load_vae
from .conditioning.prompts import parse_prompts
from .errors import CheckpointError, RequestError
from .fingerprints import fingerprint
from .models.denoiser import ProjectionAdapter, WanDenoiser
from .models.text_encoder import encode_prompt
from .models.vae import WanVAE
from .pipeline import Models
from .request import CHUNK_FRAMES, MAX_DISTILLED_STEPS, NUM_MOTION_FRAMES, TalkRequest
from .safe_io.paths import is_file, is_folder

EMBEDDED_MODELS = Path(__file__).parent.parent / "models"
STUDENT = "turbotalk_tiny.safetensors"
TEACHER = "turbotalk_tiny_teacher.safetensors"
ADAPTER = "turbotalk_tiny_adapter.safetensors"
STUDENT_ADAPTER = "turbotalk_tiny_student_adapter.safetensors"
DMD = "turbotalk_tiny_dmd.safetensors"
DMD_ADAPTER = "turbotalk_tiny_dmd_adapter.safetensors"
AUDIO_ENCODER = "turbotalk_tiny_wav2vec2.safetensors"
VAE = "turbotalk_tiny_vae.safetensors"
_OWN_ADAPTERS = {STUDENT: STUDENT_ADAPTER, DMD: DMD_ADAPTER}  # all others use ADAPTER


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The files that a talking video needs.

    Attributes:
        dit: video transformer.
        adapter: audio adapter; the same file if they are merged.
        audio_encoder: wav2vec2.
        vae: video VAE.
        text_encoder: umT5, for prompts; None if there are none.
        tokenizer: tokenizer of the text encoder; None if it is inside of its file.
        image_encoder: CLIP; None for a transformer without an image branch.
        loras: LoRAs to merge into the transformer, each with its strength.
        infos: headers of these files that were read so far; filled by ``inspect``.
    """

    dit: Path
    adapter: Path
    audio_encoder: Path
    vae: Path
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    image_encoder: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    infos: dict[Path, CheckpointInfo] = field(default_factory=dict, repr=False, compare=False)

    def inspect(self, path: Path) -> CheckpointInfo:
        """Return the description of one of these files, reading its header only once.

        It is needed for settings, for warnings and to load the weights; a ``.pth`` file must be
        unpickled for it.

        Args:
            path: path of one of these files.

        Returns:
            Its description.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        if path not in self.infos:
            self.infos[path] = inspect(path)
        return self.infos[path]


def find_model_files(
    folder: Path = EMBEDDED_MODELS,
    *,
    dit: str | None = None,
    adapter: str | None = None,
    audio_encoder: str = AUDIO_ENCODER,
    vae: str = VAE,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    image_encoder: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    num_steps: int | None = None,
) -> ModelFiles:
    """Find model files by name in the sub-folders of ComfyUI's layout.

    Args:
        folder: folder that contains diffusion_models, model_patches, audio_encoders, vae,
            text_encoders, clip_vision and loras.
        dit: video transformer; None selects the embedded one made for ``num_steps``, or the teacher
            if that does not exist.
        adapter: audio adapter; None selects the one merged into the transformer's file, or else an
            embedded one: a student's own for an embedded student, the teacher's for any other.
        audio_encoder: wav2vec2.
        vae: video VAE.
        text_encoder: umT5, or None.
        tokenizer: its tokenizer, in the folder of the text encoder, or None.
        image_encoder: CLIP, or None.
        loras: LoRAs, each with its strength.
        num_steps: steps of the request; None is 1. One embedded student is for 1, one for 2 to 4.

    Returns:
        Paths that exist.

    Raises:
        CheckpointError: if a file does not exist; the message lists those that do.
    """
    texts = folder / "text_encoders"
    is_embedded = dit is None
    if dit is None:
        student = STUDENT if num_steps in (None, 1) else DMD
        is_distilled = num_steps is None or num_steps <= MAX_DISTILLED_STEPS
        exists = is_file(folder / "diffusion_models" / student)
        dit = student if is_distilled and exists else TEACHER
    dit_path = _find(folder / "diffusion_models", dit)
    infos: dict[Path, CheckpointInfo] = {}
    if adapter is None and not is_embedded:
        infos[dit_path] = inspect(dit_path)
    if dit_path in infos and infos[dit_path].speakers is not None:
        adapter_path = dit_path
    else:
        adapter_path = _find(folder / "model_patches", adapter or _OWN_ADAPTERS.get(dit, ADAPTER))
    return ModelFiles(
        dit=dit_path,
        adapter=adapter_path,
        audio_encoder=_find(folder / "audio_encoders", audio_encoder),
        vae=_find(folder / "vae", vae),
        text_encoder=None if text_encoder is None else _find(texts, text_encoder),
        tokenizer=None if tokenizer is None else _find(texts, tokenizer),
        image_encoder=(
            None if image_encoder is None else _find(folder / "clip_vision", image_encoder)
        ),
        loras=tuple((_find(folder / "loras", name), strength) for name, strength in loras),
        infos=infos,
    )


def read_request(dit: ModelFile) -> TalkRequest:
    """Read the settings that a video transformer ships with; the seed is 0.

    They are in the file's metadata under ``turbotalk``, named as in ``TalkRequest`` except for
    ``steps``. Without them, the settings are InfiniteTalk's own at its smaller size.

    Args:
        dit: file of a video transformer.

    Returns:
        A request to change with ``dataclasses.replace``; height and width are those the model was
        trained at.

    Raises:
        CheckpointError: if the file is missing or no model file, or settings are out of range.
    """
    info = inspect(dit)
    settings = info.settings
    # InfiniteTalk, generate_infinitetalk.py: the defaults of its command line, without a prompt.
    shipped = {
        "num_inference_steps": settings.get("steps", 40),
        "schedule": settings.get("schedule", "reference"),
        "shift": settings.get("shift", 7.0),
        "update": settings.get("update", "euler"),
        "audio_guidance_scale": settings.get("audio_guidance_scale", 4.0),
        "height": settings.get("height", 640),
        "width": settings.get("width", 640),
        "chunk_frames": settings.get("chunk_frames", CHUNK_FRAMES),
        "num_motion_frames": settings.get("num_motion_frames", NUM_MOTION_FRAMES),
        "anchors_chunks": settings.get("anchors_chunks", False),
    }
    try:
        return TalkRequest(seed=0, **shipped)
    except ValueError as error:
        raise CheckpointError(
            f"the settings in the metadata of {info.path.name} cannot be used: {error}; save the "
            "file again with settings in range"
        ) from error


def load_models(
    files: ModelFiles,
    device: torch.device,
    audio_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    teacache_threshold: float | None = None,
    *,
    prompt: str | None = None,
    negative_prompt: str | None = None,
) -> Models:
    """Load the networks, and encode the prompts.

    Args:
        files: model files; the audio encoder is not loaded here, as speech is encoded before.
        device: device of the networks.
        audio_scale: strength of the audio adapter, 1 as trained.
        dtype: dtype of the weights of transformer, adapter and text encoder in memory, whatever
            the files contain.
        teacache_threshold: threshold of the request; None runs all blocks in all steps.
        prompt: prompt in the format of ``prompts.parse_prompts``; None is the null text.
        negative_prompt: prompt that text guidance leads away from; None is the null text.

    Returns:
        The networks; VAE and image encoder are in float32.

    Raises:
        CheckpointError: if a file is damaged or of another kind.
        MismatchError: if an adapter or a LoRA was made for another transformer.
        RequestError: if there is a prompt without a text encoder, or a negative prompt alone.
    """
    # First, because the text encoder is large and is freed before the others are loaded.
    texts, null_text_BND = _read_prompts(files, device, dtype, prompt, negative_prompt)
    model, projection = load_dit(
        files.inspect(files.dit), files.inspect(files.adapter), dtype, files.loras
    )
    assert projection is not None  # an adapter was given
    return Models(
        vae=load_vae(files.inspect(files.vae)).to(device),
        denoiser=WanDenoiser(model.to(device), audio_scale, teacache_threshold),
        adapter=ProjectionAdapter(projection.to(device)),
        text_BND=texts[0][1] if texts else None,
        null_text_BND=null_text_BND,
        image_encoder=(
            None
            if files.image_encoder is None
            else load_image_encoder(files.image_encoder).to(device)
        ),
        later_texts=texts[1:],
    )


def compile_networks(models: Models, device: torch.device) -> None:
    """Compile the slowest parts with torch: the transformer's blocks and the VAE's decoder.

    Results are the same up to rounding. The first chunk takes a minute or more longer.

    Args:
        models: result of ``load_models``; changed in place.
        device: device of the networks.

    Raises:
        RequestError: if the device is a CPU and there is no C++ compiler.
    """
    assert isinstance(models.denoiser, WanDenoiser)
    assert isinstance(models.vae, WanVAE)
    if device.type == "cpu" and not any(map(which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise RequestError(
            "on a CPU compiling needs a C++ compiler, and there is none; install g++, or do without"
        )
    for block in models.denoiser.model.blocks:
        block.compile()
    models.vae.decode_stream = torch.compile(models.vae.decode_stream)


def fingerprint_weights(models: Models) -> str:
    """Compute the fingerprint of all networks, for the cache key.

    Args:
        models: result of ``load_models``.

    Returns:
        Hexadecimal digits.
    """
    return fingerprint(iterate_weights(models))


def iterate_weights(models: Models) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of all networks, for ``fingerprints.fingerprint``.

    Args:
        models: result of ``load_models``.

    Yields:
        Names and weights, always in the same order.
    """
    assert isinstance(models.denoiser, WanDenoiser)
    assert isinstance(models.adapter, ProjectionAdapter)
    networks = (
        models.vae,
        models.denoiser.model,
        models.adapter.projection,
        models.image_encoder,
    )
    for number, network in enumerate(networks):
        if isinstance(network, torch.nn.Module):
            for name, weight in network.state_dict().items():
                yield f"{number} {name}", weight


def _read_prompts(
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    prompt: str | None,
    negative_prompt: str | None,
) -> tuple[tuple[tuple[int, Tensor], ...], Tensor | None]:
    if prompt is None:
        if negative_prompt is not None:
            raise RequestError(
                "got a negative prompt alone; text guidance leads from it to a prompt, so give both"
            )
        return (), None
    if files.text_encoder is None:
        raise RequestError("got a prompt without a text encoder; name the file of one (umT5)")
    segments = parse_prompts(prompt)
    encoder, tokenizer = load_text_encoder(files.text_encoder, files.tokenizer, dtype)
    torch.nn.Module.to(encoder.model, device)
    texts = tuple(
        (segment.start, encode_prompt(segment.text, tokenizer, encoder)) for segment in segments
    )
    if negative_prompt is None:
        return texts, None
    return texts, encode_prompt(negative_prompt, tokenizer, encoder)


def _find(folder: Path, name: str) -> Path:
    path = folder / name
    if not (is_file(path) or is_folder(path)):  # a folder may contain a sharded model
        files = (p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".pth"))
        present = ", ".join(sorted(files)) or "nothing"
        raise CheckpointError(
            f"there is no {name} in {folder}; there is {present}, "
            "so name one of these, or another models folder"
        )
    return path
