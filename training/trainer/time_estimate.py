"""Estimate of a run's operations and time, for the dry run.

A forward pass of a transformer with P weights over N tokens has 2 P N floating point operations,
and its self-attention 4 N^2 D per block of width D. A backward pass counts as two forward passes,
and one more where blocks are recomputed. Attention to text and audio, the VAE, messages and input
are left out, so a real step takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from training.methods.adversarial import FOUR_STEPS, Adversarial
from training.methods.continuation import Continuation
from training.methods.dmd import Dmd
from training.recipe import ClipShape, Recipe
from training.trainer.roles import RoleBuilder
from turbotalk_core.geometry import PATCH, SPATIAL_STRIDE, count_latent_frames
from turbotalk_core.models.wan import WanModel
from turbotalk_core.sampling.guidance import count_calls

if TYPE_CHECKING:
    from training.methods.method import Method

TFLOPS = 400.0  # of one H100 or H800 in bfloat16, with usual utilisation


def count_forward(dit: WanModel, clip: ClipShape) -> float:
    """Count the floating point operations of a forward pass for one sample.

    Args:
        dit: transformer, which may be on the meta device.
        clip: shape of the sample.

    Returns:
        Number of operations.
    """
    side = SPATIAL_STRIDE * PATCH
    tokens = count_latent_frames(clip.num_frames) * (clip.height // side) * (clip.width // side)
    weights = sum(weight.numel() for weight in dit.blocks.parameters())
    config = dit.config
    return 2.0 * weights * tokens + 4.0 * tokens**2 * config.dim * config.num_layers


def count_passes(method: Method, *, has_text: bool, recomputes: bool) -> float:
    """Count the network calls of one step and micro-batch, on average over the steps.

    Args:
        method: method with its settings.
        has_text: whether samples have a text, so that text guidance needs calls.
        recomputes: whether blocks are recomputed in the backward pass.

    Returns:
        Calls, where one with its backward pass counts as three or four.
    """
    graph = 4.0 if recomputes else 3.0
    if isinstance(method, Dmd):
        scale = method.guidance_scale if has_text else 1.0
        guided = count_calls(scale, method.audio_guidance_scale)
        share = 1 / method.student_every
        rollout = (method.num_steps - 1) / 2 + (1 - share) + share * graph
        return rollout + share * (1 + guided) + graph
    if isinstance(method, Adversarial):
        return _count_adversarial(method, graph)
    if isinstance(method, Continuation):
        return 2 * (method.num_steps - 1) + 1 + graph
    return graph


def _count_adversarial(method: Adversarial, graph: float) -> float:
    compares = method.self_compare_weight > 0 or method.four_step_weight > 0
    num_samples = 3 if method.four_step_weight > 0 else 2
    with_penalty = 2 * (3 if compares else 2)
    share = 1 / method.penalty_every if method.penalty_weight > 0 else 0.0

    def judge(num_scored: int) -> float:
        return num_scored * graph + (num_scored - 1 if method.memory_light else 0)

    discriminator = share * judge(with_penalty) + (1 - share) * judge(num_samples)
    rollout = method.num_steps + (FOUR_STEPS if compares else 0)
    # The student's last step and its score with a graph, the other samples' scores without.
    student = 2 * graph + (2 if method.self_compare_weight > 0 else 1)
    return rollout + discriminator + student / method.student_every


def describe_time(
    recipe: Recipe, methods: Sequence[Method], builder: RoleBuilder, tflops: float = TFLOPS
) -> Iterator[str]:
    """Describe operations and time of each phase, and what settings would save.

    Args:
        recipe: all settings.
        methods: method of each phase.
        builder: builder of the networks.
        tflops: speed of one GPU in 10^12 operations per second.

    Yields:
        Lines of text for display.
    """
    yield f"time at {tflops:g} TFLOP/s per GPU, without input, messages and checkpoints:"
    hours = 0.0
    for number, (name, phase) in enumerate(recipe.phases.items()):
        method, clip, batch = methods[number], recipe.clip_of(phase), recipe.batch_of(phase)
        network = builder.sketch(number, next(iter(method.roles())))
        (dit,) = (part for part in network.modules() if isinstance(part, WanModel))
        forward = batch.size * count_forward(dit, clip)
        micro_batches = -(-batch.count // recipe.engine.num_ranks)
        recomputes = recipe.engine.activations != "keep"
        has_text = clip.num_text_tokens > 0

        def seconds(
            method: Method,
            forward: float = forward * micro_batches,
            recomputes: bool = recomputes,
            has_text: bool = has_text,
        ) -> float:
            passes = count_passes(method, has_text=has_text, recomputes=recomputes)
            return passes * forward / (tflops * 1e12)

        passes = count_passes(method, has_text=has_text, recomputes=recomputes)
        step = seconds(method)
        hours += step * phase.steps / 3600
        yield (
            f"  phase {name}: {forward / 1e15:.3g} PFLOP per network call, {passes:.1f} calls per "
            f"micro-batch, {step:.3g} s per step, {step * phase.steps / 3600:.3g} h"
        )
        if isinstance(method, Adversarial):
            for change, other in _list_savings(method):
                yield f"    {change} would save {1 - seconds(other) / step:.0%}"
    num_ranks = recipe.engine.num_ranks
    yield f"  all phases: {hours:.3g} h on {num_ranks} GPUs, {hours * num_ranks:.3g} GPU hours"


def _list_savings(method: Adversarial) -> Iterator[tuple[str, Adversarial]]:
    if method.penalty_weight > 0 and method.penalty_every == 1:
        yield "penalty_every: 4", replace(method, penalty_every=4)
    if method.memory_light:
        yield "memory_light: false, where the graphs fit,", replace(method, memory_light=False)
