"""Latents and audio features that the embedded teacher learns from.

    python -m training.teacher_data --vae FILE --encoder FILE --out FOLDER

In: the embedded VAE and audio encoder, and a seed range. Out: one safetensors file per avatar or
pair, so that a stopped run goes on where it was. Each avatar speaks once, for a while; its first
frame is the reference image. Two clips are cut from what it does:

- ``opening``: begins with the reference itself, as the first chunk of a video does;
- ``later``: begins somewhere after it, as every other chunk does.

Both are encoded from their own first frame, as at inference. A share of the avatars may have clips
of 81 frames, InfiniteTalk's chunk, the rest has 33: most of what there is to learn is in the short
ones, at 40 % of the cost. Pairs of avatars in one wide picture, for several speakers, have clips of
81 frames.

Axes: C channels, T video frames, F latent frames, H height, W width, L encoder layers, D width,
P voices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from training.data.avatars import draw_avatar
from training.data.motion import draw_motion
from training.data.mouth import mouth_curve
from training.data.pairs import TURNS, draw_pair
from training.data.portrait import render
from training.data.seeds import open_stream
from training.data.speech import SAMPLE_RATE, draw_speech
from turbotalk_core.audio.encoder import load_audio_encoder
from turbotalk_core.audio.features import encode_speech
from turbotalk_core.geometry import FPS, count_latent_frames, count_samples
from turbotalk_core.model.checkpoint import load_vae
from turbotalk_core.model.vae import WanVAE
from turbotalk_core.ports import AudioEncoder
from turbotalk_core.types import Waveform

SHORT_FRAMES = 33
LONG_FRAMES = 81
SECONDS = 8.0  # of each utterance: 200 frames, room for a later clip anywhere in it
SILENT_SHARE = 0.04
GREY_LATENTS = 4  # latents of the grey tail that are computed; the rest repeats the last


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherClip:
    """One avatar, or two in one picture, encoded.

    Attributes:
        opening_CFHW: normalised latents of the clip that begins with the reference image.
        later_CFHW: normalised latents of a later clip of the same take.
        later_start: its first frame, counted from the reference image.
        reference_CFHW: normalised latents of [reference image, grey, grey, ...].
        features_PTLD: audio features of each voice, of the whole utterance and a tail of silence.
        num_frames: video frames that the utterance covers.
    """

    opening_CFHW: Tensor
    later_CFHW: Tensor
    later_start: int
    reference_CFHW: Tensor
    features_PTLD: Tensor
    num_frames: int


@torch.no_grad()
def encode_avatar(
    split: str, seed: int, length: int, vae: WanVAE, encoder: AudioEncoder
) -> TeacherClip:
    """Render and encode what one avatar does.

    Args:
        split: ``train`` or ``heldout``.
        seed: of the avatar, its voice and its motion.
        length: of both clips, video frames.
        vae: the video codec.
        encoder: the audio encoder.

    Returns:
        Its latents and features in float16.
    """
    stream = open_stream(split, seed, "teacher")
    if stream.random() < SILENT_SHARE:
        waveform_S = torch.zeros(round(SAMPLE_RATE * SECONDS))
    else:
        waveform_S = draw_speech(split, seed, SECONDS)
        # A voice that falls silent before the end of a take, as long as a chunk may be.
        if stream.random() < 0.25:
            stop = count_samples(int(stream.integers(60, 200)), SAMPLE_RATE)
            waveform_S[stop:] = 0
    total = round(SECONDS * FPS)
    later_start = int(stream.integers(10, total - length + 1))
    mouth = mouth_curve(waveform_S)
    avatar = draw_avatar(split, seed)
    motion = draw_motion(avatar, split, seed, total, mouth.opening_T)

    def show(start: int, stop: int) -> Tensor:
        return render(avatar, motion.select(start, stop), mouth.select(start, stop))

    return _encode(show, [waveform_S], later_start, length, vae, encoder)


@torch.no_grad()
def encode_pair(
    split: str, seed: int, length: int, vae: WanVAE, encoder: AudioEncoder
) -> TeacherClip:
    """Render and encode what two avatars do side by side.

    Args:
        split: ``train`` or ``heldout``.
        seed: of the pair.
        length: of both clips, video frames.
        vae: the video codec.
        encoder: the audio encoder.

    Returns:
        Their latents and features in float16.
    """
    stream = open_stream(split, seed, "teacher pair")
    total = round(SECONDS * FPS)
    pair = draw_pair(split, seed, total, TURNS[stream.integers(len(TURNS))])
    later_start = int(stream.integers(10, total - length + 1))
    return _encode(
        lambda start, stop: pair.frames_CTHW[:, start:stop],
        [clip.waveform_S for clip in pair.clips],
        later_start,
        length,
        vae,
        encoder,
    )


def _encode(
    show: Callable[[int, int], Tensor],
    waveforms: Sequence[Tensor],
    later_start: int,
    length: int,
    vae: WanVAE,
    encoder: AudioEncoder,
) -> TeacherClip:
    """Encode a take, of which ``show`` gives the frames from one on to another."""
    first = show(0, 1)
    grey = first.new_zeros(3, 4 * GREY_LATENTS, *first.shape[2:])
    reference = vae.encode(torch.cat((first, grey), 1).unsqueeze(0))[0]
    missing = count_latent_frames(length) - reference.shape[1]
    reference = torch.cat((reference, reference[:, -1:].expand(-1, max(0, missing), -1, -1)), 1)
    voices = [
        encode_speech(
            Waveform(samples_CS=waveform_S.unsqueeze(0), sample_rate=SAMPLE_RATE), encoder
        ).features
        for waveform_S in waveforms
    ]
    opening, later = (
        vae.encode(show(start, start + length).unsqueeze(0))[0].half() for start in (0, later_start)
    )
    return TeacherClip(
        opening_CFHW=opening,
        later_CFHW=later,
        later_start=later_start,
        reference_CFHW=reference.half(),
        features_PTLD=torch.stack([voice.features_TLD for voice in voices]).half(),
        num_frames=voices[0].num_frames,
    )


def save_clip(path: Path, clip: TeacherClip) -> None:
    """Write a clip; the name appears only when the file is whole."""
    partial = path.with_suffix(".part")
    tensors = {
        "opening": clip.opening_CFHW.contiguous(),
        "later": clip.later_CFHW.contiguous(),
        "reference": clip.reference_CFHW.contiguous(),
        "features": clip.features_PTLD.contiguous(),
        "later_start": torch.tensor(clip.later_start),
        "num_frames": torch.tensor(clip.num_frames),
    }
    save_file(tensors, partial)
    partial.replace(path)


def read_clip(path: Path) -> TeacherClip:
    """Read what ``save_clip`` wrote."""
    tensors = load_file(path)
    return TeacherClip(
        opening_CFHW=tensors["opening"],
        later_CFHW=tensors["later"],
        later_start=int(tensors["later_start"]),
        reference_CFHW=tensors["reference"],
        features_PTLD=tensors["features"],
        num_frames=int(tensors["num_frames"]),
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.teacher_data", description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the encoded avatars")
    parser.add_argument("--avatars", type=int, default=600, help="seeds 0 to this, exclusive")
    parser.add_argument(
        "--long-every", type=int, default=3, help="one avatar in this many has long clips; 0: none"
    )
    parser.add_argument("--pairs", type=int, default=160, help="seeds 0 to this, exclusive")
    parser.add_argument("--part", type=int, default=0, help="of several processes, which one")
    parser.add_argument("--parts", type=int, default=1, help="how many processes share the work")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    vae, encoder = load_vae(arguments.vae), load_audio_encoder(arguments.encoder)
    arguments.out.mkdir(parents=True, exist_ok=True)
    work = [(f"{seed:06d}", encode_avatar, seed) for seed in range(arguments.avatars)]
    work += [(f"pair_{seed:06d}", encode_pair, seed) for seed in range(arguments.pairs)]
    for name, encode, seed in tqdm(
        work[arguments.part :: arguments.parts], desc="clips", mininterval=10
    ):
        path = arguments.out / f"{name}.safetensors"
        if not path.exists():
            is_short = encode is encode_avatar and (
                arguments.long_every == 0 or seed % arguments.long_every
            )
            length = SHORT_FRAMES if is_short else LONG_FRAMES
            save_clip(path, encode("train", seed, length, vae, encoder))


if __name__ == "__main__":
    main()
