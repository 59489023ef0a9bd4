"""The workflows for the public 14B files, run as shipped on small files under the real names.

Text and image encoders are those of the stand_ins pack. Only the size of the picture and the length
of a chunk are changed, for time.
"""

import json
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.family import write_host_family
from tests.nodes.workflows import probe, to_prompt
from tools.comfy.server import ComfyServer, PromptRefused
from turbotalk_core.types import Waveform
from turbotalk_core.video.mux import assemble

WORKFLOWS = Path(__file__).parents[2] / "workflows"
TWINS = {
    "TurboTalk - InfiniteTalk 14B": "infinitetalk_14b",
    "TurboTalk - two speakers": "two_speakers",
    "TurboTalk - dubbing (video to video)": "dubbing",
}
SECONDS = {"speech": 1.2, "speech_left": 0.8, "speech_right": 1.3}
FRAMES = {"infinitetalk_14b": 30, "two_speakers": 20 + 32, "dubbing": 30}  # floor(25 * seconds)
DIT = "Wan2_1-I2V-14B-480p_fp8_e4m3fn_scaled_KJ.safetensors"
LORA = "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors"
SAMPLER, SAVE, PREVIEW = "14", "16", "20"


def read(name):
    return json.loads((WORKFLOWS / name).read_text(encoding="utf-8"))


