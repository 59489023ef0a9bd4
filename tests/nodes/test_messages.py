"""The sampler says what does not fit the loaded weights, if it can know them."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.family import make_request

STUDENT = {"kind": "student", "steps": 4, "shift": 5.0, "update": "renoise"}
TEACHER = {"kind": "teacher", "steps": 20, "shift": 5.0, "audio_guidance_scale": 1.5}


@pytest.fixture
def load(host, family, models, run_node):
    """A model of a file that ships with settings, adapter and all."""

    def tell(path, settings):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() | {"turbotalk": json.dumps(settings)}
        save_file(load_file(path), path.with_name("told.safetensors"), metadata)

    def load(settings, adapter_settings=None):
        tell(family.dit, settings)
        patch = models.patch
        if adapter_settings is not None:
            tell(family.adapter, adapter_settings)
            patch = run_node("TurboTalkLoadAudioAdapter", name="told.safetensors")
        return run_node(
            "TurboTalkApplyAudioAdapter",
            model=run_node("UNETLoader", unet_name="told.safetensors", weight_dtype="default"),
            model_patch=patch,
            strength=1.0,
        )

    return load


@pytest.fixture
def ask(part):
    """What is noted of a request."""

    def ask(model, **settings):
        request = part("turbotalk_core.request").TalkRequest.from_json(
            make_request(**{"num_inference_steps": 4, **settings}).to_json()
        )
        notes = part("nodes.host.messages")
        shipped = notes.read_shipped(
            model, part("nodes.host.audio_adapter").find_audio_adapter(model)
        )
        return notes.show_quality_warnings(shipped, request, "7")

    return ask


@pytest.fixture
def shown(part, monkeypatch):
    """What the host sends to its page: texts with the id of the node that they stand on."""
    server, texts = part("nodes.host.messages").PromptServer, []

    class Page:
        send_progress_text = server.send_progress_text

        def send_sync(self, event, message, sid):
            stop = 4 + int.from_bytes(message[:4], "big")
            texts.append((message[4:stop].decode(), message[stop:].decode()))

    monkeypatch.setattr(server, "instance", Page(), raising=False)
    return texts


def test_a_student_with_guidance(load, ask, shown, caplog):
    caplog.set_level(logging.WARNING)
    (note,) = ask(load(STUDENT), audio_guidance_scale=3.0)
    assert "audio guidance is 3, the student has" in note
    assert shown == [("7", note)]
    assert note in caplog.text


def test_an_adapter_of_the_other_kind(load, ask):
    (note,) = ask(load(STUDENT, adapter_settings=TEACHER))
    assert "adapter was trained with a teacher" in note
    assert ask(load(STUDENT, adapter_settings={"kind": "student"})) == []


def test_matching_settings(load, ask, shown, caplog):
    caplog.set_level(logging.WARNING)
    assert ask(load(STUDENT)) == []
    assert (
        ask(
            load(TEACHER),
            num_inference_steps=20,
            audio_guidance_scale=1.5,
            update="euler",
            sigmas=tuple(torch.linspace(1, 0, 21).tolist()),
        )
        == []
    )
    assert shown == 2 * [("7", "the settings fit told.safetensors")]
    assert caplog.text == ""


def test_a_lora_may_distil(host, load, ask, run_node):
    model = load(TEACHER)
    assert "not known to be distilled" in ask(model)[0]
    loras = host.base / "models" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    change = {"diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.ones(1, 48)}
    change["diffusion_model.blocks.0.ffn.0.lora_up.weight"] = torch.ones(96, 1)
    save_file(change, loras / "distils.safetensors")
    merged = run_node(
        "LoraLoaderModelOnly", model=model, lora_name="distils.safetensors", strength_model=1.0
    )
    beside = host.lora_debug_nodes.LoraLoaderBypassModelOnly().load_lora_model_only(
        model, "distils.safetensors", 1.0
    )[0]
    assert ask(merged) == ask(beside) == []


@pytest.mark.parametrize(
    "origin",
    [
        None,  # as loaders leave it that do not say
        (print, ()),
        (print, ("there is no such file",)),
        (print, ({"a": "dictionary of tensors"},), 0),
    ],
)
def test_a_model_of_an_unknown_file(load, ask, shown, origin):
    model = load(STUDENT)
    model.cached_patcher_init = origin
    assert ask(model, audio_guidance_scale=3.0) == []
    ((_, text),) = shown
    assert "not known" in text


def test_a_file_of_another_kind(family, load, ask):
    model = load(STUDENT)
    gguf = family.dit.with_name("quantised.gguf")
    gguf.write_bytes(b"GGUF" + bytes(100))
    for path in (family.vae, gguf):
        model.cached_patcher_init = (print, (str(path), {}))
        assert ask(model, audio_guidance_scale=3.0) == []


def test_without_a_page(load, ask, part, monkeypatch):
    monkeypatch.delattr(part("nodes.host.messages").PromptServer, "instance", raising=False)
    assert len(ask(load(STUDENT), update="euler")) == 1


def test_the_sampler_asks(load, sample, shown):
    sample(model=load(STUDENT), audio_guidance=3.0)
    ((node_id, text),) = shown
    assert node_id == "7"
    assert "audio guidance is 3" in text


def test_adapter_and_headers_are_looked_up_once(load, sample, shown, part, monkeypatch):
    model = load(STUDENT)
    sampler, notes = part("nodes.sampler"), part("nodes.host.messages")
    calls = []

    def watch(module, name):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda arg: calls.append(name) or call(arg))

    watch(sampler, "find_audio_adapter")
    watch(notes, "inspect")
    sample(model=model)
    assert calls == ["find_audio_adapter", "inspect", "inspect"]  # the model's file, the adapter's


def test_a_file_cannot_put_words_of_its_own_on_the_page(load, ask, shown, caplog):
    caplog.set_level(logging.WARNING)
    words = "<img src=x onerror=alert(1)>"
    hostile = dict.fromkeys((*STUDENT, *TEACHER, "schedule", "chunk_frames"), words)
    ask(load(hostile, adapter_settings=hostile), update="euler", num_inference_steps=3)
    model = load(STUDENT)
    path = model.cached_patcher_init[1][0]
    named = Path(path).with_name("<b>\x1b[2J.safetensors")
    named.write_bytes(Path(path).read_bytes())
    model.cached_patcher_init = (print, (str(named),))
    assert ask(model) == []
    assert shown[1] == ("7", "the settings fit &lt;b&gt;\\x1b[2J.safetensors")
    assert not any("<" in text for _, text in shown)
    assert words not in caplog.text


@pytest.mark.parametrize("anchors", [False, True])
def test_the_sampler_anchors_what_ships_anchored(load, sample, anchors):
    model = load(STUDENT | {"anchors_chunks": anchors})
    automatic = sample(model=model).read()
    assert torch.equal(sample(model=model, anchor="on").read(), automatic) == anchors
    model.cached_patcher_init = None
    assert torch.equal(sample(model=model, anchor="off").read(), automatic) != anchors
