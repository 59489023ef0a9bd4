"""Node: InfiniteTalk audio adapter file of any size to MODEL_PATCH."""

from comfy_api.latest import io

from .host.audio_adapter import load_audio_adapter
from .host.checks import hides_folders
from .host.folders import find_model, list_models
from .sockets import CATEGORY


class LoadAudioAdapter(io.ComfyNode):
    """Node that loads audio adapters of any size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id="TurboTalkLoadAudioAdapter",
            display_name="TurboTalk · Load audio adapter",
            category=CATEGORY,
            description="Loads an InfiniteTalk audio adapter of any size, for a Wan model.",
            search_aliases=["infinitetalk", "multitalk", "model patch"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list_models("model_patches"),
                    tooltip="An InfiniteTalk file in models/model_patches, of the same family as "
                    "the model it will be applied to.",
                )
            ],
            outputs=[
                io.ModelPatch.Output(
                    display_name="model_patch", tooltip="The adapter, for Apply audio adapter."
                )
            ],
        )

    @classmethod
    @hides_folders
    def execute(cls, name: str) -> io.NodeOutput:
        """Load the file."""
        path = find_model("model_patches", name)
        return io.NodeOutput(load_audio_adapter(path))
