"""Dry run of a recipe: parameters, estimated bytes per GPU, and the schedule.

Networks are built on the meta device, so a 14B recipe can be estimated on any laptop. The bytes of
the states follow from a formula. The bytes that autograd keeps of a forward pass are counted on
shapes, without the workspace of kernels.

Source: ZeRO (1910.02054), section 3: bytes per parameter of mixed-precision Adam.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.engine.engine import BUCKET_SIZE, DTYPES, Precision
from training.engine.optimizers import list_block_matrices
from training.models.batch import Batch
from training.models.networks import TalkingModel
from training.recipe import Activations, ClipShape, EngineChoice, Recipe
from training.trainer.roles import RoleBuilder
from turbotalk_core.geometry import (
    FIRST_WINDOW,
    LATENT_CHANNELS,
    LATER_WINDOW,
    SPATIAL_STRIDE,
    TEXT_LENGTH,
    count_latent_frames,
)
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.wan import WanModel

if TYPE_CHECKING:
    from training.methods.method import Method, RoleSpec

GIB = 2**30
STEP_GROUP = 1_000_000_000  # DeepSpeed's sub_group_size: parameters updated at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Numbers of parameters of a network.

    Attributes:
        all: in the whole network.
        trained: trained ones among them.
        matrices: trained ones in matrices of the repeated blocks, which Muon can step.
        block: in the largest repeated block.
        outside: outside the repeated blocks.
    """

    all: int
    trained: int
    matrices: int = 0
    block: int
    outside: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """Bytes per GPU of one network, without activations.

    Attributes:
        weights: weights in the precision of the computation.
        gradients: gradients of trained weights.
        optimizer: float32 copies of trained weights, and the optimiser's moments.
        average: running average of trained weights.
        buffers: weights gathered for use, and gradients while they are reduced and applied. With
            the plain engine, gradients are applied after the graph is freed.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    buffers: float

    @property
    def total(self) -> float:
        """Sum of all bytes."""
        return sum(getattr(self, entry.name) for entry in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphBytes:
    """Bytes that autograd keeps of one forward pass of one network.

    Attributes:
        inputs: of the inputs of one block, which are kept under recomputation.
        inside: of all tensors of one block.
        rest: of everything outside the blocks.
        num_layers: number of blocks.
        head: of ``rest``, what the backward pass frees before it reaches the blocks.
        workspace: of tensors that exist for a moment besides those inside a block, while it is
            computed and differentiated.
    """

    inputs: int
    inside: int
    rest: int
    num_layers: int
    head: int = 0
    workspace: int = 0

    def kept(self, activations: Activations) -> int:
        """Return the bytes kept between the forward pass and the backward pass.

        Args:
            activations: setting of the recipe; offloaded bytes are included.

        Returns:
            Bytes.
        """
        block = self.inside if activations == "keep" else self.inputs
        return self.rest + self.num_layers * block


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphNeed:
    """Memory of the autograd graphs that exist at one time.

    Attributes:
        device: bytes on the GPU.
        cpu: bytes per GPU in the CPU's memory.
    """

    device: int
    cpu: int


def estimate_graphs(
    graphs: Sequence[GraphBytes], activations: Activations, gradients: float = 0.0
) -> GraphNeed:
    """Estimate the memory of graphs that exist at one time, while they are differentiated.

    The last graph is differentiated and freed first. The fullest moment is the start, or the first
    pass through a block of one of the graphs, or the end, when all other blocks of the first graph
    have their gradients.

    Args:
        graphs: graphs of networks in a chain; the first one is that of the trained network.
        activations: setting of the recipe.
        gradients: bytes of the gradients that the pass creates; 0 if they exist before.

    Returns:
        Bytes on the GPU and in the CPU's memory.
    """
    kept = [graph.kept(activations) for graph in graphs]
    passes = [graph.workspace + (0 if activations == "keep" else graph.inside) for graph in graphs]
    trained = graphs[0]
    share = (trained.num_layers - 1) / trained.num_layers
    if activations == "offload":
        device = max(*passes, passes[0] + gradients * share)
        return GraphNeed(device=int(device), cpu=sum(kept))
    moments: list[float] = [sum(kept)]
    for number, graph in enumerate(graphs):
        moments.append(sum(kept[: number + 1]) - graph.head + passes[number])
    others = share * (kept[0] - trained.rest)  # of the blocks that are done at the end
    moments.append(kept[0] - trained.head - others + passes[0] + gradients * share)
    return GraphNeed(device=int(max(moments)), cpu=0)


def count_parameters(network: nn.Module) -> Counts:
    """Count the parameters of a network, which may be on the meta device."""
    blocks = [
        sum(weight.numel() for weight in block.parameters())
        for part in network.modules()
        if isinstance(part, nn.ModuleList)
        for block in part
    ]
    total = sum(weight.numel() for weight in network.parameters())
    trained = {name: w.numel() for name, w in network.named_parameters() if w.requires_grad}
    return Counts(
        all=total,
        trained=sum(trained.values()),
        matrices=sum(trained.get(name, 0) for name in list_block_matrices(network)),
        block=max(blocks, default=0),
        outside=total - sum(blocks),
    )


def estimate_states(counts: Counts, engine: EngineChoice, *, averages: bool) -> StateBytes:
    """Estimate the bytes that one GPU keeps of one network.

    Per parameter, with b = 2 bytes in bfloat16 and 4 in float32: weight b; and if it is trained
    gradient b, float32 copy 4 (the plain engine needs none of float32 weights), moments 8 (4 where
    Muon steps), average 4. ZeRO divides copy, moments and average by the number of ranks, from
    stage 2 on the gradients too, at stage 3 the weights too. The plain engine applies gradients of
    bfloat16 weights in float32.

    Args:
        counts: numbers of parameters.
        engine: precision, ZeRO stage, number of ranks, and offload.
        averages: whether a running average is kept.

    Returns:
        Bytes by kind.
    """
    width = DTYPES[engine.precision].itemsize
    zero = engine.zero_stage if engine.kind == "deepspeed" else 0
    divided = [engine.num_ranks if zero >= stage else 1 for stage in (1, 2, 3)]
    by_optimizer, by_gradient, by_weight = divided
    copy = 4 if zero or DTYPES[engine.precision] != torch.float32 else 0
    shard = counts.trained / by_optimizer
    is_away = zero > 0 and engine.offload != "none"
    weights = width * counts.all / by_weight
    gathered = width * (2 * counts.block + counts.outside) if zero == 3 else 0.0
    sent = width * min(counts.trained, BUCKET_SIZE) if zero else 0.0
    stepped = 4 * min(shard, STEP_GROUP) if zero else copy * counts.trained
    moments = 8 * shard - (4 * counts.matrices if engine.optimizer == "muon" else 0)
    return StateBytes(
        weights=0.0 if zero == 3 and engine.offload == "weights" else weights,
        gradients=0.0 if is_away and zero > 1 else width * counts.trained / by_gradient,
        optimizer=0.0 if is_away else copy * shard + moments,
        average=4 * shard if averages and not is_away else 0.0,
        buffers=gathered + sent + (0.0 if is_away else stepped),
    )


def estimate_update(
    states: StateBytes, graphs: Sequence[GraphBytes], recipe: Recipe, *, accumulates: bool
) -> GraphNeed:
    """Estimate the most memory that the update of a role adds to what exists all the time.

    The plain engine has the gradients of one role at a time: first in the precision of the weights
    beside the graph, then in float32 without it. ZeRO's parts of the gradients exist all the time.

    Args:
        states: states of the role.
        graphs: graphs of the update, the role's own first.
        recipe: gives engine and activations.
        accumulates: whether gradients of earlier passes exist while a graph is differentiated.

    Returns:
        Bytes on the GPU and in the CPU's memory.
    """
    activations = recipe.engine.activations
    if recipe.engine.kind == "deepspeed":
        return estimate_graphs(graphs, activations)
    if accumulates:
        need = estimate_graphs(graphs, activations)
        need = replace(need, device=need.device + int(states.gradients))
    else:
        need = estimate_graphs(graphs, activations, states.gradients)
    return replace(need, device=max(need.device, int(states.buffers)))


def sum_states(states: Iterable[StateBytes], engine: EngineChoice) -> float:
    """Return the bytes on one GPU that all roles take all the time; see ``estimate_update``."""
    if engine.kind == "deepspeed":
        return sum(state.total for state in states)
    return sum(state.weights + state.optimizer + state.average for state in states)


def count_graph(
    network: nn.Module,
    prepare: Callable[[TalkingModel], nn.Module],
    clip: ClipShape,
    size: int,
    precision: Precision,
    *,
    trains: bool = True,
) -> GraphBytes:
    """Count the bytes that autograd keeps of a network's forward pass, on shapes alone.

    All blocks are alike, so networks of one and of two blocks suffice: their difference is one
    block, and the remainder is the rest.

    Args:
        network: network of a role, which gives the sizes.
        prepare: function that makes such a network of a talking model.
        clip: shape of one sample.
        size: number of samples at a time.
        precision: precision of weights and activations.
        trains: whether the gradient is that of the trained weights, else that of the latents alone.

    Returns:
        Bytes of one block and of the rest.
    """
    (dit,) = (part for part in network.modules() if isinstance(part, WanModel))
    (audio,) = (part for part in network.modules() if isinstance(part, AudioProjection))
    is_mixed = precision == "mixed"
    kept: list[int] = []
    for num_layers in (1, 2):
        with torch.device("meta"):
            backbone = WanModel(replace(dit.config, num_layers=num_layers))
            small = prepare(TalkingModel(backbone, AudioProjection(audio.config)))
            small.to(DTYPES[precision])
            batch = _make_batch(backbone, audio, clip, size)
            latents = batch.latents_BCFHW
            if not trains:
                small.requires_grad_(False)
                latents = latents.clone().requires_grad_()
            call = partial(small, latents, torch.zeros(size), batch)
            kept.append(count_saved(small, call, is_mixed=is_mixed))
            block = backbone.blocks[0]
            inputs: list[Any] = []
            begin = partial(_run_up_to, block, call, inputs)
            before = count_saved(small, begin, is_mixed=is_mixed)
    with torch.device("meta"):
        peak = _measure_pass(block, inputs, is_mixed=is_mixed)
    inside = kept[1] - kept[0]
    rest = kept[0] - inside
    return GraphBytes(
        inputs=inputs[0].nbytes,
        inside=inside,
        rest=rest,
        num_layers=dit.config.num_layers,
        head=rest - before,
        workspace=max(0, peak - inside),
    )


class _Reached(Exception):
    """Signal that a forward pass has reached the blocks."""


def _run_up_to(block: nn.Module, call: Callable[[], object], inputs: list[Any]) -> None:
    """Run a forward pass up to a block, and add the inputs of the block to the list."""

    def stop(_: nn.Module, given: tuple[Any, ...]) -> None:
        inputs[:] = given
        raise _Reached

    handle = block.register_forward_pre_hook(stop)
    with contextlib.suppress(_Reached):
        call()
    handle.remove()


def _measure_pass(block: nn.Module, inputs: Sequence[Any], *, is_mixed: bool) -> int:
    """Measure the peak of the tensors that a pass through a block makes, forward and backward."""

    def cut(value: Any) -> Any:
        is_part = isinstance(value, Tensor) and value.requires_grad
        return value.detach().requires_grad_() if is_part else value

    meter = _Meter(block, inputs)
    with meter:
        with _Kernels(is_mixed):
            made = block(*map(cut, inputs))
        made.backward(torch.empty_like(made))
    return meter.peak


class _Meter(TorchDispatchMode):
    """Mode that counts the bytes of the tensors that operations make, and their largest sum."""

    def __init__(self, module: nn.Module, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.peak = self._live = 0
        known = (*module.parameters(), *tree_leaves(inputs))
        self._known = {x.untyped_storage()._cdata for x in known if isinstance(x, Tensor)}

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:  # a view, or written in place
            return
        self._known.add(key)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._live -= num_bytes


def _make_batch(model: WanModel, audio: AudioProjection, clip: ClipShape, size: int) -> Batch:
    config, frame_width = model.config, audio.config.frame_width
    frames = count_latent_frames(clip.num_frames)
    sides = (clip.height // SPATIAL_STRIDE, clip.width // SPATIAL_STRIDE)
    image = None
    if config.image_dim is not None and clip.num_image_tokens:
        image = torch.zeros(size, clip.num_image_tokens, config.image_dim)
    text = None
    if clip.num_text_tokens:
        text = torch.zeros(size, min(clip.num_text_tokens, TEXT_LENGTH), config.text_dim)
    return Batch(
        latents_BCFHW=torch.zeros(size, LATENT_CHANNELS, frames, *sides),
        reference_BCFHW=torch.zeros(size, config.in_channels - LATENT_CHANNELS, frames, *sides),
        first_BPKLD=torch.zeros(size, 1, FIRST_WINDOW, 1, frame_width),
        later_BPFKLD=torch.zeros(size, 1, frames - 1, LATER_WINDOW, 1, frame_width),
        pinned_BF=torch.zeros(size, frames, dtype=torch.bool),
        text_BND=text,
        image_embeds_BND=image,
    )


def count_saved(module: nn.Module, call: Callable[[], object], *, is_mixed: bool = False) -> int:
    """Count the bytes that autograd keeps for the backward pass of a call.

    Args:
        module: network whose weights are not counted, because they exist anyway.
        call: function that runs a forward pass, on any device.
        is_mixed: whether matrix products are computed in bfloat16, as under autocast.

    Returns:
        Bytes of all distinct tensors.
    """
    seen = {weight.untyped_storage()._cdata for weight in module.parameters()}
    alive: list[Tensor] = []  # keeps the storages, so that no address is used again
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(tensor)
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _Kernels(is_mixed):
        call()
    return total


class _Kernels(TorchFunctionMode):
    """Mode with the memory of a GPU's kernels: fused attention, and autocast if it is on.

    Fused attention keeps its inputs and output alone, no scores. Autocast itself does not exist on
    the meta device.
    """

    def __init__(self, is_mixed: bool) -> None:
        super().__init__()
        self._is_mixed = is_mixed

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        attends = func is F.scaled_dot_product_attention
        if self._is_mixed and (attends or func is F.linear):
            args = tuple(None if x is None else x.to(torch.bfloat16) for x in args)
        return _Attention.apply(*args) if attends else func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Attention on shapes alone, keeping the tensors that a fused kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, attended, sums)
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def describe_run(recipe: Recipe, methods: Sequence[Method], builder: RoleBuilder) -> Iterator[str]:
    """Describe a run: parameters, memory per GPU, and the schedule of its phases.

    Args:
        recipe: all settings; ``engine.num_ranks`` is the number of GPUs to plan for.
        methods: method of each phase.
        builder: builder of the networks.

    Yields:
        Lines of text for display.
    """
    engine = recipe.engine
    spread = f"ZeRO {engine.zero_stage}" if engine.kind == "deepspeed" else "one device"
    yield (
        f"{engine.num_ranks} GPUs, {engine.kind} engine ({spread}), {engine.precision}, "
        f"offload {engine.offload}"
    )
    done = 0
    for number, (name, phase) in enumerate(recipe.phases.items()):
        clip, batch = recipe.clip_of(phase), recipe.batch_of(phase)
        accumulated = -(-batch.count // engine.num_ranks)
        samples = phase.steps * batch.count * batch.size
        yield ""
        yield (
            f"phase {name}: {phase.method}, steps {done} to {done + phase.steps}, "
            f"{samples:,} samples of {clip.num_frames} frames of {clip.width}x{clip.height}"
        )
        yield (
            f"  per update {batch.count} x {batch.size} samples, {accumulated} of these "
            "micro-batches on each GPU"
        )
        done += phase.steps
        graphs: dict[str, GraphBytes] = {}
        states: dict[str, StateBytes] = {}
        scorer: GraphBytes | None = None
        roles = methods[number].roles()
        for role, spec in roles.items():
            network = builder.sketch(number, role)
            counts = count_parameters(network)
            averages = role in recipe.average.roles and counts.trained > 0
            states[role] = estimate_states(counts, engine, averages=averages)
            yield from _describe_states(role, spec, counts, states[role])
            if counts.trained:
                count = partial(
                    count_graph,
                    network,
                    partial(builder.kind.prepare, spec),
                    clip,
                    batch.size,
                    engine.precision,
                )
                graphs[role] = count()
                yield f"    graph {_explain(graphs[role], engine.activations)}"
                if spec.is_discriminator:
                    scorer = count(trains=False)
        needs = []
        for role, graph in graphs.items():
            is_discriminator = roles[role].is_discriminator
            chain = [graph] * roles[role].num_graphs
            if scorer is not None and not is_discriminator:
                chain.append(scorer)  # a student's graph continues through the discriminator
            accumulates = accumulated > 1 or is_discriminator
            needs.append(estimate_update(states[role], chain, recipe, accumulates=accumulates))
        always = sum_states(states.values(), engine)
        update = max((need.device for need in needs), default=0)
        cpu = max((need.cpu for need in needs), default=0)
        yield (
            f"  per GPU: states {always / GIB:.2f} + largest update {update / GIB:.2f} = "
            f"{(always + update) / GIB:.2f} GiB, and {cpu / GIB:.2f} GiB in the CPU's memory; what "
            "kernels and messages take comes on top"
        )
    yield ""
    yield f"{done} steps in {len(recipe.phases)} phases"


def _describe_states(
    role: str, spec: RoleSpec, counts: Counts, states: StateBytes
) -> Iterator[str]:
    parts = ", ".join(
        f"{entry.name} {getattr(states, entry.name) / GIB:.2f}"
        for entry in fields(states)
        if getattr(states, entry.name)
    )
    rate = f", learning rate {spec.learning.learning_rate:g}" * (counts.trained > 0)
    yield (
        f"  {role}: {counts.all:,} parameters, {counts.trained:,} trained "
        f"({spec.learning.trains}{rate})"
    )
    yield f"    states {states.total / GIB:.2f} GiB per GPU: {parts}"


def _explain(graph: GraphBytes, activations: Activations) -> str:
    inside, rest = f"{graph.inside / GIB:.2f}", f"{graph.rest / GIB:.2f}"
    kept = f"{graph.kept(activations) / GIB:.2f} GiB"
    if activations == "keep":
        return f"{kept}: {graph.num_layers} blocks of {inside}, the rest {rest}"
    place = " on the CPU" if activations == "offload" else ""
    return (
        f"{kept}{place}: inputs of {graph.num_layers} blocks of {graph.inputs / GIB:.3f}, the rest "
        f"{rest}; and the inside of one block {inside}"
    )
