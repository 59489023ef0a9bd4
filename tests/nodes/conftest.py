"""A real ComfyUI: in this process for single nodes, as a server for whole workflows.

Without ``COMFYUI_PATH`` these tests are not collected. The pack is loaded by ComfyUI's own loader,
from a folder with a dash and a dot in its name, under the name that ComfyUI makes from the path;
so its classes are not those of the ``turbotalk_core`` that tests import, and only tensors, numbers
and files pass between the two.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.family import write_host_family
from tools.comfy import in_process as host_process
from tools.comfy.in_process import import_host, load_pack
from tools.comfy.server import ComfyClient

HOST = os.environ.get("COMFYUI_PATH")
ROOT = Path(__file__).parents[2]
collect_ignore_glob = [] if HOST else ["test_*"]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # the host's own code warns of its dependencies; ours must not
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """ComfyUI's modules in this process, on the CPU, with folders of its own."""
    assert HOST
    return import_host(Path(HOST), tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="session")
def pack(host):
    """The pack as ComfyUI's own loader loads it."""
    return load_pack(host)


@pytest.fixture
def part(pack):
    """Import a module of the loaded pack: ``part("nodes.host.denoiser")``."""
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture
def errors(part):
    """The error kinds that the nodes raise."""
    return part("turbotalk_core.errors")


@pytest.fixture
def run_node(host, pack):
    """Run a node as the host does: ``run_node("TurboTalkSchedule", steps=4, …)``."""
    return partial(host_process.run_node, host)


@pytest.fixture(scope="session")
def family(host):
    """Paths of a random-weight family, in a folder that the host lists."""
    return write_host_family(host.base / "models")


@pytest.fixture
def models(family, run_node):
    """The family, loaded by the host's and our loaders, the adapter applied."""
    model = run_node("UNETLoader", unet_name=family.dit.name, weight_dtype="default")
    patch = run_node("TurboTalkLoadAudioAdapter", name=family.adapter.name)
    return SimpleNamespace(
        bare=model,
        patch=patch,
        model=run_node("TurboTalkApplyAudioAdapter", model=model, model_patch=patch, strength=1.0),
        vae=run_node("VAELoader", vae_name=family.vae.name),
        audio_encoder=run_node(
            "TurboTalkLoadAudioEncoder", audio_encoder_name=family.audio_encoder.name
        ),
    )


@pytest.fixture
def velocity(part):
    """What a MODEL with an adapter answers to fixed inputs and the tokens of two latent frames."""

    def noise(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def predict(model, tokens=None):
        tokens = noise(2, 4, 24) if tokens is None else tokens
        types = part("turbotalk_core.types")
        conditioning = types.Conditioning(reference_BCFHW=noise(1, 20, 2, 4, 4))
        with (
            torch.inference_mode(),
            part("nodes.host.denoiser").HostDenoiser(model, torch.tensor([0.5, 0.0])) as denoiser,
        ):
            return denoiser(
                noise(1, 16, 2, 4, 4), 0.5, conditioning, types.AudioTokens(tokens_FND=tokens)
            )

    return predict


@pytest.fixture
def speech(models, run_node):
    """One second of noise, heard."""
    samples = torch.randn(1, 1, 16_000, generator=torch.Generator().manual_seed(3))
    return run_node(
        "TurboTalkEncodeSpeech",
        audio_encoder=models.audio_encoder,
        audio={"waveform": samples, "sample_rate": 16_000},
        normalize_loudness=True,
    )


@pytest.fixture
def sample(models, speech, run_node):
    """Run the sampler on the family with few frames; any input may be given."""

    def run(**changes):
        inputs = {
            "model": models.model,
            "vae": models.vae,
            "reference_image": torch.full((1, 32, 32, 3), 0.5),
            "speech": speech,
            "steps": 1,
            "seed": 0,
            "size_from": "custom",
            "width": 32,
            "height": 32,
            "audio_guidance": 1.0,
            "text_guidance": 1.0,
            "shift": 5.0,
            "update": "renoise",
            "chunk_frames": 21,
            "motion_frames": 5,
        }
        return run_node("TurboTalkSampler", **(inputs | changes))

    return run


@pytest.fixture
def talk(server):
    """Run something with a client of the module's server: ``talk(lambda c: c.run(prompt))``."""

    def run(make_coroutine):
        async def connected():
            async with ComfyClient(server.address) as client:
                return await make_coroutine(client)

        return asyncio.run(connected())

    return run
