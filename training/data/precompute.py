"""Encoding of shots to a prepared set: latents, audio features, image and text tokens, in shards.

    python -m training.data precompute --videos FOLDER --set SET --out PREPARED --vae FILE …
    python -m training.data precompute --avatars 600 --out PREPARED --vae FILE --encoder FILE

Input: filtered pieces of videos, or seeds of the synthetic set, and the model files. Output: a
prepared set (``shards``). Two clips are cut from each shot:

- ``opening``: begins with the reference image itself, as the first chunk of a video does;
- ``later``: begins after it, as every other chunk does. Its first latent frames serve as motion
  frames of the chunk before. They are encoded from the clip's own first frame, which is correct
  because the VAE is causal: no latent frame depends on later video frames.

Axes: B batch, C channels, T video frames, F latent frames, H height, W width, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.data.resumable_stage import (
    SKIPPED,
    ItemLog,
    Record,
    Summary,
    Work,
    attempt,
    fingerprint_files,
    hold_stage,
    list_missing,
    summarize,
)
from training.data.shards import (
    INDEX,
    NULL_TEXT,
    SHARD,
    SHARDS,
    Sample,
    describe_sample,
    is_whole,
    write_shard,
    write_tensors,
)
from training.data.shots import Shot, Source
from training.outputs import check_letters
from turbotalk_core.audio.conversation import encode_speech
from turbotalk_core.audio.resample import to_mono_16k
from turbotalk_core.checkpoints.audio_encoder import load_audio_encoder
from turbotalk_core.checkpoints.networks import load_image_encoder, load_text_encoder, load_vae
from turbotalk_core.errors import MismatchError, RequestError
from turbotalk_core.models.text_encoder import encode_prompt
from turbotalk_core.protocols import AudioEncoder, ImageEncoder, VideoVAE

SAME_LATENT = 2e-3  # normalised; about the spacing of float16, so smaller differences are rounding
NEGATIVE_PROMPT = (  # InfiniteTalk, wan/configs: the null text of its text guidance
    "bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, "
    "images, static, overall gray, worst quality, low quality, JPEG compression residue, ugly, "
    "incomplete, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, "
    "misshapen limbs, fused fingers, still picture, messy background, three legs, many people in "
    "the background, walking backwards"
)
LEAST_WEIGHT = 0.4  # weight of a place without motion

TextPort = Callable[[str], Tensor]
"""Embeds a prompt: [N, D], the rows of its tokens alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFiles:
    """Model files that a set is prepared with.

    Attributes:
        vae: video VAE.
        audio: wav2vec2.
        image: CLIP, for a model with the image branch; None prepares no image tokens.
        text: umT5; None prepares no text embeddings.
        tokenizer: ``spiece.model`` of the text encoder; None if it is in the text encoder's file.

    Raises:
        RequestError: if there is a tokenizer without its text encoder.
    """

    vae: Path
    audio: Path
    image: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.tokenizer is not None:
            raise RequestError("got a tokenizer without a text encoder; give --text-encoder too")

    def describe(self) -> dict[str, Any]:
        """Return names and digests of the files, for the fingerprint of the set."""
        files = {
            "vae": self.vae,
            "audio": self.audio,
            "image": self.image,
            "text": self.text,
            "tokenizer": self.tokenizer,
        }
        return {
            name: None if path is None else fingerprint_files(path) for name, path in files.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """Networks that encode a shot to a sample; image and text encoder may be missing."""

    vae: VideoVAE
    audio: AudioEncoder
    image: ImageEncoder | None = None
    text: TextPort | None = None


def load_encoders(files: EncoderFiles, device: torch.device) -> Encoders:
    """Load the networks from their files.

    Args:
        files: model files.
        device: device of the VAE and of the image and text encoders.

    Returns:
        The networks.

    Raises:
        CheckpointError: if a file is missing, damaged or of another kind.
    """
    text = None
    if files.text is not None:
        text = _load_text(files.text, files.tokenizer, device)
    return Encoders(
        vae=load_vae(files.vae).to(device),
        audio=load_audio_encoder(files.audio),
        image=None if files.image is None else load_image_encoder(files.image).to(device),
        text=text,
    )


def _load_text(path: Path, tokenizer_path: Path | None, device: torch.device) -> TextPort:
    # bfloat16 is the dtype of the public weights; in float32 they would need 22 GB.
    encoder, tokenizer = load_text_encoder(path, tokenizer_path, torch.bfloat16)
    torch.nn.Module.to(encoder.model, device)
    return lambda prompt: encode_prompt(prompt, tokenizer, encoder)[0]


def run_precompute(
    source: Source,
    out: Path,
    files: EncoderFiles,
    work: Work,
    *,
    device: torch.device,
    shard_samples: int = 16,
    negative_prompt: str = NEGATIVE_PROMPT,
) -> Summary:
    """Encode all shots that are not encoded yet.

    Args:
        source: source of the shots.
        out: folder of the prepared set.
        files: model files of the networks.
        work: this process's share of the work.
        device: device of the networks.
        shard_samples: shots in a shard; this many are in memory at a time.
        negative_prompt: prompt that is encoded once for the whole set, if a text encoder is given.
            It must be the one at inference, or guidance is distilled away from another text.

    Returns:
        Summary of the run.

    Raises:
        RequestError: if there are no shots, or the set was made with other settings.
        CheckpointError: if a model file cannot be used.
        OutputError: if a file cannot be written.
    """
    check_letters(out)
    keys = source.keys
    if not keys or shard_samples < 1:
        raise RequestError(
            f"got {len(keys)} shots and shards of {shard_samples}; both must be at least 1"
        )
    settings = {
        **source.describe(),
        "models": files.describe(),
        "negative_prompt": negative_prompt if files.text else None,
    }
    products = (f"{SHARDS}/*.safetensors", NULL_TEXT)
    with hold_stage(out, settings, work, products) as item_log:
        encoders = load_encoders(files, device)
        if encoders.text is not None and work.part == 0 and not (out / NULL_TEXT).exists():
            write_tensors(out / NULL_TEXT, {"text_ND": encoders.text(negative_prompt).cpu()})
        # A sample whose shard is missing or truncated is encoded again.
        done = {
            key: record
            for key, record in item_log.before.items()
            if SKIPPED in record or is_whole(out, record)
        }
        missing = list_missing(keys, done, work)
        num_made = _write_all(source, missing, encoders, out, work, item_log, shard_samples)
    return summarize(out, num_made)


def _write_all(
    source: Source,
    missing: list[str],
    encoders: Encoders,
    out: Path,
    work: Work,
    item_log: ItemLog,
    shard_samples: int,
) -> int:
    """Encode shots and write their shards; return the number of samples made."""
    encoded = _encode_all(source, missing, encoders)
    number, num_made = _count_shards(item_log.before, work), 0
    with tqdm(total=len(missing), desc="shots", mininterval=10, disable=None) as bar:
        while group := list(islice(encoded, shard_samples)):
            samples = [sample for _, sample in group if sample is not None]
            shard = write_shard(out, f"{work.name}-{number:06d}", samples) if samples else {}
            made = iter(range(len(samples)))
            # The manifest is written after the samples, so it never lists a missing sample.
            item_log.append(
                record if sample is None else {**record, **shard, INDEX: next(made)}
                for record, sample in group
            )
            number += bool(samples)
            num_made += len(samples)
            bar.update(len(group))
    return num_made


def _encode_all(
    source: Source, keys: list[str], encoders: Encoders
) -> Iterator[tuple[Record, Sample | None]]:
    for key in keys:
        made: list[Sample] = []

        def make(key: str = key, made: list[Sample] = made) -> dict[str, Any]:
            shot = source.open(key)
            sample = encode_shot(shot, encoders)
            made.append(sample)
            return {
                **shot.facts,
                "caption": shot.caption,
                "num_frames": shot.num_frames,
                "clip_frames": shot.clip_frames,
                "later_start": shot.later_start,
                **describe_sample(sample),
            }

        record = attempt(key, make)
        yield record, made[0] if made and SKIPPED not in record else None


def _count_shards(records: dict[str, Record], work: Work) -> int:
    """Return this process's next shard number; a shard without manifest lines is overwritten."""
    names = {Path(record[SHARD]).stem for record in records.values() if SHARD in record}
    numbers = [int(name.rsplit("-", 1)[1]) for name in names if name.startswith(work.name)]
    return max(numbers, default=-1) + 1


@torch.no_grad()
def encode_shot(shot: Shot, encoders: Encoders) -> Sample:
    """Encode a shot.

    Args:
        shot: frames and voices.
        encoders: the networks.

    Returns:
        Latents, features and tokens in float16, on the CPU.

    Raises:
        MismatchError: if the output of a network is not finite in float16.
        TurboTalkError: if frames or sound cannot be read.
    """
    length = shot.clip_frames
    opening_CTHW = shot.show(0, length)
    opening_CFHW = encoders.vae.encode(opening_CTHW.unsqueeze(0))[0]
    first_CTHW = opening_CTHW[:, :1]
    del opening_CTHW
    later_CTHW = shot.show(shot.later_start, shot.later_start + length)
    later_CFHW = encoders.vae.encode(later_CTHW.unsqueeze(0))[0]
    reference_CFHW = encoders.vae.encode_reference(first_CTHW.transpose(0, 1), length)[0]
    voices = [encode_speech(voice, encoders.audio).features.rows() for voice in shot.voices]
    sounds = [to_mono_16k(voice).clamp(-1, 1) for voice in shot.voices]
    image = text = None
    if encoders.image is not None:
        image = encoders.image(first_CTHW.transpose(0, 1))[0]
    if encoders.text is not None:
        text = encoders.text(shot.caption or "")
    sample = Sample(
        opening_CFHW=opening_CFHW,
        later_CFHW=later_CFHW,
        reference_CFHW=trim_tail(reference_CFHW),
        weight_HW=weigh_places(opening_CFHW, later_CFHW),
        features_PTLD=torch.stack(voices),
        sound_PS=(torch.stack(sounds) * torch.iinfo(torch.int16).max).round().to(torch.int16),
        image_ND=image,
        text_ND=text,
    )
    return _halve(sample)


def trim_tail(reference_CFHW: Tensor) -> Tensor:
    """Drop the last latent frames of a reference if they repeat the frame before them.

    The reference is one image followed by grey frames. The VAE has a limited temporal range, so its
    latents are constant from some frame on; ``shards.fill_reference`` restores them.

    Args:
        reference_CFHW: latents of an image and grey frames.

    Returns:
        The first latent frames, up to the first one that all later ones equal.
    """
    differences_F = (reference_CFHW - reference_CFHW[:, -1:]).abs().amax((0, 2, 3))
    other = (differences_F > SAME_LATENT).nonzero()
    return reference_CFHW[:, : int(other[-1]) + 2 if len(other) else 1]


def weigh_places(*clips_CFHW: Tensor) -> Tensor:
    """Compute loss weights of the places in a frame from the motion there.

    So the mouth counts more than the background. A weight is constant over a shot. It therefore
    does not depend on the noise or the moment, and the optimum of the weighted squared error is
    still the conditional mean.

    Args:
        *clips_CFHW: latents of one shot.

    Returns:
        Weights, [H, W], mean 1, at least 0.4.
    """
    moved = torch.cat(clips_CFHW, 1).float().std(1).mean(0)
    return LEAST_WEIGHT + (1 - LEAST_WEIGHT) * moved / moved.mean().clamp_min(1e-6)


def _halve(sample: Sample) -> Sample:
    halved = {
        name: tensor.to("cpu", torch.float16)
        for name, tensor in sample.tensors().items()
        if tensor.is_floating_point()
    }
    for name, tensor in halved.items():
        if not bool(tensor.isfinite().all()):
            raise MismatchError(
                f"{name} holds values beyond float16, or none at all; check that the model file is "
                "the one that belongs here"
            )
    return replace(sample, **halved)
