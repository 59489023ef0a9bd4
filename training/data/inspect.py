"""Inspection of a prepared sample: its latents decoded to a video with sound.

    python -m training.data inspect PREPARED --vae FILE --key KEY --mp4 sample.mp4

Input: a prepared set and the VAE it was made with. Output: an mp4 of a clip with its sound, and the
manifest line. No other data module decodes latents.

Axes: P voices, S audio samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from training.data.resumable_stage import Record, fingerprint_files, read_settings
from training.data.shards import ShardReader, read_manifest
from turbotalk_core.checkpoints.networks import load_vae
from turbotalk_core.errors import MismatchError, RequestError
from turbotalk_core.geometry import SAMPLE_RATE, count_decoded_frames, count_samples
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.types import Waveform
from turbotalk_core.video.mux import assemble, quantize_frames

CLIPS = ("opening", "later")


def choose_record(folder: Path, key: str | None) -> Record:
    """Find the manifest line of a sample.

    Args:
        folder: folder of the prepared set.
        key: key of the sample; None for the first sample.

    Returns:
        The manifest line.

    Raises:
        RequestError: if there is no such sample, or none at all.
        OutputError: if the set is damaged.
    """
    read_settings(folder)
    records = read_manifest(folder)
    for record in records:
        if key in (None, record["key"]):
            return record
    examples = ", ".join(record["key"] for record in records[:3])
    raise RequestError(
        f"there is no sample {key!r} in {folder}, which holds {len(records)}: {examples or 'none'}"
    )


def describe(record: Record) -> str:
    """Format a manifest line for display, one fact per line."""
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in record.items())


def decode_sample(
    folder: Path, record: Record, vae: Path, mp4: Path, *, clip: str, device: torch.device
) -> int:
    """Decode a clip of a sample to a video with its sound.

    Args:
        folder: folder of the prepared set.
        record: manifest line of the sample.
        vae: file of the VAE that the set was made with.
        mp4: file to write.
        clip: one of ``CLIPS``.
        device: device of the VAE.

    Returns:
        Number of frames written.

    Raises:
        RequestError: if the clip is unknown.
        MismatchError: if the set was made with another VAE.
        CheckpointError: if the VAE cannot be used.
        OutputError: if the set is damaged, or the file cannot be written.
    """
    if clip not in CLIPS:
        raise RequestError(f"got the clip {clip!r}; choose one of {', '.join(CLIPS)}")
    network = load_vae(vae)
    _check_vae(folder, vae)
    reader = ShardReader(folder)
    latents_CFHW = reader.read(record, f"{clip}_CFHW")
    start = record["later_start"] if clip == "later" else 0
    first, last = (
        count_samples(frame, SAMPLE_RATE)
        for frame in (start, start + count_decoded_frames(latents_CFHW.shape[1]))
    )
    sound_PS = reader.read(record, "sound_PS")[:, first:last].float()
    mixed_S = (sound_PS / torch.iinfo(torch.int16).max).sum(0).clamp(-1, 1)
    return assemble(
        mp4,
        _decode(network.to(device), latents_CFHW.float().to(device)),
        Waveform(samples_CS=mixed_S.unsqueeze(0), sample_rate=SAMPLE_RATE),
    )


def _check_vae(folder: Path, vae: Path) -> None:
    models = read_settings(folder)["settings"].get("models")
    made_with = models.get("vae") if isinstance(models, dict) else None
    if isinstance(made_with, dict) and made_with.get("sha256") != fingerprint_files(vae)["sha256"]:
        raise MismatchError(
            f"{folder} was made with another VAE, {made_with.get('file')}, than {vae}, which would "
            "decode it wrongly; give that one"
        )


def _decode(vae: WanVAE, latents_CFHW: Tensor) -> Iterator[Tensor]:
    for frames_BCTHW in vae.iter_decode(latents_CFHW.unsqueeze(0)):
        yield quantize_frames(frames_BCTHW)
