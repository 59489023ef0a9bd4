"""Engine for many devices: DeepSpeed's ZeRO 1, 2 and 3. Only this file imports deepspeed.

    python -m training.engine.deepspeed_engine CHECKPOINT

rewrites a checkpoint so that a run with another number of ranks can resume from it.

The other training code keeps three rules, or DeepSpeed would update the wrong weights or hang: a
network that is not being trained is called through ``.module`` and requires no gradient; all ranks
make the same calls in the same order; no graph is differentiated twice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import DistError

from training.engine import distributed as ranks
from training.engine.engine import (
    BUCKET_SIZE,
    DTYPES,
    EngineSettings,
    StepReport,
    check_same_network,
    set_checkpointing,
)
from training.engine.optimizers import Average
from turbotalk_core.cli.arguments import Parser, run
from turbotalk_core.errors import CheckpointError, RecipeError, TrainingError

STATE, UNIVERSAL, FACTS = "state", "universal", "engine.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSettings:
    """Distribution of networks over ranks.

    Attributes:
        stage: what is divided: 1 the optimiser's states, 2 also gradients, 3 also weights.
        offload: what is kept in the CPU's memory between uses.
        bucket_size: number of gradient values reduced at a time; a smaller bucket needs less memory
            and more time.
    """

    stage: Literal[1, 2, 3] = 3
    offload: Literal["none", "optimizer", "weights"] = "none"
    bucket_size: int = BUCKET_SIZE


def start_ranks(timeout_seconds: float) -> torch.device:
    """Join the process group, with rank and address from the launcher's environment variables.

    Args:
        timeout_seconds: how long a rank waits for another before the run fails.

    Returns:
        The device of this rank.

    Raises:
        TrainingError: if the ranks cannot reach each other.
    """
    # DeepSpeed would compile this op at the first start, and no run here needs it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator: Any = get_accelerator()
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # A rank alone is called by no other: any free port will do, as other runs may have theirs.
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    on_cpu = accelerator.device_name() == "cpu"
    try:
        deepspeed.init_distributed(
            "gloo" if on_cpu else accelerator.communication_backend_name(),
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=timeout_seconds),
            verbose=False,
        )
    except DistError as error:
        reason = str(error).split("\n")[0]
        raise TrainingError(
            f"the ranks do not find each other ({reason}); start all of them with one launcher, "
            "and give another MASTER_PORT if the port is in use"
        ) from error
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.current_device_name())


class DeepSpeedEngine:
    """One network distributed over all ranks.

    Args:
        module: network, to be trained if some of its weights require gradients; it must have the
            same weights on every rank.
        settings: settings of the optimiser and the precision.
        zero: distribution over ranks.
        device: device of this rank.

    Raises:
        RecipeError: if the optimiser is Muon, which needs whole matrices, or the precision is
            mixed.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: EngineSettings,
        zero: ZeroSettings,
        device: torch.device,
    ) -> None:
        if settings.optimizer != "adamw":
            raise RecipeError(
                f"got the optimizer {settings.optimizer}; under DeepSpeed it must be adamw, as "
                "shards are no matrices; use it, or engine.kind: plain"
            )
        if settings.precision == "mixed":
            raise RecipeError(
                "got the precision mixed; under DeepSpeed it must be float32 or bfloat16, which "
                "steps float32 copies; use that, or engine.kind: plain"
            )
        self.zero = zero
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._shapes = {name: list(weight.shape) for name, weight in self._trained.items()}
        self._buffers = module.state_dict().keys() - dict(module.named_parameters()).keys()
        self._peak = settings.learning_rate
        self._average = None
        self._engine: Any = None
        self.module = module
        module.to(dtype=DTYPES[settings.precision])
        set_checkpointing(module, uses=settings.uses_checkpointing)
        if not self._trained and zero.stage < 3:
            module.to(device)  # whole on every rank: there are no states to divide
            return
        _announce_weights(module)
        optimizer = None
        if self._trained:
            # Without foreach or fused: each group is one flat tensor of DeepSpeed's.
            optimizer = torch.optim.AdamW(
                list(self._trained.values()),
                self._peak,
                betas=settings.betas,
                weight_decay=settings.weight_decay,
            )
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=_configure(settings, zero, bool(optimizer))
        )
        if settings.ema_decay is not None and self._trained:
            shards = {name: shard for name, (shard, _) in self._list_shards().items()}
            self._average = Average(shards, settings.ema_decay, settings.ema_start)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call the network with a graph for the next update."""
        return (self._engine or self.module)(*inputs, **named)

    def set_trainable(self, *, yes: bool) -> None:
        """Set whether the trained weights require gradients."""
        for weight in self._trained.values():
            weight.requires_grad_(yes)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the gradients of the next update."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, factor: float) -> StepReport:
        """Update the weights and reset the gradients.

        Args:
            factor: fraction of the peak learning rate.

        Returns:
            The norm of the gradient; if it is not finite, DeepSpeed has kept the weights.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._peak * factor
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        assert norm is not None
        norm = float(norm)
        if self._average is not None and math.isfinite(norm):
            self._average.update({n: shard for n, (shard, _) in self._list_shards().items()})
        return StepReport(gradient_norm=norm)

    def _list_shards(self) -> dict[str, tuple[Tensor, int]]:
        """Return this rank's shards of the optimiser's float32 weights, with the start of each.

        A weight is flattened and cut into one shard per rank; the start is an index into the flat
        weight. The tensors are the optimiser's own. The last shard may be padded past the weight's
        end.
        """
        shards = {}
        for name, weight in self._trained.items():
            if self.zero.stage == 3:
                shard, _ = self._engine.optimizer._get_fp32_opt_state_partition(weight, True)
                shards[name] = (shard, ranks.rank() * shard.numel())
            elif (mapping := getattr(weight, "_hp_mapping", None)) is not None:
                shards[name] = (mapping.hp_fragment, mapping.lp_fragment_address.start)
        return shards

    def save(self, folder: Path) -> None:
        """Write everything that ``load`` reads; all ranks must call it.

        Args:
            folder: folder for this engine alone; created if it does not exist.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if ranks.rank() == 0:
            facts = {"world_size": ranks.world_size(), "stage": self.zero.stage}
            facts |= {"shapes": self._shapes}
            (folder / FACTS).write_text(json.dumps(facts))
        if not self._trained:  # frozen weights are named in the recipe and do not change
            return
        self._engine.save_checkpoint(
            str(folder), tag=STATE, save_latest=False, exclude_frozen_parameters=True
        )
        if self._average is not None:
            starts = {name: start for name, (_, start) in self._list_shards().items()}
            save_file(
                {name: shard.cpu().contiguous() for name, shard in self._average.shards.items()},
                folder / f"average_{ranks.rank():05d}.safetensors",
                {"starts": json.dumps(starts), "num_updates": str(self._average.num_updates)},
            )

    def load(self, folder: Path) -> None:
        """Restore the state that ``save`` wrote; all ranks must call it.

        Args:
            folder: folder that was passed to ``save``.

        Raises:
            CheckpointError: if the folder has no state of this kind of engine, or of another
                network, or of another number of ranks and was not converted.
        """
        if not (folder / FACTS).is_file():
            raise CheckpointError(
                f"there is no {FACTS} in {folder}; a run goes on with the kind of engine that "
                "wrote its checkpoints (engine.kind in the recipe)"
            )
        facts = json.loads((folder / FACTS).read_text())
        shapes = {name: torch.empty(s, device="meta") for name, s in facts["shapes"].items()}
        mine = {name: torch.empty(s, device="meta") for name, s in self._shapes.items()}
        check_same_network(mine, shapes, folder)
        if not self._trained:
            return
        moves = (facts["world_size"], facts["stage"]) != (ranks.world_size(), self.zero.stage)
        if moves and not (folder / UNIVERSAL).is_dir():
            raise CheckpointError(
                f"{folder.parent} was written by {facts['world_size']} ranks under ZeRO "
                f"{facts['stage']}, this run has {ranks.world_size()} under ZeRO "
                f"{self.zero.stage}; convert it first: python -m training.engine.deepspeed_engine "
                f"{folder.parent}"
            )
        # Set while loading only: with this setting, the engine would save incomplete checkpoints.
        self._engine._config.load_universal_checkpoint = moves
        groups = self._engine.optimizer.param_groups
        settings = [{key: group[key] for key in ("betas", "weight_decay")} for group in groups]
        try:
            path, _ = self._engine.load_checkpoint(
                str(folder),
                tag=UNIVERSAL if moves else STATE,
                load_module_strict=False,  # the file has no frozen weights
                load_lr_scheduler_states=False,
            )
        finally:
            self._engine._config.load_universal_checkpoint = False
        for group, kept in zip(self._engine.optimizer.param_groups, settings, strict=True):
            group.update(kept)  # the recipe's, not those of the file
        if path is None:
            raise CheckpointError(f"DeepSpeed finds nothing in {folder}; begin with an earlier one")
        if self._average is not None:
            self._load_average(folder)

    def _load_average(self, folder: Path) -> None:
        """Fill this rank's shards of the average from files of any number of ranks.

        A saved shard and a shard of this rank are ranges of the same flat weight; the overlap of
        the two ranges is copied.
        """
        assert self._average is not None
        shards = self._list_shards()
        for path in sorted(folder.glob("average_*.safetensors")):
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                self._average.num_updates = int(metadata["num_updates"])
                for name, start in json.loads(metadata["starts"]).items():
                    if name not in shards:
                        continue
                    mine, first = self._average.shards[name], shards[name][1]
                    theirs = file.get_tensor(name)
                    low = max(first, start)
                    high = min(first + mine.numel(), start + theirs.numel())
                    if low < high:
                        mine[low - first : high - first] = theirs[low - start : high - start]

    def close(self) -> None:
        """Free the memory; DeepSpeed keeps it allocated even after the last reference is gone."""
        if self._engine is None:
            return
        optimizer, self._average = self._engine.optimizer, None
        stepped = getattr(optimizer, "optimizer", None)  # a frozen network has none
        self._engine.destroy()
        if stepped is not None:
            stepped.state.clear()
            stepped.param_groups.clear()
        self._engine.optimizer = None
        parameter_offload.FWD_MODULE_STACK.clear()
        vars(optimizer).clear()
        for weight in self.module.parameters():
            weight.grad, weight.data = None, torch.empty(0, dtype=weight.dtype)
            if (shard := getattr(weight, "ds_tensor", None)) is not None:
                shard.data = torch.empty(0, dtype=shard.dtype)

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """Return all weights on rank 0, in float32 on the CPU; the average where one is kept."""
        gathered: dict[str, Tensor] = {}
        with self._averaged():
            for name, weight in self.module.named_parameters():
                whole = self._gather(name, weight)
                if ranks.rank() == 0:
                    gathered[name] = whole.detach().float().cpu().clone()
        if ranks.rank() == 0:
            buffers = dict(self.module.named_buffers())
            gathered |= {name: buffers[name].float().cpu() for name in self._buffers}
        return gathered

    def _gather(self, name: str, weight: nn.Parameter) -> Tensor:
        if name in self._trained:
            whole = safe_get_full_fp32_param(weight)
            assert whole is not None
            return whole
        with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
            return weight.detach().clone()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Replace the optimiser's float32 weights by the average while the context is open."""
        if self._average is None:
            yield
            return
        shards = {name: shard for name, (shard, _) in self._list_shards().items()}
        before = {name: shard.clone() for name, shard in shards.items()}
        self._average.copy_to(shards)
        try:
            yield
        finally:
            for name, shard in shards.items():
                shard.copy_(before[name])


