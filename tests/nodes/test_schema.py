"""The public contract of the nodes: ids, input names and their order, tooltips.

Workflows store widget values by position and links by slot: append, never insert or rename.
"""

import sys

import pytest

INPUTS = {
    "TurboTalkLoadAudioEncoder": ["audio_encoder_name"],
    "TurboTalkEncodeSpeech": [
        "audio_encoder",
        "audio",
        "normalize_loudness",
        "hearing",
        "start_seconds",
        "end_seconds",
    ],
    "TurboTalkSpeaker": [
        "name",
        "starts",
        "x",
        "y",
        "width",
        "height",
        "audio",
        "mask",
        "speakers",
    ],
    "TurboTalkSpeakersPreview": ["reference_image", "speakers"],
    "TurboTalkEncodeSpeakers": [
        "audio_encoder",
        "speakers",
        "normalize_loudness",
        "hearing",
        "start_seconds",
        "end_seconds",
    ],
    "TurboTalkLoadAudioAdapter": ["name"],
    "TurboTalkApplyAudioAdapter": ["model", "model_patch", "strength"],
    "TurboTalkPromptSchedule": ["clip", "text"],
    "TurboTalkSchedule": ["steps", "shift", "kind"],
    "TurboTalkSampler": [
        "model",
        "vae",
        "reference_image",
        "speech",
        "steps",
        "seed",
        "size_from",
        "width",
        "height",
        "audio_guidance",
        "text_guidance",
        "shift",
        "update",
        "chunk_frames",
        "motion_frames",
        "positive",
        "negative",
        "clip_vision_output",
        "sigmas",
        "apg",
        "color_strength",
        "max_seconds",
        "clip_vision",
    ],
    "TurboTalkAssembleVideo": [
        "take",
        "codec",
        "crf",
        "pixel_format",
        "start_frame",
        "num_frames",
        "audio",
        "fps",
    ],
    "TurboTalkTakeFrames": ["take", "start_frame", "num_frames"],
}
OUTPUTS = {
    "TurboTalkLoadAudioEncoder": ["AUDIO_ENCODER"],
    "TurboTalkEncodeSpeech": ["TURBOTALK_SPEECH"],
    "TurboTalkSpeaker": ["TURBOTALK_SPEAKERS"],
    "TurboTalkSpeakersPreview": ["IMAGE"],
    "TurboTalkEncodeSpeakers": ["TURBOTALK_SPEECH"],
    "TurboTalkLoadAudioAdapter": ["MODEL_PATCH"],
    "TurboTalkApplyAudioAdapter": ["MODEL"],
    "TurboTalkPromptSchedule": ["CONDITIONING"],
    "TurboTalkSchedule": ["SIGMAS"],
    "TurboTalkSampler": ["TURBOTALK_TAKE"],
    "TurboTalkAssembleVideo": ["VIDEO"],
    "TurboTalkTakeFrames": ["IMAGE"],
}


@pytest.fixture(params=INPUTS)
def schema(request, host, pack):
    return host.nodes.NODE_CLASS_MAPPINGS[request.param].GET_SCHEMA()


def test_the_pack_has_these_nodes_and_no_others(host, pack):
    names = [name for name in host.nodes.NODE_CLASS_MAPPINGS if name.startswith("TurboTalk")]
    assert names == list(INPUTS)


def test_inputs_and_outputs_stand_in_order(schema):
    assert [socket.id for socket in schema.inputs] == INPUTS[schema.node_id]
    assert [socket.get_io_type() for socket in schema.outputs] == OUTPUTS[schema.node_id]


def test_pictures_may_move(host, pack):
    for node_id in ("TurboTalkSampler", "TurboTalkSpeakersPreview"):
        schema = host.nodes.NODE_CLASS_MAPPINGS[node_id].GET_SCHEMA()
        (picture,) = (socket for socket in schema.inputs if socket.id == "reference_image")
        assert picture.get_io_type() == "IMAGE,VIDEO"


def test_everything_is_explained(schema):
    assert schema.description
    assert schema.category == "TurboTalk"
    assert schema.display_name.startswith("TurboTalk · ")
    for socket in (*schema.inputs, *schema.outputs):
        assert len(socket.tooltip) > 10, socket
        assert socket.tooltip.endswith("."), socket


def test_each_node_has_a_page_of_help(schema, host, pack):
    page = (host.base / "custom_nodes" / "ComfyUI-TurboTalk.x").joinpath(
        pack.WEB_DIRECTORY, "docs", f"{schema.node_id}.md"
    )
    assert page.read_text(encoding="utf-8").startswith("# ")


def test_the_host_lists_the_embedded_models(host, pack):
    for name in ("audio_encoders", "diffusion_models", "model_patches", "vae"):
        folders = host.folder_paths.get_folder_paths(name)
        assert any(folder.endswith(f"models/{name}") for folder in folders)


def test_the_pack_brings_its_own_core_and_hides_no_module_of_the_host(host, pack):
    assert sys.modules["nodes"] is host.nodes
    assert f"{pack.__name__}.turbotalk_core.pipeline" in sys.modules
