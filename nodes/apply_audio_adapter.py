"""Node: MODEL and MODEL_PATCH to a MODEL with audio attention."""

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from .host.audio_adapter import add_audio_adapter
from .host.checks import checks_values
from .sockets import CATEGORY


class ApplyAudioAdapter(io.ComfyNode):
    """Node that attaches an audio adapter to a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id="TurboTalkApplyAudioAdapter",
            display_name="TurboTalk · Apply audio adapter",
            category=CATEGORY,
            description="Attaches an audio adapter to a Wan 2.1 image-to-video model. LoRA, "
            "quantised weights, compilation and offloading keep working before and after it.",
            search_aliases=["infinitetalk", "multitalk", "model patch"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="Wan 2.1 image-to-video, from Load Diffusion Model or a LoRA."
                ),
                io.ModelPatch.Input(
                    "model_patch",
                    tooltip="From Load audio adapter; the host's Load Model Patch works as well.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Factor on what the adapter adds: 1 is as trained, less moves the "
                    "mouth less.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="With the adapter, for the TurboTalk sampler."
                )
            ],
        )

    @classmethod
    @checks_values
    def execute(
        cls, model: ModelPatcher, model_patch: ModelPatcher, strength: float
    ) -> io.NodeOutput:
        """Attach the adapter."""
        return io.NodeOutput(add_audio_adapter(model, model_patch, strength))
