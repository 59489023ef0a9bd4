"""Validation while a run trains: loss on held-out clips, and samples of the same clips each time.

Input: a prepared set that is not trained on. Output, in the folder of the run:

    validation.jsonl                     a line per validation
    validation/00000100/clip_0.mp4       samples with their sound, if the recipe names a VAE
    validation/00000100/sheet.png        real frames, and generated ones below them

Noise is the same in each validation, so that only the weights differ.

Axes: B batch, C channels, F latent frames, H height, W width, T video frames.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from training.avatars.synthetic import make_sheet
from training.data.reader import PreparedSet
from training.engine import distributed as ranks
from training.engine.engine import autocast
from training.engine.rng import Draws
from training.methods.flow_matching import FlowMatching
from training.methods.losses import flow_loss
from training.methods.method import Method, draw_noise
from training.methods.rollout import denoise_no_grad, last_step
from training.methods.timesteps import draw_sigmas
from training.models.batch import Batch
from training.recipe import ValidationChoice
from training.trainer.hooks import Hook
from turbotalk_core.checkpoints.networks import load_vae
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.safe_io.atomic import (
    make_folder,
    reports_disk_errors,
    whole_file,
    write_text,
)
from turbotalk_core.sampling.guidance import guide
from turbotalk_core.sampling.schedule import reference_sigmas
from turbotalk_core.sampling.steps import euler_step
from turbotalk_core.types import Waveform
from turbotalk_core.video.mux import assemble, quantize_frames

if TYPE_CHECKING:
    from training.trainer.trainer import Trainer

logger = logging.getLogger(__name__)

LOG, FOLDER = "validation.jsonl", "validation"
COLUMNS = 8  # frames of a clip in the contact sheet
NUM_LEVELS = 4  # noise levels of the held-out loss of a teacher


@torch.no_grad()
def sample_teacher(
    model: Callable[..., Tensor],
    batch: Batch,
    generator: torch.Generator,
    *,
    steps: int,
    shift: float,
    guidance_scale: float = 1.0,
    audio_guidance_scale: float = 1.0,
) -> Tensor:
    """Generate latents with a many-step model, as InfiniteTalk does.

    Args:
        model: a ``TalkingModel``.
        batch: conditions, and the given latent frames.
        generator: random stream of the noise.
        steps: number of steps.
        shift: flow shift of the schedule.
        guidance_scale: text guidance; without a text it is off.
        audio_guidance_scale: audio guidance.

    Returns:
        Clean latents, in the shape of the batch's.
    """
    latents = batch.pin(draw_noise(batch.latents_BCFHW, generator))
    for sigma, next_sigma in pairwise(reference_sigmas(steps, shift).tolist()):
        sigma_B = torch.full((batch.size,), sigma, device=latents.device)

        def predict(
            uses_text: bool,
            uses_audio: bool,
            noisy: Tensor = latents,
            sigma_B: Tensor = sigma_B,
        ) -> Tensor:
            return model(noisy, sigma_B, batch, uses_text=uses_text, uses_audio=uses_audio)

        velocity = guide(predict, guidance_scale if batch.has_text else 1.0, audio_guidance_scale)
        latents = batch.pin(euler_step(latents, velocity, sigma, next_sigma))
    return latents


@torch.no_grad()
def sample_method(
    model: Callable[..., Tensor], method: Method, batch: Batch, draws: Draws, steps: int
) -> Tensor:
    """Generate latents with the network that a method trains, by its own schedule.

    Args:
        model: student or teacher of the method.
        method: method with its schedule.
        batch: conditions, and the given latent frames.
        draws: random streams.
        steps: number of steps of a teacher.

    Returns:
        Clean latents, in the shape of the batch's.
    """
    if isinstance(method, FlowMatching):
        return sample_teacher(model, batch, draws.own("noise"), steps=steps, shift=method.shift)
    sigmas: Sequence[float] = method.sigmas()  # pyright: ignore[reportAttributeAccessIssue]
    noise = draw_noise(batch.latents_BCFHW, draws.own("noise"))
    noisy = denoise_no_grad(model, sigmas, batch, noise, draws.own("renoise"))
    return last_step(model, noisy, sigmas[-1], batch)


@torch.no_grad()
def measure_loss(
    model: Callable[..., Tensor], method: Method, batch: Batch, draws: Draws
) -> Tensor:
    """Compute the flow matching loss on real clips at fixed noise levels.

    Args:
        model: student or teacher of the method.
        method: method; a student is measured at the levels of its schedule.
        batch: real clips.
        draws: random streams.

    Returns:
        A scalar.
    """
    clean = batch.latents_BCFHW
    if isinstance(method, FlowMatching):
        levels = draw_sigmas(NUM_LEVELS, method.shift, draws, "levels").tolist()
    else:
        levels = method.sigmas()  # pyright: ignore[reportAttributeAccessIssue]
    losses = []
    for number, sigma in enumerate(levels):
        noise = draw_noise(clean, draws.own(f"noise of level {number}"))
        sigma_B = torch.full((batch.size,), sigma, device=clean.device)
        velocity = model(batch.add_noise(clean, noise, sigma_B), sigma_B, batch)
        losses.append(flow_loss(velocity, noise - clean, batch.free_B1F11))
    return torch.stack(losses).mean()


class ValidationHook(Hook):
    """Validation every few steps and at the end of each phase; does nothing without a section.

    Every rank makes the same network calls, because a sharded network needs all of them; rank 0
    writes.
    """

    def __init__(self) -> None:
        """Prepare; files are opened at the start of a phase."""
        self._heldout: PreparedSet | None = None
        self._vae: WanVAE | None = None

    def on_phase_start(self, trainer: Trainer) -> None:
        """Open the held-out set and the VAE, so that what is wrong with them is known at once."""
        choice = trainer.recipe.validate
        if choice is None:
            return
        phase = list(trainer.recipe.phases.values())[trainer.state.phase]
        num_frames = trainer.recipe.clip_of(phase).num_frames
        self._heldout = PreparedSet(choice.folder, num_frames=num_frames)
        if choice.vae is not None and self._vae is None and ranks.rank() == 0:
            self._vae = load_vae(choice.vae)

    def on_step_end(self, trainer: Trainer, terms: Mapping[str, float]) -> None:
        """Validate if it is time."""
        choice = trainer.recipe.validate
        if choice is not None and trainer.state.step % choice.every == 0:
            self._validate(trainer, choice)

    def on_phase_end(self, trainer: Trainer) -> None:
        """Validate after the last step, unless that was done."""
        choice = trainer.recipe.validate
        if choice is not None and trainer.state.step % choice.every != 0:
            self._validate(trainer, choice)

    def _validate(self, trainer: Trainer, choice: ValidationChoice) -> None:
        assert self._heldout is not None
        step, number = trainer.state.step, trainer.state.phase
        method, name = trainer.methods[number], list(trainer.recipe.phases)[number]
        role = "teacher" if isinstance(method, FlowMatching) else "student"
        model = trainer.engines[role].module
        folder = trainer.folder / FOLDER / f"{step:08d}"
        losses, motions, videos = [], [], []
        for clip in range(choice.clips):
            (draw,) = self._heldout.draw(0, clip, rank=0, world_size=1, size=1)
            batch = self._heldout.batch(0, clip, rank=0, world_size=1, size=1).to(trainer.device)
            draws, made = Draws(0, clip, 0), None
            with autocast(trainer.device, trainer.recipe.engine.precision):
                losses.append(float(measure_loss(model, method, batch, draws)))
                if choice.vae is not None:
                    made = sample_method(model, method, batch, draws, choice.steps)
            if made is None:
                continue
            motions.append(float(_motion(made) / _motion(batch.latents_BCFHW)))
            if self._vae is not None:
                vae = self._vae.to(trainer.device)
                sides = [decode_clip(vae, latents) for latents in (batch.latents_BCFHW, made)]
                self._vae = vae.to("cpu")
                write_clip(folder / f"clip_{clip}.mp4", sides[1], self._heldout.read_sound(draw))
                videos.append(sides)
        if ranks.rank() != 0:
            return
        terms: dict[str, Any] = {"heldout_loss": sum(losses) / len(losses)}
        if motions:
            terms["motion_ratio"] = sum(motions) / len(motions)
            _write_sheet(folder / "sheet.png", videos)
        _append(trainer.folder / LOG, {"step": step, "phase": name, **terms})
        values = ", ".join(f"{key} {value:.4f}" for key, value in terms.items())
        logger.info("step %d, %s of phase %s: %s", step, role, name, values)


def _motion(latents_BCFHW: Tensor) -> Tensor:
    return latents_BCFHW.float().diff(dim=2).abs().mean()


def write_clip(path: Path, frames_THWC: Tensor, sound: Waveform) -> None:
    """Write frames of 8 bits with their sound as an mp4.

    Args:
        path: file to write; its folder is created.
        frames_THWC: uint8 frames.
        sound: the voices.
    """
    make_folder(path.parent)
    assemble(path, [frames_THWC], sound)


@torch.no_grad()
def decode_clip(vae: WanVAE, latents_BCFHW: Tensor) -> Tensor:
    """Decode latents to frames of 8 bits.

    Args:
        vae: VAE on the device of the latents.
        latents_BCFHW: latents of one clip.

    Returns:
        uint8 [T, H, W, 3], on the CPU.
    """
    return torch.cat([quantize_frames(part) for part in vae.iter_decode(latents_BCFHW.float())])


def _write_sheet(path: Path, videos: Sequence[Sequence[Tensor]]) -> None:
    rows = []
    for frames_THWC in (side for sides in videos for side in sides):
        moments = torch.linspace(0, len(frames_THWC) - 1, COLUMNS).round().long()
        rows.append(frames_THWC[moments].permute(3, 0, 1, 2).float() / 127.5 - 1)
    height, width = (min(row.shape[axis] for row in rows) for axis in (2, 3))
    rows = [row[:, :, :height, :width] for row in rows]  # clips of several sizes
    make_folder(path.parent)
    with whole_file(path) as part, reports_disk_errors(path):
        Image.fromarray(make_sheet(rows, COLUMNS)).save(part)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line, and remove those of later steps, which a resumed run makes again."""
    lines = list(_read(path)) if path.is_file() else []
    kept = [json.dumps(old) for old in lines if old["step"] < line["step"]]
    write_text(path, "".join(f"{old}\n" for old in [*kept, json.dumps(dict(line))]))


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