def write_stand_ins(models):
    """Small files under the names that the workflows ask for."""
    files = write_host_family(models, image_dim=1280)
    for file, name in (
        (files.dit, DIT),
        (files.adapter, "wan2.1_infiniteTalk_single_fp16.safetensors"),
        (files.audio_encoder, "wav2vec2-chinese-base_fp16.safetensors"),
        (files.vae, "Wan2_1_VAE_bf16.safetensors"),
    ):
        file.rename(file.parent / name)
    adapters = models / "model_patches"
    shutil.copy(
        adapters / "wan2.1_infiniteTalk_single_fp16.safetensors",
        adapters / "wan2.1_infiniteTalk_multi_fp16.safetensors",
    )
    (models / "loras").mkdir()
    generator = torch.Generator().manual_seed(1)
    pair = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{half}.weight": torch.randn(
            shape, generator=generator
        )
        for half, shape in (("down", (2, 48)), ("up", (48, 2)))
    }
    save_file(pair, models / "loras" / LORA)
    for folder, name in (
        ("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
        ("clip_vision", "clip_vision_h.safetensors"),
    ):
        (models / folder).mkdir()
        save_file({"nothing": torch.zeros(1)}, models / folder / name)


def write_inputs(folder):
    rng = np.random.default_rng(0)
    for name, size in (("portrait", (96, 96)), ("two_people", (64, 128))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    for name, seconds in SECONDS.items():
        samples = (8_000 * rng.standard_normal(round(16_000 * seconds))).clip(-32_768, 32_767)
        with wave.open(str(folder / f"{name}.wav"), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(16_000)
            sound.writeframes(samples.astype("<i2").tobytes())
    frames = torch.from_numpy(rng.integers(0, 255, (40, 96, 96, 3), np.uint8))
    silence = Waveform(samples_CS=torch.zeros(1, 25_600), sample_rate=16_000)
    assemble(folder / "to_dub.mp4", [frames], silence)


@pytest.fixture(scope="module")
def server(tmp_path_factory, host):
    base = tmp_path_factory.mktemp("workflows")
    for name in ("input", "custom_nodes"):
        (base / name).mkdir()
    write_inputs(base / "input")
    write_stand_ins(base / "models")
    shutil.copytree(Path(__file__).parent / "stand_ins", base / "custom_nodes" / "stand_ins")
    with ComfyServer(Path(host.nodes.__file__).parent, base) as running:
        yield running


def run_video(talk, prompt):
    """Run a prompt; returns what SaveVideo wrote, and how much work the sampler announced."""
    events = []
    run = talk(lambda client: client.run(prompt, events.append))
    (file,) = run.outputs[SAVE]["images"]
    (total,) = {
        event["data"]["max"]
        for event in events
        if event["type"] == "progress" and event["data"]["node"] == SAMPLER
    }
    return probe(talk(lambda client: client.view(file))), total


def make_smaller(prompt, side=64):
    settings = prompt[SAMPLER]["inputs"]
    settings |= {"width": side, "height": side, "chunk_frames": 21, "motion_frames": 5}
    return prompt


@pytest.mark.parametrize("name", TWINS)
def test_page_and_program_get_the_same_workflow(talk, name):
    definitions = talk(lambda client: client.get("/object_info"))
    wanted = read(f"api/{TWINS[name]}.json")
    for node in wanted.values():
        del node["_meta"]
    assert to_prompt(read(f"{name}.json"), definitions) == wanted


@pytest.mark.parametrize("name", TWINS)
def test_every_model_file_can_be_downloaded_from_the_page(host, name):
    """The page offers what ``properties.models`` holds where a file is missing."""
    for node in read(f"{name}.json")["nodes"]:
        files = [v for v in node["widgets_values"] if str(v).endswith(".safetensors")]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == files
        for model in models:
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith("/" + model["name"])
            assert model["directory"] in host.folder_paths.folder_names_and_paths


@pytest.mark.parametrize("name", TWINS)
def test_no_node_lies_on_another(name):
    boxes = [(*node["pos"], *node["size"]) for node in read(f"{name}.json")["nodes"]]
    title = 30  # pixels above a node's own position
    for index, (x, y, width, height) in enumerate(boxes):
        for left, top, columns, rows in boxes[index + 1 :]:
            apart = x + width <= left or left + columns <= x
            assert apart or y + height <= top - title or top + rows <= y - title


@pytest.mark.parametrize("api", TWINS.values())
def test_it_runs(talk, api):
    video, total = run_video(talk, make_smaller(read(f"api/{api}.json")))
    assert len(video.pictures) == FRAMES[api]
    assert video.sound_seconds == pytest.approx(FRAMES[api] / 25, abs=0.05)
    expected_size = (96, 48) if api == "two_speakers" else (64, 64)
    assert video.size == expected_size
    num_chunks = -(-(FRAMES[api] - 5) // 16)
    num_pictures = num_chunks if api == "dubbing" else 1
    # per chunk 4 steps with and without the voice, an encode and a decode
    assert total == num_pictures + num_chunks * (4 * 2 + 2)


def test_the_speakers_are_shown_before_anything_is_loaded(talk):
    prompt = read("api/two_speakers.json")
    wanted = {"1", "2", "17", "18", "19", PREVIEW}
    prompt = {number: node for number, node in prompt.items() if number in wanted}
    run = talk(lambda client: client.run(prompt))
    (file,) = run.outputs[PREVIEW]["images"]
    picture = talk(lambda client: client.view(file))
    assert picture.startswith(b"\x89PNG")


def test_the_teacher_without_the_lora_takes_three_calls_a_step(talk):
    """InfiniteTalk's own way, as the note in the workflow describes it."""
    prompt = make_smaller(read("api/infinitetalk_14b.json"))
    prompt["6"]["inputs"]["model"] = ["3", 0]
    del prompt["4"]
    prompt["17"] = {
        "class_type": "TurboTalkSchedule",
        "inputs": {"steps": 5, "shift": 7.0, "kind": "reference"},
    }
    prompt[SAMPLER]["inputs"] |= {
        "sigmas": ["17", 0],
        "text_guidance": 5.0,
        "audio_guidance": 4.0,
        "update": "euler",
    }
    _, total = run_video(talk, prompt)
    assert total == 1 + 2 * (5 * 3 + 2)


def test_the_lora_changes_the_picture(talk):
    prompt = make_smaller(read("api/infinitetalk_14b.json"))
    prompt[SAMPLER]["inputs"]["seed"] = 17  # another take than those of the tests before
    last = []
    for strength in (1.0, 0.0):
        prompt["4"]["inputs"]["strength_model"] = strength
        video, _ = run_video(talk, prompt)
        last.append(video.pictures[-1])
    assert not np.array_equal(*last)


def test_each_required_input_that_is_left_out_is_named(talk):
    """Once for each input of our nodes in the shipped workflows."""
    definitions = talk(lambda client: client.get("/object_info"))
    cases = {}
    for path in sorted((WORKFLOWS / "api").glob("*.json")):
        for node, content in read(f"api/{path.name}").items():
            kind = content["class_type"]
            if kind.startswith("TurboTalk"):
                for name in definitions[kind]["input"]["required"]:
                    cases.setdefault((kind, name), (path.name, node))
    assert len(cases) >= 40
    found = {}

    async def leave_out(client):
        for (kind, name), (file, node) in cases.items():
            prompt = read(f"api/{file}")
            del prompt[node]["inputs"][name]
            with pytest.raises(PromptRefused) as refused:
                await client.run(prompt)
            errors = refused.value.node_errors.get(node, {}).get("errors", [])
            found[kind, name] = [
                (error["type"], error["extra_info"].get("input_name")) for error in errors
            ]

    talk(leave_out)
    assert found == {case: [("required_input_missing", case[1])] for case in cases}