def _configure(settings: EngineSettings, zero: ZeroSettings, trains: bool) -> dict[str, Any]:
    optimization: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": zero.bucket_size,
        "overlap_comm": zero.stage == 2,  # with several losses per step: stage 2 only
    }
    if zero.stage == 3:
        optimization |= {"stage3_prefetch_bucket_size": zero.bucket_size // 4}
    if zero.offload != "none":
        optimization["offload_optimizer"] = {"device": "cpu"}
    if zero.offload == "weights":
        optimization["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        # The loop decides how a batch is accumulated, and calls backward as often as needed.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "steps_per_print": 10**9,
        "zero_optimization": optimization,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW needs no compiler
        "bf16": {"enabled": settings.precision == "bfloat16", "check_grad_overflow": True},
    }
    if trains:
        config["gradient_clipping"] = settings.clip_norm
    return config


def _announce_weights(module: nn.Module) -> None:
    """Register the weights of submodules with each network and repeated block that uses them.

    The transformer computes with weights of submodules without calling these, to keep float32 where
    the reference does. ZeRO 3 gathers the weights of a module only when it is called, so the
    others must be registered.
    """
    blocks = [
        block for part in module.modules() if isinstance(part, nn.ModuleList) for block in part
    ]
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    for block in blocks:
        for weight in block.parameters():
            deepspeed.zero.register_external_parameter(block, weight)
    for part in module.modules():
        # Not the outermost network alone: a discriminator's backbone is also called on its own.
        if any(True for _ in part.children()):
            for weight in part.parameters():
                if id(weight) not in inside:
                    deepspeed.zero.register_external_parameter(part, weight)


def convert(checkpoint: Path) -> None:
    """Convert a checkpoint for a run with another number of ranks, by adding files to it.

    Args:
        checkpoint: folder of a complete checkpoint.

    Raises:
        CheckpointError: if the folder contains no state of DeepSpeed.
    """
    folders = [path.parent for path in sorted(checkpoint.glob(f"*/{STATE}"))]
    if not folders:
        raise CheckpointError(
            f"{checkpoint} holds nothing to convert; give the folder of one checkpoint of a run "
            "under DeepSpeed, such as checkpoints/00000100"
        )
    for folder in folders:
        partial = folder / f"{UNIVERSAL}.part"
        if (folder / UNIVERSAL).is_dir():
            continue
        if partial.is_dir():
            shutil.rmtree(partial)
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(folder / STATE),
                output_folder=str(partial),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )
        partial.rename(folder / UNIVERSAL)


def main() -> int:
    """Convert a checkpoint from the command line; returns the exit code."""
    parser = Parser(prog="python -m training.engine.deepspeed_engine")
    parser.add_argument("checkpoint", type=Path, help="folder of one checkpoint")
    checkpoint = parser.parse_args().checkpoint
    return run(lambda: convert(checkpoint))


if __name__ == "__main__":
    sys.exit(main())
