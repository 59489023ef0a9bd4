"""Train the embedded teacher: a Wan transformer and its audio adapter, by flow matching.

    python -m training.teacher --data FOLDER --run FOLDER --out models

In: what ``training.teacher_data`` wrote. Out: ``diffusion_models/turbotalk_tiny_teacher`` and
``model_patches/turbotalk_tiny_adapter``, in the layouts of the public files, and a JSON log.

The network learns to predict the velocity (noise - data) of chunks at every noise level, given the
reference image, the clean latents of the motion frames, and the voice. One sample in eight hears
nothing (zero windows), which is what audio guidance compares with at inference. The run goes
through short chunks first and ends on chunks of the default length.

Axes: B batch, C channels, F latent frames, H height, W width, K window, L layers, D width.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.batch import CONTEXT_LATENTS, Batch
from training.data.precompute import weigh_places
from training.losses import flow_loss
from training.networks import TalkingModel
from training.optimization import Ema, Optimizers, cosine_factor
from training.teacher_data import LONG_FRAMES, SHORT_FRAMES, TeacherClip, read_clip
from turbotalk_core.audio.windows import take_windows
from turbotalk_core.geometry import SPATIAL_STRIDE, count_latent_frames
from turbotalk_core.library import ADAPTER, TEACHER
from turbotalk_core.model.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.model.checkpoint import load_dit, save_adapter, save_dit
from turbotalk_core.model.wan import WanConfig, WanModel
from turbotalk_core.regions import box_mask, fit_regions
from turbotalk_core.sampling.schedule import shift_sigmas
from turbotalk_core.types import AudioFeatures, Chunk

logger = logging.getLogger(__name__)

LARGEST_MARGIN = 0.25  # of a half's side that a region leaves free at most


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """Everything that decides the trained weights, besides the data.

    Attributes:
        seed: of weights, batches and noise.
        dim: width; ffn_dim, num_heads, num_layers: as in ``WanConfig``.
        hidden_dim, num_tokens, token_dim: of the audio adapter.
        short_steps, short_batch: updates on 33-frame chunks and chunks per update.
        long_steps, long_batch: the same on 81-frame chunks, afterwards.
        learning_rate: peak, of both optimisers.
        weight_decay: of both.
        shift: of the noise levels; more of them near 1 as it grows.
        audio_dropout: share of samples that hear nothing.
        pair_every: one update in this many is on pairs, half as many as of single avatars.
    """

    seed: int = 0
    dim: int = 192
    ffn_dim: int = 512
    num_heads: int = 6
    num_layers: int = 6
    hidden_dim: int = 128
    num_tokens: int = 4
    token_dim: int = 64
    short_steps: int = 3400
    short_batch: int = 8
    long_steps: int = 1850
    long_batch: int = 5
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    shift: float = 3.0
    audio_dropout: float = 0.125
    pair_every: int = 4


def build_networks(recipe: TeacherRecipe, frame_width: int) -> TalkingModel:
    """Draw the two networks that are trained together, from torch's global generator.

    Args:
        recipe: gives their sizes.
        frame_width: what the audio encoder says per video frame.

    Returns:
        The networks.
    """
    projection = AudioProjection(
        AudioAdapterConfig(
            frame_width=frame_width,
            hidden_dim=recipe.hidden_dim,
            num_tokens=recipe.num_tokens,
            token_dim=recipe.token_dim,
        )
    )
    dit = WanModel(
        WanConfig(
            dim=recipe.dim,
            ffn_dim=recipe.ffn_dim,
            num_heads=recipe.num_heads,
            num_layers=recipe.num_layers,
            text_dim=32,
            image_dim=None,
            audio_heads=recipe.num_heads,
            audio_token_dim=recipe.token_dim,
        )
    )
    dit.initialize()
    return TalkingModel(dit, projection)


def draw_batch(
    clips: Sequence[TeacherClip],
    weights_HW: Sequence[Tensor],
    num_frames: int,
    size: int,
    recipe: TeacherRecipe,
    generator: torch.Generator,
) -> Batch:
    """Draw chunks and what is told about them.

    Args:
        clips: encoded avatars, or encoded pairs, each at least ``num_frames`` long.
        weights_HW: of each, from ``weigh_places``.
        num_frames: length of the chunks, video frames.
        size: chunks in the batch.
        recipe: gives the audio dropout.
        generator: of all draws.

    Returns:
        The batch.
    """
    num_latents = count_latent_frames(num_frames)
    rows: list[tuple[Tensor, ...]] = []
    for _ in range(size):
        index, later, more, silence = torch.rand(4, generator=generator).tolist()
        place = int(index * len(clips))
        clip = clips[place]
        is_later = later < 0.5
        latents = (clip.later_CFHW if is_later else clip.opening_CFHW)[:, :num_latents].float()
        start = clip.later_start if is_later else 0
        num_pinned = CONTEXT_LATENTS if is_later or more < 0.3 else 1
        reference = clip.reference_CFHW[:, :num_latents].float()
        mask = torch.zeros(4, *reference.shape[1:])
        mask[:, 0] = 1
        chunk = Chunk(
            index=0,
            start=start,
            stop=start + num_frames,
            keep_start=start,
            keep_stop=start + num_frames,
        )
        windows = [
            take_windows(AudioFeatures(features_TLD=voice, num_frames=clip.num_frames), chunk)
            for voice in clip.features_PTLD.float()
        ]
        heard = float(silence >= recipe.audio_dropout)
        rows.append(
            (
                latents,
                torch.cat((mask, reference)),
                torch.stack([window.first_KLD for window in windows]) * heard,
                torch.stack([window.later_FKLD for window in windows]) * heard,
                torch.arange(num_latents) < num_pinned,
                weights_HW[place],
            )
        )
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    latents_BCFHW, reference_BCFHW, first_BPKLD, later_BPFKLD, pinned_BF, weight_BHW = columns
    height, width = latents_BCFHW.shape[3:]
    is_pair = first_BPKLD.shape[1] > 1
    return Batch(
        latents_BCFHW=latents_BCFHW,
        reference_BCFHW=reference_BCFHW,
        first_BPKLD=first_BPKLD,
        later_BPFKLD=later_BPFKLD,
        pinned_BF=pinned_BF,
        weight_BHW=weight_BHW,
        regions_PHW=draw_halves(height, width, generator) if is_pair else None,
    )


def draw_halves(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a box in each half of a picture, as a user would around each of two avatars.

    Args:
        rows: height of the latents.
        columns: their width.
        generator: of the margins, up to a quarter of a half on each side.

    Returns:
        [3, H, W]: left, right and background.
    """
    height, width = SPATIAL_STRIDE * rows, SPATIAL_STRIDE * columns
    half = width // 2
    masks = []
    for start in (0, half):
        margins = LARGEST_MARGIN * torch.rand(4, generator=generator)
        top, bottom = (margins[:2] * height).int().tolist()
        left, right = (margins[2:] * half).int().tolist()
        masks.append(
            box_mask((height, width), top, start + left, height - bottom, start + half - right)
        )
    return fit_regions(masks, height, width)


