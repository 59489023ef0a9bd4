"""Interface of methods: the roles that a method needs, and the updates it makes from a batch.

Axes: B batch, C channels, F latent frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from training.engine.engine import Engine
from training.engine.rng import Draws
from training.methods.timesteps import choose_timesteps, to_sigmas
from training.models.batch import Batch
from training.models.lora import add_adapters, list_adapters, merge_adapters
from training.models.networks import Discriminator, TalkingModel
from turbotalk_core.errors import MismatchError

Trains = Literal["full", "lora", "frozen"]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Weight = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """Training settings of one network.

    Attributes:
        trains: all weights, LoRA layers beside frozen weights, or nothing (frozen). A
            discriminator's heads are trained with its LoRA layers.
        learning_rate: peak; with LoRA 10 to 25 times that of all weights [inferred: LiveAvatar].
        betas: betas of AdamW, both floats.
        weight_decay: weight decay of AdamW.
        rank: rank of LoRA layers.
        alpha: scale of LoRA layers; they are multiplied by alpha / rank.
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
    """Network that a method needs.

    Attributes:
        begins_with: origin of the initial weights: a role of the phase before, as it ended, or
            weights named in the recipe. If the phase before had this very role, its network is used
            instead, with LoRA layers and heads.
        learning: training settings.
        is_discriminator: whether it is a ``Discriminator`` around those weights.
        starts_at: steps of the phase before its first update; its learning rate warms up from
            there.
        every: number of steps per update from there on.
    """

    begins_with: str
    learning: Learning = FROZEN
    is_discriminator: bool = False
    starts_at: int = 0
    every: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One optimiser step that is still to be made.

    Attributes:
        role: role whose weights are updated.
        losses: loss functions; each is called and backpropagated before the next one is requested.
            Their gradients add up.
        log: scalars on the device, filled while the losses run.
    """

    role: str
    losses: Iterable[Callable[[], Tensor]]
    log: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FewSteps:
    """Schedule of a few-step student.

    Attributes:
        num_steps: number of the student's steps.
        timesteps: timesteps before the shift; None for even parts of 1000.
        shift: flow shift of the schedule, which inference must share; 5 [read: Self-Forcing,
            FlashTalk], 7 and 11 are InfiniteTalk's at 480 and 720 rows.

    Raises:
        ScheduleError: if there is no step, or timesteps and shift form no valid schedule.
    """

    num_steps: Count
    timesteps: tuple[float, ...] | None = None
    shift: Positive = 5.0

    def __post_init__(self) -> None:
        self.sigmas()

    def sigmas(self) -> list[float]:
        """Compute the noise levels of the schedule.

        Returns:
            Sigmas, descending, without the final 0.

        Raises:
            ScheduleError: if there is no step, or timesteps and shift form no valid schedule.
        """
        return to_sigmas(choose_timesteps(self.num_steps, self.timesteps), self.shift)


class Method(Protocol):
    """Training method; a frozen value whose fields are its settings."""

    def roles(self) -> dict[str, RoleSpec]:
        """Return the networks it needs, by role."""
        ...

    def updates(
        self, step: int, batch: Batch, roles: Mapping[str, Engine], draws: Draws
    ) -> Iterator[Update]:
        """Make the updates of one step, one after the other.

        While an update's losses run, the weights of its role alone require gradients. Its role is
        called through the engine, all others through ``Engine.module``. The losses of an update
        are run, and its step is made, before the next update is requested. Which roles are updated
        depends on ``step`` alone, so that all ranks agree.

        Args:
            step: number of the step in the phase, from 0.
            batch: real samples and conditions, on the device of the networks.
            roles: an engine for each of ``roles()``.
            draws: random streams of this step.

        Returns:
            The updates, in order.
        """
        ...


def prepare_role(spec: RoleSpec, network: nn.Module) -> TalkingModel | Discriminator:
    """Turn initial weights into the network of a role.

    Args:
        spec: specification of the role.
        network: a ``TalkingModel``, or the role's own network of the phase before; changed in
            place.

    Returns:
        The network; only the parameters to train require gradients.

    Raises:
        MismatchError: if ``network`` is a discriminator and the role is not.
    """
    learning = spec.learning
    goes_on = isinstance(network, Discriminator)
    if not isinstance(network, TalkingModel | Discriminator) or (
        goes_on and not spec.is_discriminator
    ):
        raise MismatchError(
            f"got a {type(network).__name__} for a role that begins with {spec.begins_with!r} and "
            f"{'judges' if spec.is_discriminator else 'does not judge'}; give it a talking model"
        )
    backbone = network.backbone if isinstance(network, Discriminator) else network
    if learning.trains != "lora" or not goes_on:
        merge_adapters(backbone)
    if isinstance(network, TalkingModel) and spec.is_discriminator:
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
    """Compute statistics that reveal a collapse early: a frozen, drifting or washed-out video.

    Args:
        name: name of the samples, for the log.
        latents_BCFHW: clean latents.

    Returns:
        ``<name>_motion``, the mean absolute difference of neighbouring latent frames, and
        ``<name>_mean`` and ``<name>_std``.
    """
    latents = latents_BCFHW.detach().float()
    return {
        f"{name}_motion": latents.diff(dim=2).abs().mean(),
        f"{name}_mean": latents.mean(),
        f"{name}_std": latents.std(),
    }


def round_as_stored(latents_BCFHW: Tensor) -> Tensor:
    """Round latents to float16, the precision of a prepared set.

    Args:
        latents_BCFHW: latents, which may have a graph.

    Returns:
        Latents of the same dtype; the gradient is that of no rounding.
    """
    latents = latents_BCFHW.detach()
    # The difference is exact, and so is the sum.
    return latents_BCFHW + (latents.half().to(latents) - latents)


def draw_noise(latents_BCFHW: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise in the shape of latents.

    Args:
        latents_BCFHW: latents with the target shape and device.
        generator: random stream; noise is drawn on its device. A stream on the CPU makes the same
            noise for every device.

    Returns:
        Noise, float32, on the device of the latents.
    """
    noise = torch.randn(latents_BCFHW.shape, generator=generator, device=generator.device)
    return noise.to(latents_BCFHW.device)
