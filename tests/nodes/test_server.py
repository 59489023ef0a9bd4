"""The shipped workflows in a ComfyUI server, the way a person or a program runs them."""

import asyncio
import io
import json
import math
import os
import shutil
import signal
import wave
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.nodes.workflows import probe, to_prompt
from tools.comfy.server import ComfyClient, ComfyServer, PromptFailed, PromptRefused, ServerFailed
from turbotalk_core.chunking.plan import plan_chunks
from turbotalk_core.loading import STUDENT, find_model_files, read_request

ROOT = Path(__file__).parents[2]
API = ROOT / "workflows" / "api" / "first_video.json"
UI = ROOT / "workflows" / "TurboTalk - first video.json"
SECONDS = 1.5
SAMPLER, ASSEMBLE, SAVE, SCHEDULE = "10", "11", "12", "9"
BEN, PREVIEW = "22", "23"


@pytest.fixture(scope="module")
def server(tmp_path_factory, host):
    """A server that knows the embedded models."""
    base = tmp_path_factory.mktemp("server")
    (base / "input").mkdir()
    write_inputs(base / "input")
    with ComfyServer(Path(host.nodes.__file__).parent, base) as running:
        yield running


def write_inputs(folder):
    rows, columns = np.mgrid[:160, :160]
    Image.fromarray(np.stack([rows, columns, rows // 2 + 60], -1).astype(np.uint8)).save(
        folder / "portrait.png"
    )
    with av.open(str(folder / "actor.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, width=96, height=64, pix_fmt="yuv420p")
        for level in range(0, 240, 8):
            picture = np.full((64, 96, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    rate = 44_100
    time = np.arange(round(rate * SECONDS)) / rate
    left = np.sin(2 * math.pi * 200 * time) * np.sin(2 * math.pi * 2 * time)
    samples = (8_000 * np.stack([left, left / 2], -1)).astype("<i2")
    with wave.open(str(folder / "speech.wav"), "wb") as sound:
        sound.setnchannels(2)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples.tobytes())


@pytest.fixture
def prompt():
    """The API workflow with a schedule, and no more frames in a chunk than the voice needs."""
    prompt = json.loads(API.read_text(encoding="utf-8"))
    schedule = {"steps": 2, "shift": 3.0, "kind": "distilled"}
    prompt[SCHEDULE] = {"class_type": "TurboTalkSchedule", "inputs": schedule}
    prompt[SAMPLER]["inputs"]["sigmas"] = [SCHEDULE, 0]
    prompt[SAMPLER]["inputs"]["chunk_frames"] = 21
    prompt[SAMPLER]["inputs"]["motion_frames"] = 5
    return prompt


@pytest.fixture
def conversation(prompt):
    """The same with a speaker and a bystander, and what is dubbed is a video."""
    anna, ben = (
        {"name": name, "starts": "together", "x": x, "y": 0, "width": 40, "height": 64}
        for name, x in (("Anna", 0), ("Ben", 50))
    )
    added = {
        "20": ("LoadVideo", {"file": "actor.mp4"}),
        "21": ("TurboTalkSpeaker", anna | {"audio": ["2", 0]}),
        BEN: ("TurboTalkSpeaker", ben | {"speakers": ["21", 0]}),
        PREVIEW: ("TurboTalkSpeakersPreview", {"speakers": [BEN, 0], "reference_image": ["20", 0]}),
        "24": (
            "TurboTalkEncodeSpeakers",
            {"audio_encoder": ["5", 0], "speakers": [BEN, 0], "normalize_loudness": True},
        ),
    }
    for number, (kind, inputs) in added.items():
        prompt[number] = {"class_type": kind, "inputs": inputs}
    prompt[SAMPLER]["inputs"] |= {"reference_image": ["20", 0], "speech": ["24", 0]}
    return prompt


def fetch_video(talk, run):
    (file,) = run.outputs[SAVE]["images"]
    return talk(lambda client: client.view(file))


def test_the_api_workflow_from_queue_to_file(talk):
    """As shipped."""
    prompt, events = json.loads(API.read_text(encoding="utf-8")), []
    run = talk(lambda client: client.run(prompt, events.append))
    video = probe(fetch_video(talk, run))
    assert len(video.pictures) == math.floor(25 * SECONDS)
    assert video.size == (128, 128)
    assert video.seconds == pytest.approx(37 / 25)
    assert video.sound_seconds == pytest.approx(video.seconds, abs=1 / 25)
    assert (video.sound_rate, video.channels) == (44_100, 2)
    assert json.loads(video.tags["prompt"])["10"]["class_type"] == "TurboTalkSampler"

    progress = [
        (event["data"]["value"], event["data"]["max"])
        for event in events
        if event["type"] == "progress" and event["data"]["node"] == SAMPLER
    ]
    settings = prompt[SAMPLER]["inputs"]
    assert (settings["steps"], settings["audio_guidance"]) == (1, 1)
    plan = plan_chunks(37, settings["chunk_frames"], settings["motion_frames"])
    # the reference; for each chunk its one network call, an encode and a decode
    total = 1 + len(plan.chunks) * 3
    assert progress == sorted(progress)
    assert progress[-1] == (total, total)
    assert {most for _, most in progress} == {total}
    pictures = [event["data"] for event in events if event["type"] == "preview"]
    assert [picture["node"] for picture in pictures] == [SAMPLER] * len(plan.chunks)
    assert Image.open(io.BytesIO(pictures[0]["bytes"])).size == (128, 128)
    texts = [event["data"] for event in events if event["type"] == "text"]
    assert texts == [{"node": SAMPLER, "text": f"the settings fit {STUDENT}"}]


def test_the_ui_workflow_is_the_api_workflow(talk):
    definitions = talk(lambda client: client.get("/object_info"))
    ui = json.loads(UI.read_text(encoding="utf-8"))
    wanted = json.loads(API.read_text(encoding="utf-8"))
    for node in wanted.values():
        del node["_meta"]
    assert to_prompt(ui, definitions) == wanted


def test_the_ui_workflow_runs(talk):
    definitions = talk(lambda client: client.get("/object_info"))
    converted = to_prompt(json.loads(UI.read_text(encoding="utf-8")), definitions)
    converted[SAMPLER]["inputs"]["seed"] = 5  # not the result of the test above
    run = talk(lambda client: client.run(converted))
    assert SAMPLER not in run.cached
    assert len(probe(fetch_video(talk, run)).pictures) == 37


def test_the_template_browser_offers_the_workflow(talk):
    offered = talk(lambda client: client.get("/api/workflow_templates"))
    ours = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert len(ours) == 4
    assert set(offered["ComfyUI-TurboTalk"]) == ours
    served = talk(
        lambda client: client.get(
            "/api/workflow_templates/ComfyUI-TurboTalk/TurboTalk - first video.json"
        )
    )
    assert served == json.loads(UI.read_text(encoding="utf-8"))


def test_the_help_panel_finds_our_pages(talk):
    page = talk(
        lambda client: client.read("/extensions/ComfyUI-TurboTalk/docs/TurboTalkSampler.md")
    )
    assert page.startswith(b"# TurboTalk")


def test_the_workflow_carries_what_the_model_ships_with():
    files = find_model_files()
    shipped = read_request(files.dit)
    prompt = json.loads(API.read_text(encoding="utf-8"))
    assert prompt["3"]["inputs"]["unet_name"] == files.dit.name == STUDENT
    assert prompt["7"]["inputs"]["name"] == files.adapter.name
    sampler = prompt[SAMPLER]["inputs"]
    assert shipped.schedule == "distilled"  # the sampler's own, where none is wired
    assert sampler["steps"] == shipped.num_inference_steps
    assert sampler["shift"] == shipped.shift
    assert sampler["audio_guidance"] == shipped.audio_guidance_scale
    assert sampler["update"] == shipped.update
    assert sampler["chunk_frames"] == shipped.chunk_frames
    assert sampler["motion_frames"] == shipped.num_motion_frames
    assert (sampler["width"], sampler["height"]) == (shipped.width, shipped.height)


def test_another_crf_does_not_sample_again(talk, prompt):
    first = talk(lambda client: client.run(prompt))
    prompt[ASSEMBLE]["inputs"]["crf"] = 45
    second = talk(lambda client: client.run(prompt))
    assert SAMPLER in second.cached
    assert ASSEMBLE not in second.cached
    assert len(fetch_video(talk, second)) < len(fetch_video(talk, first))


@pytest.mark.parametrize(
    ("node", "changes", "message"),
    [
        (SAMPLER, {"width": 130}, "width 130; use 16, 32, 48 and so on"),
        (SAMPLER, {"chunk_frames": 20}, "chunk_frames 20; use 5, 9, 13 and so on"),
        (SAMPLER, {"motion_frames": 21}, "21 motion frames in chunks of 21"),
        (SAMPLER, {"text_guidance": 4}, "without a prompt"),
        (SAMPLER, {"audio_guidance": 99}, "Value 99.0 bigger than max"),
        (SCHEDULE, {"steps": 0}, "Value 0 smaller than min of 1"),
        (SCHEDULE, {"steps": 9, "kind": "distilled"}, "use 1 to 4 with the distilled schedule"),
        ("7", {"name": "nothing.safetensors"}, "Value not in list"),
        (ASSEMBLE, {"codec": "vp9"}, "Value not in list"),
    ],
)
def test_what_can_be_known_is_refused_before_running(talk, prompt, node, changes, message):
    prompt[node]["inputs"] |= changes
    with pytest.raises(PromptRefused, match=message) as refused:
        talk(lambda client: client.run(prompt))
    assert set(refused.value.node_errors) == {node}


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("node", "name", "values"),
    [
        (SAMPLER, "steps", (0, -1, 1001, NAN, "many", None)),
        (SAMPLER, "seed", (-1, 2**64)),
        (SAMPLER, "size_from", ("portrait",)),
        (SAMPLER, "width", (0, 8, 130, 4112)),
        (SAMPLER, "height", (0, 17, 5000)),
        (SAMPLER, "audio_guidance", (-0.1, 21, NAN, INFINITE)),
        (SAMPLER, "text_guidance", (-1, 99, NAN, 2.0)),
        (SAMPLER, "shift", (0, 101, NAN, -INFINITE)),
        (SAMPLER, "update", ("jump",)),
        (SAMPLER, "chunk_frames", (0, 1, 20, 1005)),
        (SAMPLER, "motion_frames", (0, 2, 21, 25, 1001)),
        (SAMPLER, "color_strength", (-0.1, 1.1, NAN)),
        (SAMPLER, "max_seconds", (-1, NAN, INFINITE)),
        (SAMPLER, "anchor", ("sometimes",)),
        (SCHEDULE, "steps", (0, 5, 1001)),
        (SCHEDULE, "shift", (0, NAN)),
        (SCHEDULE, "kind", ("cosine",)),
        ("6", "start_seconds", (-1, NAN)),
        ("6", "end_seconds", (-1, NAN)),
        ("6", "hearing", ("twice",)),
        ("8", "strength", (-1, 5, NAN)),
        (ASSEMBLE, "crf", (-1, 99)),
        (ASSEMBLE, "start_frame", (-1,)),
        (ASSEMBLE, "num_frames", (-1,)),
        (ASSEMBLE, "fps", ("26",)),
    ],
)
def test_a_wrong_value_is_one_error_on_its_own_widget(talk, prompt, node, name, values):
    core_names = ("num_inference_steps", "guidance_scale", "num_motion_frames")

    async def post(client):
        for value in values:
            wrong = json.loads(json.dumps(prompt))
            wrong[node]["inputs"][name] = value
            with pytest.raises(PromptRefused) as refused:
                await client.run(wrong)
            errors = refused.value.node_errors
            assert set(errors) == {node}, value
            (error,) = errors[node]["errors"]
            assert error["extra_info"]["input_name"] == name, value
            assert not any(word in error["details"] for word in core_names)

    talk(post)


def test_a_sampler_of_its_own_schedule_takes_few_steps(talk, prompt):
    del prompt[SAMPLER]["inputs"]["sigmas"]
    prompt[SAMPLER]["inputs"]["steps"] = 9
    with pytest.raises(PromptRefused, match="got 9 steps; use 1 to 4, or connect") as refused:
        talk(lambda client: client.run(prompt))
    (error,) = refused.value.node_errors[SAMPLER]["errors"]
    assert error["extra_info"]["input_name"] == "steps"


def test_a_value_that_another_node_computes_is_checked_before_the_run(talk, prompt):
    prompt["30"] = {"class_type": "PrimitiveInt", "inputs": {"value": 20}}
    prompt[SAMPLER]["inputs"]["chunk_frames"] = ["30", 0]
    with pytest.raises(PromptFailed, match="got chunk_frames 20; use 5, 9, 13") as failed:
        talk(lambda client: client.run(prompt))
    assert failed.value.event["data"]["exception_type"] == "turbotalk.errors.RequestError"


def fail(talk, prompt):
    """Run a prompt that fails; gives the data of its error in the history."""
    with pytest.raises(PromptFailed) as failed:
        talk(lambda client: client.run(prompt))
    return failed.value.event["data"]


def test_a_video_without_sound(talk, prompt, server):
    prompt["20"] = {"class_type": "LoadVideo", "inputs": {"file": "actor.mp4"}}
    prompt["21"] = {"class_type": "GetVideoComponents", "inputs": {"video": ["20", 0]}}
    prompt["6"]["inputs"]["audio"] = ["21", 1]
    error = fail(talk, prompt)
    assert error["node_id"] == "6"
    assert error["exception_type"] == "turbotalk.errors.AudioError"
    assert "a video without sound has none" in error["exception_message"]


def test_an_output_folder_that_is_emptied_meanwhile(talk, prompt, server):
    short = {"seed": 21, "max_seconds": 0.4, "chunk_frames": 5, "motion_frames": 1}
    prompt[SAMPLER]["inputs"] |= short
    prompt["13"] = {
        "class_type": "TurboTalkTakeFrames",
        "inputs": {"take": [SAMPLER, 0], "start_frame": 0, "num_frames": 1},
    }
    prompt["14"] = {"class_type": "PreviewImage", "inputs": {"images": ["13", 0]}}
    videos = [fetch_video(talk, talk(lambda client: client.run(prompt)))]
    folder = server.base / "output" / "turbotalk_takes"
    for crf, lose in enumerate(
        (
            lambda: shutil.rmtree(folder),
            lambda: [path.unlink() for path in folder.glob("*/chunk_00001.mkv")],
            lambda: folder.rename(folder.with_name("renamed")),
            lambda: [path.unlink() for path in (server.base / "temp").glob("turbotalk_*.mp4")],
        )
    ):
        lose()
        if crf % 2:
            prompt[ASSEMBLE]["inputs"]["crf"] = 30 + crf
        run = talk(lambda client: client.run(prompt))
        videos.append(fetch_video(talk, run))
    assert [len(probe(video).pictures) for video in videos] == 5 * [10]
    run = talk(lambda client: client.run(prompt))
    assert {SAMPLER, ASSEMBLE} <= run.cached  # nothing is lost, so nothing is made again


def test_no_error_has_a_folder_of_the_server(talk, prompt, server):
    (server.base / "input" / "broken.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(200))
    takes = server.base / "output" / "turbotalk_takes"
    takes.mkdir(exist_ok=True)
    shown = []

    def change(**changes):
        changed = json.loads(json.dumps(prompt))
        changed[SAMPLER]["inputs"] |= changes
        return changed

    dubbing = change(reference_image=["20", 0], size_from="custom")
    dubbing["20"] = {"class_type": "LoadVideo", "inputs": {"file": "broken.mp4"}}
    shown.append(fail(talk, dubbing))
    with blocked(takes):
        shown.append(fail(talk, change(seed=31)))
    prompt["4"]["inputs"]["vae_name"] = "pixel_space"
    shown.append(fail(talk, prompt))
    for error in shown:
        assert error["exception_type"].startswith("turbotalk.errors."), error
        for text in (str(server.base), str(ROOT), "/tmp/"):
            assert text not in error["exception_message"], error["exception_message"]


@contextmanager
def blocked(folder):
    """Put a file where a folder is expected."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp"])
def test_an_animation_is_said_to_be_a_film(talk, prompt, server, name):
    pictures = [Image.new("RGB", (64, 64), (40 * level, 90, 60)) for level in range(4)]
    pictures[0].save(server.base / "input" / name, save_all=True, append_images=pictures[1:])
    prompt["1"]["inputs"]["image"] = name
    prompt[SAMPLER]["inputs"] |= {"max_seconds": 0.2, "chunk_frames": 5, "motion_frames": 1}
    events = []
    talk(lambda client: client.run(prompt, events.append))
    (text,) = (
        event["data"]["text"]
        for event in events
        if event["type"] == "text" and event["data"]["node"] == SAMPLER
    )
    assert text.startswith("4 pictures are taken as the frames of a film, 25 a second")


def test_a_conversation_dubs_a_video(talk, conversation):
    run = talk(lambda client: client.run(conversation))
    video = probe(fetch_video(talk, run))
    assert len(video.pictures) == math.floor(25 * SECONDS)
    assert video.size == (160, 112)  # as 96x64, with the area of 128x128
    assert (video.sound_rate, video.channels) == (44_100, 2)
    (picture,) = run.outputs[PREVIEW]["images"]
    shown = Image.open(io.BytesIO(talk(lambda client: client.view(picture))))
    assert shown.size == (96, 64)


def test_a_region_that_overlaps_is_refused_before_sampling(talk, conversation):
    conversation[BEN]["inputs"]["x"] = 30
    conversation[SAMPLER]["inputs"]["seed"] = 12  # so that no earlier result answers
    events = []
    with pytest.raises(
        PromptFailed, match="the regions of Anna and Ben share 640 pixels"
    ) as failed:
        talk(lambda client: client.run(conversation, events.append))
    assert failed.value.event["data"]["node_id"] == PREVIEW
    begun = {event["data"]["node"] for event in events if event["type"] == "executing"}
    assert PREVIEW in begun
    assert begun.isdisjoint({SAMPLER, "24"})


def test_what_only_the_data_can_tell_is_a_node_error(talk, prompt, server):
    prompt["4"]["inputs"]["vae_name"] = "pixel_space"
    with pytest.raises(PromptFailed, match=r"latent channels; the Wan 2.1 VAE") as failed:
        talk(lambda client: client.run(prompt))
    assert failed.value.event["data"]["node_id"] == SAMPLER
    assert failed.value.event["data"]["exception_type"] == "turbotalk.errors.MismatchError"


def when_a_chunk_is_shown(do):
    """An ``on_event`` that does something once, after the first chunk; its preview comes first."""
    done = []

    def on_event(event):
        if event["type"] == "preview" and not done:
            done.append(do())

    return on_event


def test_after_the_stop_button_the_same_work_goes_on(talk, prompt, server):
    prompt[SAMPLER]["inputs"]["seed"] = 11
    before = set((server.base / "temp").iterdir())

    async def press(client):
        await client.run(
            prompt, when_a_chunk_is_shown(lambda: asyncio.ensure_future(client.interrupt()))
        )

    with pytest.raises(PromptFailed) as failed:
        talk(press)
    assert failed.value.event["type"] == "execution_interrupted"
    assert set((server.base / "temp").iterdir()) == before
    run = talk(lambda client: client.run(prompt))
    assert len(probe(fetch_video(talk, run)).pictures) == math.floor(25 * SECONDS)
    assert "of which 1 of 2 chunks are finished" in server.log.read_text()


def test_the_same_take_queued_twice_is_made_once(talk, prompt, server):
    """By two clients at the same time, who want other files of it."""
    prompt[SAMPLER]["inputs"]["seed"] = 14
    other = json.loads(json.dumps(prompt))
    other[ASSEMBLE]["inputs"]["crf"] = 45
    takes = server.base / "output" / "turbotalk_takes"
    before = set(takes.iterdir()) if takes.exists() else set()

    async def run(client, wanted):
        async with ComfyClient(server.address) as another:
            return await asyncio.gather(client.run(prompt), another.run(wanted))

    first, second = talk(lambda client: run(client, other))
    assert len(set(takes.iterdir()) - before) == 1
    assert (SAMPLER in first.cached) + (SAMPLER in second.cached) == 1
    videos = [fetch_video(talk, run) for run in (first, second)]
    assert [len(probe(video).pictures) for video in videos] == 2 * [math.floor(25 * SECONDS)]
    assert len(videos[0]) > len(videos[1])


def test_a_killed_server_goes_on_when_it_is_back(talk, prompt, host, tmp_path):
    """What it then makes is what a server makes that nobody killed."""
    prompt[SAMPLER]["inputs"]["seed"] = 13
    whole = probe(fetch_video(talk, talk(lambda client: client.run(prompt))))
    (tmp_path / "input").mkdir()
    write_inputs(tmp_path / "input")

    async def run(address, on_event=lambda _event: None):
        async with ComfyClient(address) as client:
            finished = await client.run(prompt, on_event)
            (file,) = finished.outputs[SAVE]["images"]
            return await client.view(file)

    def kill_when_a_chunk_is_finished(_event):
        for journal in tmp_path.glob("output/*/*/take.journal"):
            if len(journal.read_text().splitlines()) == 2:  # the first tells what it is made of
                killed.kill()

    with (
        ComfyServer(Path(host.nodes.__file__).parent, tmp_path) as killed,
        pytest.raises((ServerFailed, OSError)),
    ):
        asyncio.run(run(killed.address, kill_when_a_chunk_is_finished))
    with ComfyServer(Path(host.nodes.__file__).parent, tmp_path) as back:
        video = probe(asyncio.run(run(back.address)))
        assert "of which 1 of 2 chunks are finished" in back.log.read_text()
    assert len(video.pictures) == len(whole.pictures)
    for made, expected in zip(video.pictures, whole.pictures, strict=True):
        assert (made == expected).all()


@pytest.mark.slow
def test_two_servers_that_make_the_same_take(talk, prompt, server, host, tmp_path):
    """The second is refused while the first works, and afterwards has the first's take."""
    prompt[SAMPLER]["inputs"]["seed"] = 41
    (tmp_path / "input").mkdir()
    write_inputs(tmp_path / "input")
    (tmp_path / "output").symlink_to(server.base / "output", target_is_directory=True)
    refused = []

    async def run(address, on_event=lambda _event: None):
        async with ComfyClient(address) as client:
            finished = await client.run(prompt, on_event)
            (file,) = finished.outputs[SAVE]["images"]
            return await client.view(file)

    async def queue_twice(other):
        """The first server is paused after its first chunk, until the second has answered."""
        pending = []

        async def try_meanwhile():
            with pytest.raises(PromptFailed) as failed:
                await run(other)
            refused.append(failed.value.event["data"])
            os.kill(server._process.pid, signal.SIGCONT)

        def pause():
            os.kill(server._process.pid, signal.SIGSTOP)
            pending.append(asyncio.ensure_future(try_meanwhile()))

        video = await run(server.address, when_a_chunk_is_shown(pause))
        await asyncio.gather(*pending)
        return video

    with ComfyServer(Path(host.nodes.__file__).parent, tmp_path) as second:
        try:
            video = asyncio.run(queue_twice(second.address))
        finally:
            os.kill(server._process.pid, signal.SIGCONT)
        again = asyncio.run(run(second.address))
    (error,) = refused
    assert error["exception_type"] == "turbotalk.errors.OutputError"
    assert (
        "another program is making the take output/turbotalk_takes/" in (error["exception_message"])
    )
    for made, expected in zip(probe(again).pictures, probe(video).pictures, strict=True):
        assert (made == expected).all()
