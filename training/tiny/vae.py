"""Training of the embedded video VAE on rendered avatars.

    python -m training.tiny.vae --out models/vae/turbotalk_tiny_vae.safetensors

The output is a safetensors file in the layout of the public Wan 2.1 VAE, with a JSON log beside it
that includes the log of a run it continues. Training uses small crops of short clips: the VAE is
convolutional, so the result works for any size and length. Single frames come first, because they
cost a thirtieth of a clip and suffice for most of the picture quality. Clips follow, for motion.

The loss is L1 on pixels (more where the mouth opens), on their spatial differences (edges) and on
their temporal differences (motion), plus a light Kullback-Leibler term on the *normalised* latents.
With it, latents have mean near zero and variance near one after the fixed Wan statistics are
applied, as the diffusion model expects; channels that contribute little carry no information.

Generated latents have small errors, and a decoder trained only on encoded latents turns these into
flicker in the whole picture. So in a last run only the decoder is trained, on latents with noise.
The encoder is unchanged, so models that were trained on its latents remain valid:

    python -m training.tiny.vae --out FILE --init FILE --decoder-noise 0.25 --image-steps 0

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from training.avatars.avatars import draw_avatar
from training.avatars.motion import draw_motion
from training.avatars.mouth import mouth_curve
from training.avatars.portrait import render
from training.avatars.speech import draw_speech
from training.avatars.synthetic import SyntheticClip
from training.engine.optimizers import Average, Optimizers, check_norm, rate_factor
from training.evaluation.mouth import mouth_share
from training.evaluation.scores import average_scores, draw_pairs, score_pair
from training.outputs import hold_files
from turbotalk_core.checkpoints.networks import load_vae, save_vae
from turbotalk_core.cli.arguments import Parser, parse_number, parse_threads, run
from turbotalk_core.errors import RequestError
from turbotalk_core.geometry import FPS, LATENT_CHANNELS, SPATIAL_STRIDE, count_latent_frames
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.safe_io.atomic import write_text

logger = logging.getLogger(__name__)

SNAPSHOT_STEPS = 500


@dataclass(frozen=True, kw_only=True)
class VaeRecipe:
    """All settings that determine the trained weights.

    Attributes:
        seed: seed of weights, data order and noise.
        dim: width of the VAE at full resolution.
        num_clips: rendered clips from which crops are cut.
        image_steps, image_batch: updates on single frames, and crops per update.
        clip_steps, clip_batch: updates on clips afterwards, and crops per update.
        num_frames: frames per clip, 4n + 1.
        crop_size: side of a crop, pixels.
        learning_rate: peak learning rate.
        kl_weight: weight of the Kullback-Leibler divergence per latent element.
        mouth_weight: additional weight of pixels where the mouth is open at some time of a clip;
            all pixels have weight 1. The open mouth is small and rare, and without this weight the
            VAE does not reconstruct it.
        edge_weight: weight of spatial differences.
        motion_weight: weight of temporal differences.
        decoder_noise: trains only the decoder, on mean latents with noise whose standard deviation
            is drawn for each crop between 0 and this value. None trains the whole VAE on samples of
            the posterior.

    Raises:
        RequestError: if a number is out of range.
        GeometryError: if ``num_frames`` is not 4n + 1.
    """

    seed: int = 0
    dim: int = 8
    num_clips: int = 400
    image_steps: int = 2500
    image_batch: int = 8
    clip_steps: int = 3000
    clip_batch: int = 2
    num_frames: int = 33
    crop_size: int = 56
    learning_rate: float = 3e-3
    kl_weight: float = 2e-3
    mouth_weight: float = 8.0
    edge_weight: float = 0.5
    motion_weight: float = 2.0
    decoder_noise: float | None = None

    def __post_init__(self) -> None:
        count_latent_frames(self.num_frames)
        counts = (self.num_clips, self.image_batch, self.clip_batch)
        if min(counts) < 1 or min(self.seed, self.image_steps, self.clip_steps) < 0:
            raise RequestError(
                f"got {self.num_clips} clips, batches of {self.image_batch} and {self.clip_batch}, "
                f"{self.image_steps} and {self.clip_steps} steps and the seed {self.seed}; clips "
                "and batches are 1 or more, steps and seed 0 or more"
            )
        if self.crop_size < SPATIAL_STRIDE or self.crop_size % SPATIAL_STRIDE:
            raise RequestError(
                f"got crops of {self.crop_size} pixels; give a multiple of {SPATIAL_STRIDE}"
            )
        if not self.learning_rate > 0:
            raise RequestError(f"got the learning rate {self.learning_rate}; it must be above 0")


def draw_frames(split: str, seed: int, num_frames: int, *, seconds: float = 2.0) -> Tensor:
    """Render the part of an utterance with the most mouth motion.

    Args:
        split: ``train`` or ``heldout``.
        seed: seed of avatar, voice and motion.
        num_frames: frames to render.
        seconds: length of the utterance.

    Returns:
        uint8 [3, T, 128, 128].
    """
    mouth = mouth_curve(draw_speech(split, seed, seconds))
    length = round(seconds * FPS)
    avatar = draw_avatar(split, seed)
    motion = draw_motion(avatar, split, seed, length, mouth.opening_T)
    # The span with the most motion: frames with a resting mouth are the least useful for training.
    activity = F.avg_pool1d(
        mouth.opening_T.diff(prepend=mouth.opening_T[:1]).abs()[None], num_frames, 1
    )[0]
    start = int(activity.argmax())
    frames = render(
        avatar, motion.select(start, start + num_frames), mouth.select(start, start + num_frames)
    )
    return ((frames + 1) * 127.5).round().to(torch.uint8)


def cut_crops(
    pool_NCTHW: Tensor, batch_size: int, crop_size: int, generator: torch.Generator
) -> Tensor:
    """Cut random crops, mirrored half of the time, from random clips of a uint8 pool.

    Args:
        pool_NCTHW: the clips.
        batch_size: number of crops.
        crop_size: side of a crop, pixels.
        generator: source of all random numbers.

    Returns:
        Crops [B, 3, T, crop, crop], float in [-1, 1].
    """
    num_clips, size = pool_NCTHW.shape[0], pool_NCTHW.shape[-1]
    crops = []
    for _ in range(batch_size):
        clip = int(torch.randint(num_clips, (1,), generator=generator))
        # The mean of two uniform numbers favours the middle, where the face is.
        top, left = (torch.rand(2, 2, generator=generator).mean(1) * (size - crop_size + 1)).long()
        crop = pool_NCTHW[clip, :, :, top : top + crop_size, left : left + crop_size]
        crops.append(crop.flip(-1) if torch.rand(1, generator=generator) < 0.5 else crop)
    return torch.stack(crops).float() / 127.5 - 1


def vae_loss(
    vae: WanVAE, frames_BCTHW: Tensor, noise_BCFHW: Tensor, recipe: VaeRecipe
) -> tuple[Tensor, Tensor]:
    """Compute the loss of one batch.

    Args:
        vae: the VAE in training.
        frames_BCTHW: frames in [-1, 1].
        noise_BCFHW: noise in the shape of the latents: standard normal for samples of the
            posterior; if only the decoder is trained, the noise to add to mean latents.
        recipe: recipe with the weights of the terms.

    Returns:
        The loss, and the mean squared error of the reconstruction alone (detached).
    """
    offset, scale = (x.view(-1, 1, 1, 1) for x in (vae.latent_mean_C, vae.latent_std_C))
    if recipe.decoder_noise is None:
        mean, log_variance = vae.posterior(frames_BCTHW)
        normalised = (mean - offset) / scale
        log_variance = log_variance.clamp(-14, 6) - 2 * scale.log()
        sample = normalised + noise_BCFHW * (0.5 * log_variance).exp()
        kl = 0.5 * (normalised.square() + log_variance.exp() - 1 - log_variance).mean()
    else:
        with torch.no_grad():
            mean, _ = vae.posterior(frames_BCTHW)
        sample = (mean - offset) / scale + noise_BCFHW
        kl = torch.zeros(())
    output = vae.reconstruct(sample * scale + offset)
    error = output - frames_BCTHW
    mouth = mouth_share(frames_BCTHW.transpose(0, 1)).amax(1).clamp(max=1)  # [B, H, W]
    mouth = F.max_pool2d(mouth, 3, stride=1, padding=1)[:, None, None]
    loss = (error.abs() * (1 + recipe.mouth_weight * mouth)).mean() + recipe.kl_weight * kl
    loss = loss + recipe.edge_weight * (
        error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    )
    if frames_BCTHW.shape[2] > 1:
        loss = loss + recipe.motion_weight * error.diff(dim=2).abs().mean()
    return loss, error.detach().square().mean()


def train_vae(
    recipe: VaeRecipe,
    pool_NCTHW: Tensor,
    *,
    initial: WanVAE | None = None,
    compiles: bool = False,
    snapshot: Path | None = None,
) -> tuple[WanVAE, list[dict]]:
    """Train a VAE.

    Args:
        recipe: all settings.
        pool_NCTHW: uint8 clips from which crops are cut.
        initial: VAE to continue from, changed in place; None for random weights.
        compiles: whether to use ``torch.compile`` (about 1.8 times faster, equal up to rounding).
        snapshot: file for the averaged weights so far, so that a stopped run is not lost.

    Returns:
        The VAE with averaged weights, and the log: one entry per hundred steps.
    """
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    if initial is None:
        vae = WanVAE(recipe.dim)
        vae.initialize()
    else:
        vae = initial.requires_grad_(True)
    if recipe.decoder_noise is not None:
        vae.encoder.requires_grad_(False)
        vae.conv1.requires_grad_(False)
    weights = dict(vae.named_parameters())
    average = Average(weights, decay=0.998, grows=True)
    num_steps = recipe.image_steps + recipe.clip_steps
    optimizers = _build_optimizers(weights, recipe.learning_rate)
    clip_loss = torch.compile(vae_loss) if compiles else vae_loss
    log: list[dict] = []
    squared_error, started = 0.0, time.monotonic()
    bar = tqdm(range(num_steps), desc="vae", mininterval=10)
    for step in bar:
        is_image = step < recipe.image_steps
        num_frames = 1 if is_image else recipe.num_frames
        batch_size = recipe.image_batch if is_image else recipe.clip_batch
        # A single frame may be any frame of a clip; a clip is always used whole.
        first = int(torch.randint(pool_NCTHW.shape[2] - num_frames + 1, (1,), generator=generator))
        frames = cut_crops(
            pool_NCTHW[:, :, first : first + num_frames], batch_size, recipe.crop_size, generator
        )
        side = recipe.crop_size // SPATIAL_STRIDE
        noise = torch.randn(
            batch_size, LATENT_CHANNELS, count_latent_frames(num_frames), side, side,
            generator=generator,
        )  # fmt: skip
        if recipe.decoder_noise is not None:
            levels = torch.rand(batch_size, 1, 1, 1, 1, generator=generator)
            noise = recipe.decoder_noise * levels * noise
        loss, error = (vae_loss if is_image else clip_loss)(vae, frames, noise, recipe)
        loss.backward()
        check_norm(optimizers.step(rate_factor(step, num_steps, num_warmup_steps=30), limit=1.0))
        average.update(weights)
        squared_error += float(error)
        if (step + 1) % 100 == 0:
            psnr = -10 * torch.log10(torch.tensor(squared_error / 100 / 4)).item()
            squared_error = 0.0
            log.append(
                {
                    "step": step + 1,
                    "loss": round(loss.item(), 5),
                    "psnr": round(psnr, 2),
                    "seconds": round(time.monotonic() - started),
                }
            )
            bar.set_postfix(log[-1])
        if snapshot is not None and (step + 1) % SNAPSHOT_STEPS == 0:
            averaged = copy.deepcopy(vae)
            average.copy_to(dict(averaged.named_parameters()))
            save_vae(snapshot, averaged, settings={"recipe": asdict(recipe), "step": step + 1})
    average.copy_to(weights)
    return vae, log


def _build_optimizers(weights: Mapping[str, nn.Parameter], rate: float) -> Optimizers:
    """Build Muon for the kernels that are trained, AdamW for gains and biases."""
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    kernels = {n: w for n, w in trained.items() if w.ndim > 1 and w[0].numel() > 1}
    # Kernels first: the order determines the rounding of the norm, and this is the shipped run's.
    return Optimizers(
        {**kernels, **trained}, kernels, rate=rate, betas=(0.9, 0.99), weight_decay=0.0
    )


@torch.no_grad()
def score_vae(vae: WanVAE, clips: Sequence[SyntheticClip]) -> dict[str, float]:
    """Score the reconstruction of whole clips, which limits every model of the latents.

    Args:
        vae: the VAE.
        clips: true renders of 4n + 1 frames.

    Returns:
        ``psnr`` in dB; ``sync_correlation`` of the mouth measured in the reconstruction; mean
        ``edge_ratio`` and ``motion_ratio`` to the true clips; ``latent_mean`` and ``latent_std`` of
        the normalised latents.
    """
    scores, latents = [], []
    for clip in clips:
        latent = vae.encode(clip.frames_CTHW.unsqueeze(0))
        scores.append(score_pair(0, clip, vae.decode(latent)[0]))
        latents.append(latent.flatten())
    flat = torch.cat(latents)
    means = average_scores(scores)
    return {
        "psnr": round(means["psnr"], 2),
        "sync_correlation": round(means["sync_correlation"], 4),
        "motion_ratio": round(means["motion_ratio"], 4),
        "edge_ratio": round(means["edge_ratio"], 4),
        "latent_mean": round(float(flat.mean()), 4),
        "latent_std": round(float(flat.std()), 4),
    }


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(prog="python -m training.tiny.vae", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=VaeRecipe.seed)
    parser.add_argument("--init", type=Path, help="VAE file to go on from")
    parser.add_argument("--frames", type=int, default=VaeRecipe.num_frames, help="of each clip")
    parser.add_argument("--clip-batch", type=int, default=VaeRecipe.clip_batch)
    parser.add_argument("--crop", type=int, default=VaeRecipe.crop_size, help="pixels")
    parser.add_argument("--learning-rate", type=parse_number, default=VaeRecipe.learning_rate)
    parser.add_argument("--mouth-weight", type=parse_number, default=VaeRecipe.mouth_weight)
    parser.add_argument("--motion-weight", type=parse_number, default=VaeRecipe.motion_weight)
    parser.add_argument(
        "--decoder-noise",
        type=parse_number,
        help="train the decoder alone, on latents with noise up to it",
    )
    parser.add_argument("--image-steps", type=int, default=VaeRecipe.image_steps)
    parser.add_argument("--clip-steps", type=int, default=VaeRecipe.clip_steps)
    parser.add_argument("--clips", type=int, default=VaeRecipe.num_clips)
    parser.add_argument("--snapshot", type=Path, help="file for the weights of a run on its way")
    parser.add_argument("--threads", type=parse_threads, default=2, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs g++)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    return run(lambda: _train(arguments))


def _train(arguments: argparse.Namespace) -> None:
    record = arguments.out.with_suffix(".json")
    if arguments.out.suffix != ".safetensors":
        raise RequestError(f"got --out {arguments.out}; its name must end in .safetensors")
    with hold_files(arguments.out, record, arguments.snapshot):
        _train_and_write(arguments, record)


def _train_and_write(arguments: argparse.Namespace, record_file: Path) -> None:
    recipe = VaeRecipe(
        seed=arguments.seed,
        num_clips=arguments.clips,
        image_steps=arguments.image_steps,
        clip_steps=arguments.clip_steps,
        clip_batch=arguments.clip_batch,
        num_frames=arguments.frames,
        crop_size=arguments.crop,
        learning_rate=arguments.learning_rate,
        mouth_weight=arguments.mouth_weight,
        motion_weight=arguments.motion_weight,
        decoder_noise=arguments.decoder_noise,
    )
    initial = load_vae(arguments.init) if arguments.init else None
    pool = torch.stack(
        [
            draw_frames("train", seed, recipe.num_frames)
            for seed in tqdm(range(recipe.num_clips), desc="clips", mininterval=10)
        ]
    )
    vae, log = train_vae(
        recipe, pool, initial=initial, compiles=arguments.compile, snapshot=arguments.snapshot
    )
    scores = score_vae(vae, [clip for _, clip in draw_pairs(0, 12, 81)])
    logger.info("held-out: %s", scores)
    record = {"recipe": asdict(recipe), "scores": scores, "log": log}
    if arguments.init and (before := arguments.init.with_suffix(".json")).is_file():
        record["before"] = json.loads(before.read_text())
    save_vae(arguments.out, vae, settings={"recipe": asdict(recipe), "scores": scores})
    write_text(record_file, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