def teacher_loss(
    networks: TalkingModel, batch: Batch, sigma_B: Tensor, noise_BCFHW: Tensor
) -> Tensor:
    """Flow matching at one noise level per chunk.

    Pinned latents stay clean in the input, as at inference, and do not count.

    Args:
        networks: to be trained.
        batch: clean chunks and their conditions.
        sigma_B: noise level of each chunk.
        noise_BCFHW: standard normal.

    Returns:
        Weighted mean squared error per latent value.
    """
    noisy = batch.add_noise(batch.latents_BCFHW, noise_BCFHW, sigma_B)
    velocity = networks(noisy, sigma_B, batch)
    target = noise_BCFHW - batch.latents_BCFHW
    return flow_loss(velocity, target, batch.free_B1F11, batch.weight_BHW)


def build_optimizers(networks: TalkingModel, recipe: TeacherRecipe) -> Optimizers:
    """Muon for the matrices inside the blocks, AdamW for the rest of both networks."""
    matrices = [w for block in networks.dit.blocks for w in block.parameters() if w.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    return Optimizers(
        matrices,
        [weight for weight in networks.parameters() if id(weight) not in chosen],
        matrix_rate=recipe.learning_rate,
        other_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )


class Run:
    """A training run that can be stopped and taken up again.

    Args:
        recipe: all settings.
        clips: encoded avatars.
        compiles: use ``torch.compile``.
    """

    def __init__(
        self, recipe: TeacherRecipe, clips: Sequence[TeacherClip], *, compiles: bool
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.clips = list(clips)
        self.weights = [weigh_places(clip.opening_CFHW, clip.later_CFHW) for clip in clips]
        long = count_latent_frames(LONG_FRAMES)
        self.pairs = [i for i, clip in enumerate(clips) if len(clip.features_PTLD) > 1]
        self.avatars = [i for i, clip in enumerate(clips) if len(clip.features_PTLD) == 1]
        self.long = [i for i in self.avatars if clips[i].opening_CFHW.shape[1] == long]
        features = clips[0].features_PTLD
        self.networks = build_networks(recipe, features.shape[2] * features.shape[3])
        self.ema = Ema(self.networks)
        self.optimizers = build_optimizers(self.networks, recipe)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.step = 0
        self.log: list[dict[str, float]] = []
        self._loss = torch.compile(teacher_loss) if compiles else teacher_loss

    @property
    def num_steps(self) -> int:
        """Updates of the whole run."""
        return self.recipe.short_steps + self.recipe.long_steps

    def advance(self) -> float:
        """Make one update; returns the loss."""
        recipe = self.recipe
        is_short = self.step < recipe.short_steps
        frames = SHORT_FRAMES if is_short else LONG_FRAMES
        size = recipe.short_batch if is_short else recipe.long_batch
        places = self.avatars if is_short else self.long
        if self.pairs and self.step % recipe.pair_every == 0:
            places, size = self.pairs, max(1, size // 2)
        clips = [self.clips[i] for i in places]
        weights = [self.weights[i] for i in places]
        batch = draw_batch(clips, weights, frames, size, recipe, self.generator)
        # One uniform draw per chunk, spread over the batch, halves the variance of the loss.
        spread = (torch.arange(size) + torch.rand(size, generator=self.generator)) / size
        sigma_B = shift_sigmas(spread, recipe.shift)
        noise = torch.randn(batch.latents_BCFHW.shape, generator=self.generator)
        loss = self._loss(self.networks, batch, sigma_B, noise)
        loss.backward()
        self.optimizers.step(cosine_factor(self.step, self.num_steps, num_warmup_steps=40))
        self.ema.update(self.networks)
        self.step += 1
        return loss.item()

    def begin_with(self, folder: Path) -> None:
        """Take the weights of an earlier run, as ``export`` wrote them, instead of random ones."""
        dit, projection = load_dit(
            folder / "diffusion_models" / TEACHER, folder / "model_patches" / ADAPTER
        )
        assert projection is not None
        self.networks.dit.load_state_dict(dit.state_dict())
        self.networks.projection.load_state_dict(projection.state_dict())
        self.ema = Ema(self.networks)

    def save(self, path: Path) -> None:
        """Write everything that the next update depends on."""
        partial = path.with_suffix(".part")
        state = {
            "step": self.step,
            "log": self.log,
            "networks": self.networks.state_dict(),
            "ema": self.ema.weights,
            "ema_updates": self.ema.num_updates,
            "optimizers": self.optimizers.state_dict(),
            "generator": self.generator.get_state(),
        }
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what ``save`` wrote."""
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.step, self.log = state["step"], state["log"]
        self.networks.load_state_dict(state["networks"])
        self.ema.weights, self.ema.num_updates = state["ema"], state["ema_updates"]
        self.optimizers.load_state_dict(state["optimizers"])
        self.generator.set_state(state["generator"])

    def export(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write the averaged weights as the two model files."""
        current = {k: v.detach().clone() for k, v in self.networks.state_dict().items()}
        self.ema.copy_to(self.networks)
        dit, projection = self.networks.dit, self.networks.projection
        save_dit(folder / "diffusion_models" / TEACHER, dit, settings)
        save_adapter(folder / "model_patches" / ADAPTER, dit, projection, {})
        self.networks.load_state_dict(current)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.teacher", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of teacher_data")
    parser.add_argument("--out", type=Path, required=True, help="models folder to write into")
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoint and log")
    parser.add_argument("--init", type=Path, help="models folder to begin with; default: at random")
    parser.add_argument("--seed", type=int, default=TeacherRecipe.seed)
    parser.add_argument("--short-steps", type=int, default=TeacherRecipe.short_steps)
    parser.add_argument("--long-steps", type=int, default=TeacherRecipe.long_steps)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs g++)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    recipe = TeacherRecipe(
        seed=arguments.seed,
        short_steps=arguments.short_steps,
        long_steps=arguments.long_steps,
    )
    clips = [read_clip(path) for path in sorted(arguments.data.glob("*.safetensors"))]
    run = Run(recipe, clips, compiles=arguments.compile)
    arguments.run.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.run / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)
    elif arguments.init is not None:
        run.begin_with(arguments.init)
    settings = {
        "kind": "teacher",
        "steps": 20,
        "schedule": "reference",
        "update": "euler",
        "shift": recipe.shift,
        "audio_guidance_scale": 1.5,
        "height": 128,
        "width": 128,
        "chunk_frames": LONG_FRAMES if recipe.long_steps else SHORT_FRAMES,
        "num_motion_frames": 9,
    }
    started, total = time.monotonic(), 0.0
    bar = tqdm(total=run.num_steps, initial=run.step, desc="teacher", mininterval=10)
    while run.step < run.num_steps:
        total += run.advance()
        bar.update()
        if run.step % 50 == 0:
            seconds = round(time.monotonic() - started)
            run.log.append({"step": run.step, "loss": round(total / 50, 5), "seconds": seconds})
            total = 0.0
            logger.info("%s", run.log[-1])
        if run.step % 200 == 0 or run.step == run.num_steps:
            run.save(checkpoint)
            run.export(arguments.out, settings)
    (arguments.run / "teacher.json").write_text(
        json.dumps(
            {
                "recipe": asdict(recipe),
                "begins_with": "random" if arguments.init is None else "earlier weights",
                "avatars": len(run.avatars),
                "pairs": len(run.pairs),
                "log": run.log,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
