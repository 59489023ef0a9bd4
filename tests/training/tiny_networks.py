"""Talking models of a few thousand weights, chunks for them, and steps of a method with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.family import Networks, make_config, make_projection_config, seeded
from training.engine.engine import EngineSettings, PlainEngine
from training.engine.rng import Draws
from training.methods.method import Method, RoleSpec, prepare_role
from training.models.batch import Batch
from training.models.networks import TalkingModel
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanModel

FRAMES, ROWS, COLUMNS = 4, 4, 6
TEXT_WIDTH = 8
VIDEO_CONFIG = make_config(ffn_dim=16, num_layers=2, text_dim=TEXT_WIDTH, audio_token_dim=6)
AUDIO_CONFIG = make_projection_config(frame_width=6, token_dim=6)  # for a FakeEncoder
SIZE = 48
SHIPPED = {
    "steps": 2,
    "shift": 3.0,
    "audio_guidance_scale": 2.0,
    "height": SIZE,
    "width": SIZE,
    "chunk_frames": 17,
    "num_motion_frames": 5,
}


def make_model(seed: int = 0, num_layers: int = 2) -> TalkingModel:
    """Draw a model in which every weight, gate and shift has an effect."""
    with seeded(seed):
        dit = WanModel(replace(VIDEO_CONFIG, num_layers=num_layers))
        projection = AudioProjection(AUDIO_CONFIG)
    return TalkingModel(dit, projection)


def make_networks() -> Networks:
    """Make transformer, projection and VAE of a family to be written as files."""
    with seeded():
        model = WanModel(replace(VIDEO_CONFIG, num_layers=1))
        projection = AudioProjection(AUDIO_CONFIG)
        vae = WanVAE(1)
        vae.initialize()
    return model, projection, vae


def make_batch(size: int = 2, seed: int = 0, num_pinned: tuple[int, ...] = (1, 3)) -> Batch:
    """Draw chunks; ``num_pinned`` has the number of pinned first latents of each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pinned_B = torch.tensor([num_pinned[i % len(num_pinned)] for i in range(size)])
    return Batch(
        latents_BCFHW=draw(size, 16, FRAMES, ROWS, COLUMNS).half().float(),  # as a set stores them
        reference_BCFHW=draw(size, 20, FRAMES, ROWS, COLUMNS),
        first_BPKLD=draw(size, 1, 5, 2, 3),
        later_BPFKLD=draw(size, 1, FRAMES - 1, 8, 2, 3),
        pinned_BF=torch.arange(FRAMES) < pinned_B[:, None],
        text_BND=draw(size, 5, TEXT_WIDTH),
        null_text_BND=draw(size, 3, TEXT_WIDTH),
    )


def make_engines(
    method: Method,
    begin: Callable[[str], nn.Module] = lambda _: make_model(),
    *,
    learning_rate: float | None = None,
) -> dict[str, PlainEngine]:
    """Put the networks of a method into engines.

    Args:
        method: method with its roles.
        begin: function that returns the initial network of each role.
        learning_rate: learning rate instead of the method's own.
    """

    def build(role: str, spec: RoleSpec) -> PlainEngine:
        with seeded():
            network = prepare_role(spec, begin(role))
        rate = spec.learning.learning_rate if learning_rate is None else learning_rate
        settings = EngineSettings(learning_rate=rate, betas=spec.learning.betas)
        return PlainEngine(network, settings)

    return {role: build(role, spec) for role, spec in method.roles().items()}


def take_step(
    method: Method,
    engines: Mapping[str, PlainEngine],
    batch: Batch,
    step: int = 0,
    *,
    seed: int = 0,
    steps_optimizers: bool = True,
) -> dict[str, float]:
    """Make the updates of one step, as the trainer does; return the log by ``role/term``."""
    terms = {}
    for update in method.updates(step, batch, engines, Draws(seed, step, 0)):
        for role, engine in engines.items():
            engine.set_trainable(yes=role == update.role)
        total = 0.0
        for make_loss in update.losses:
            loss = make_loss()
            engines[update.role].backward(loss)
            total += loss.item()
        for role, engine in engines.items():
            engine.set_trainable(yes=True)
            others = [p.grad for p in engine.module.parameters() if role != update.role]
            assert all(grad is None for grad in others), f"{update.role} gave {role} a gradient"
        if steps_optimizers:
            engines[update.role].step(1.0)
        engines[update.role].module.zero_grad(set_to_none=True)
        terms |= {f"{update.role}/{name}": float(x) for name, x in update.log.items()}
        terms[f"{update.role}/loss"] = total
    return terms
