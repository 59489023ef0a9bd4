"""What a method is: the roles it needs, and the updates it makes of a batch.

Axes: B batch, C channels, F latent frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from training.batch import Batch
from training.draws import Draws
from training.engine import Engine
from training.lora import add_adapters, list_adapters, merge_adapters
from training.networks import Discriminator, TalkingModel
from training.timesteps import choose_timesteps, to_sigmas
from turbotalk_core.errors import MismatchError

Trains = Literal["full", "lora", "frozen"]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Weight = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """What of a network is trained, and how fast.

    Attributes:
        trains: all weights, LoRA layers beside frozen ones, or nothing. A discriminator's heads
            are trained with its LoRA layers.
        learning_rate: peak; with LoRA 10 to 25 times that of all weights [inferred: LiveAvatar].
        betas: of AdamW, both floats.
        weight_decay: of AdamW.
        rank: of LoRA layers.
        alpha: they count alpha / rank.
    """

    trains: Trains = "full"
    learning_rate: Weight
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: Weight = 0.01
    rank: Count = 64
    alpha: Positive = 64.0


FROZEN = Learning(trains="frozen", learning_rate=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """A network that a method needs.

    Attributes:
        begins_with: whose weights it begins with: a role of the phase before as it ended, or
            weights that the recipe names. Where the phase before had this very role, it goes on
            with that one instead, LoRA layers and heads included.
        learning: what of it is trained.
        judges: it is a ``Discriminator`` around those weights.
    """

    begins_with: str
    learning: Learning = FROZEN
    judges: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One optimiser step, before it is made.

    Attributes:
        role: whose optimiser steps.
        losses: each is called and backpropagated before the next one is asked for; their
            gradients add up.
        log: scalars on the device, filled while the losses run.
    """

    role: str
    losses: Iterable[Callable[[], Tensor]]
    log: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FewSteps:
    """At which noise levels a student is called.

    Attributes:
        num_steps: of the student.
        timesteps: of the student, before the shift; None for even parts of 1000.
        shift: flow shift of its schedule, which inference must share; 5 [read: Self-Forcing,
            FlashTalk], 7 and 11 are InfiniteTalk's at 480 and 720 rows.

    Raises:
        ScheduleError: no step, or timesteps or a shift that make no schedule.
    """

    num_steps: Count
    timesteps: tuple[float, ...] | None = None
    shift: Positive = 5.0

    def __post_init__(self) -> None:
        self.sigmas()

    def sigmas(self) -> list[float]:
        """List the noise levels.

        Returns:
            Descending, without the final 0.

        Raises:
            ScheduleError: no step, or timesteps or a shift that make no schedule.
        """
        return to_sigmas(choose_timesteps(self.num_steps, self.timesteps), self.shift)


class Method(Protocol):
    """A way to learn from batches; a frozen value, its fields are its settings."""

    def roles(self) -> dict[str, RoleSpec]:
        """Name the networks it needs."""
        ...

    def updates(
        self, step: int, batch: Batch, roles: Mapping[str, Engine], draws: Draws
    ) -> Iterator[Update]:
        """Make the updates of one step, one after the other.

        While an update's losses run, the weights of its role alone require gradients. Its role is
        called through the engine, all others through ``Engine.module``. The losses of an update
        are run, and its step is made, before the next update is asked for. Which roles are updated
        depends on ``step`` alone, so that all ranks agree.

        Args:
            step: of the phase, from 0.
            batch: real samples and conditions, on the device of the networks.
            roles: an engine for each of ``roles()``.
            draws: of this step.

        Returns:
            The updates, in their order.
        """
        ...


def prepare_role(spec: RoleSpec, network: nn.Module) -> TalkingModel | Discriminator:
    """Make a role's network of the weights that it begins or goes on with.

    Args:
        spec: of the role.
        network: a ``TalkingModel``, or the role's own network of the phase before; changed in
            place and taken over.

    Returns:
        The network; what is to be trained requires gradients, the rest does not.

    Raises:
        MismatchError: a discriminator for a role that is none.
    """
    learning = spec.learning
    goes_on = isinstance(network, Discriminator)
    if not isinstance(network, TalkingModel | Discriminator) or (goes_on and not spec.judges):
        raise MismatchError(
            f"got a {type(network).__name__} for a role that begins with {spec.begins_with!r} and "
            f"{'judges' if spec.judges else 'does not judge'}; give it a talking model"
        )
    backbone = network.backbone if isinstance(network, Discriminator) else network
    if learning.trains != "lora" or not goes_on:
        merge_adapters(backbone)
    if isinstance(network, TalkingModel) and spec.judges:
        network = Discriminator(network)
    network.requires_grad_(learning.trains != "frozen")
    if learning.trains == "lora":
        backbone.requires_grad_(False)
        if not list_adapters(backbone):
            add_adapters(backbone, learning.rank, learning.alpha)
        for _, layer in list_adapters(backbone):
            layer.lora_down.requires_grad_(True)
            layer.lora_up.requires_grad_(True)
    return network


def describe_latents(name: str, latents_BCFHW: Tensor) -> dict[str, Tensor]:
    """Measure what tells a collapse early: a frozen, drifting or washed-out video.

    Args:
        name: of the samples, for the log.
        latents_BCFHW: clean.

    Returns:
        ``<name>_motion``, the mean absolute difference of neighbouring latent frames,
        ``<name>_mean`` and ``<name>_std``.
    """
    latents = latents_BCFHW.detach().float()
    return {
        f"{name}_motion": latents.diff(dim=2).abs().mean(),
        f"{name}_mean": latents.mean(),
        f"{name}_std": latents.std(),
    }


def draw_noise(latents_BCFHW: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise where the generator lives, in the shape of latents.

    Args:
        latents_BCFHW: give shape and device.
        generator: on the CPU for the same draw on every device.

    Returns:
        Noise, float32.
    """
    noise = torch.randn(latents_BCFHW.shape, generator=generator, device=generator.device)
    return noise.to(latents_BCFHW.device)
