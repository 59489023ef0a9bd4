"""Node: number of steps to SIGMAS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..turbotalk_core.request import MAX_DISTILLED_STEPS, MAX_STEPS, SCHEDULES
from ..turbotalk_core.sampling.schedule import distilled_sigmas, reference_sigmas
from .host.checks import checks_values
from .sockets import CATEGORY


class Schedule(io.ComfyNode):
    """Node that computes the noise levels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id="TurboTalkSchedule",
            display_name="TurboTalk · Schedule",
            category=CATEGORY,
            description="Noise levels for the TurboTalk sampler: those of the original many-step "
            "model, or those of a distilled one.",
            search_aliases=["sigmas", "scheduler", "steps", "infinitetalk"],
            inputs=[
                io.Int.Input(
                    "steps",
                    default=12,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Network calls per chunk. A distilled model takes 1 to "
                    f"{MAX_DISTILLED_STEPS}; the original one 8 to 40.",
                ),
                io.Float.Input(
                    "shift",
                    default=7.0,
                    min=0.05,
                    max=100.0,
                    step=0.05,
                    tooltip="More time at high noise. InfiniteTalk: 7 for 480p, 11 for 720p. "
                    "A distilled model needs the shift it was distilled with.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(SCHEDULES),
                    default="reference",
                    tooltip="reference: InfiniteTalk's own list, any number of steps, its last one "
                    "nearly empty. distilled: even steps, what TurboTalk students are trained on.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="Noise levels, from 1 down to 0.")
            ],
        )

    @staticmethod
    def find_conflicts(inputs: Mapping[str, Any]) -> dict[str, str]:
        """Find what does not fit together; see ``checks.find_faults``."""
        steps, kind = inputs.get("steps"), inputs.get("kind")
        if isinstance(steps, int) and steps > MAX_DISTILLED_STEPS and kind == "distilled":
            return {
                "steps": f"got {steps} steps; use 1 to {MAX_DISTILLED_STEPS} with the distilled "
                "schedule"
            }
        return {}

    @classmethod
    @checks_values
    def execute(cls, steps: int, shift: float, kind: str) -> io.NodeOutput:
        """Compute the levels."""
        space = distilled_sigmas if kind == "distilled" else reference_sigmas
        return io.NodeOutput(space(steps, shift))
