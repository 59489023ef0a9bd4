"""The benchmark: memory counted as it is taken, and chunks really run, on very small networks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from turbotalk_core.bench import (
    FULL_REQUEST,
    FULL_SIZES,
    NUM_RUNS,
    Measurement,
    Report,
    Sizes,
    Timing,
    build_random_models,
    count_need,
    count_tokens,
    find_obstacle,
    measure,
    run_chunks,
    single_chunk,
)
from turbotalk_core.errors import RequestError
from turbotalk_core.model.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.model.denoiser import ProjectionAdapter, WanDenoiser
from turbotalk_core.model.memory import count_memory
from turbotalk_core.model.vae import WanVAE
from turbotalk_core.model.wan import WanConfig, WanModel
from turbotalk_core.pipeline import Models

CPU = torch.device("cpu")
SIZES = Sizes(
    transformer=WanConfig(
        dim=48,
        ffn_dim=64,
        num_heads=2,
        num_layers=3,
        text_dim=8,
        frequency_dim=16,
        image_dim=10,
        audio_heads=4,
        audio_token_dim=6,
    ),
    projection=AudioAdapterConfig(frame_width=14, hidden_dim=9, num_tokens=3, token_dim=6),
    vae_width=2,
)
REQUEST = single_chunk(replace(FULL_REQUEST, height=32, width=48), 2, 9)


@pytest.fixture(scope="module")
def models() -> Models:
    return build_random_models(SIZES, torch.bfloat16, CPU)


def _list_modules(models: Models) -> tuple[WanModel, AudioProjection, WanVAE]:
    assert isinstance(models.denoiser, WanDenoiser)
    assert isinstance(models.adapter, ProjectionAdapter)
    assert isinstance(models.codec, WanVAE)
    return models.denoiser.model, models.adapter.projection, models.codec


def test_the_full_size_is_the_published_one() -> None:
    assert (FULL_REQUEST.width, FULL_REQUEST.height, FULL_REQUEST.chunk_frames) == (832, 480, 81)
    assert count_tokens(FULL_REQUEST) == 32_760
    small = single_chunk(replace(FULL_REQUEST, height=32, width=32), 1, 5)
    need = count_need(FULL_SIZES, small, torch.bfloat16)
    assert round(need.transformer / 2e9, 3) == 16.395
    assert round(need.audio / 2e9, 3) == 2.487
    assert round(need.vae / 4e6, 1) == 126.9


def test_weights_are_counted_as_they_are_built(models: Models) -> None:
    need = count_need(SIZES, REQUEST, torch.bfloat16)
    model, projection, vae = _list_modules(models)
    bytes_of = {name: weight.nbytes for name, weight in model.named_parameters()}
    audio = sum(n for name, n in bytes_of.items() if "audio_cross_attn" in name or "norm_x" in name)
    assert need.transformer == sum(bytes_of.values()) - audio
    assert need.audio == audio + sum(weight.nbytes for weight in projection.parameters())
    assert need.vae == sum(weight.nbytes for weight in vae.parameters())
    assert need.weights == need.transformer + need.audio + need.vae
    assert need.peak == need.weights + max(need.encode, need.forward, need.decode)


def test_memory_is_counted_as_it_is_taken(models: Models) -> None:
    need = count_need(SIZES, REQUEST, torch.bfloat16)
    model, _, vae = _list_modules(models)
    forward = count_memory(
        model,
        lambda: model(
            torch.zeros(1, 16, 3, 4, 6),
            torch.zeros(1),
            torch.zeros(1, 20, 3, 4, 6),
            text_BND=torch.zeros(1, 512, 8),
            image_embeds_BND=torch.zeros(1, 257, 10),
            audio_BFND=torch.zeros(1, 3, 3, 6),
        ),
    )
    assert need.forward == forward
    reference = count_memory(vae, lambda: vae.encode_reference(torch.zeros(1, 3, 32, 48), 9))
    assert need.encode == reference
    assert need.decode == count_memory(vae, lambda: vae.decode(torch.zeros(1, 16, 3, 4, 6)))


def test_random_weights_are_the_same_each_time_and_leave_the_generator(models: Models) -> None:
    before = torch.get_rng_state()
    again = build_random_models(SIZES, torch.bfloat16, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(_list_modules(models), _list_modules(again), strict=True):
        expected = other.state_dict()
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, expected[name])
            assert weight.dtype == (torch.float32 if one is models.codec else torch.bfloat16)


def test_chunks_are_run_and_timed(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    call = WanDenoiser.__call__

    def watch(self: WanDenoiser, *arguments: object) -> object:
        velocity = call(self, *arguments)  # pyright: ignore[reportArgumentType]
        calls.append((tuple(velocity.shape), bool(velocity.isfinite().all())))
        return velocity

    monkeypatch.setattr(WanDenoiser, "__call__", watch)
    measured = run_chunks(models, SIZES, REQUEST, CPU)
    assert calls == [((1, 16, 3, 4, 6), True)] * (2 * NUM_RUNS)
    assert len(measured.runs) == NUM_RUNS
    assert measured.peak is None
    for run in measured.runs:
        assert min(run.forward, run.encode, run.decode) > 0
        assert run.chunk >= 2 * run.forward + run.encode + run.decode


def test_large_weights_are_not_run_on_a_cpu() -> None:
    need = count_need(SIZES, REQUEST, torch.float32)
    assert find_obstacle(need, CPU) is None
    obstacle = find_obstacle(replace(need, transformer=33_000_000_000), CPU)
    assert obstacle is not None
    assert "CUDA" in obstacle


def test_a_cuda_device_must_have_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    need = replace(count_need(SIZES, REQUEST, torch.float32), transformer=33_000_000_000)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_obstacle(need, cuda) == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80_000_000_000, 80_000_000_000))
    assert find_obstacle(need, cuda) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (35_000_000_000, 80_000_000_000))
    assert find_obstacle(need, cuda) == "35.0 GB of the device are free; 36.3 GB are wanted"


def test_what_is_not_run_is_said_with_what_it_would_need() -> None:
    small = single_chunk(replace(FULL_REQUEST, height=32, width=32), 1, 5)
    report = measure(small, FULL_SIZES, files=None, dtype=torch.bfloat16, device=CPU)
    assert report.measurement is None
    text = "\n".join(report.lines())
    assert "transformer weights      32.790 GB" in text
    assert "not run: on cpu weights of this size would take hours" in text
    told = json.loads(json.dumps(report.to_json()))
    assert (told["seconds"], told["ratios"], told["peak_bytes"]) == ([], {}, None)
    assert told["needed_bytes"]["peak"] == report.need.peak


def test_ratios_are_in_calls_of_the_transformer() -> None:
    first = Timing(forward=3.0, encode=1.0, decode=1.0, chunk=9.0)
    last = Timing(forward=2.0, encode=1.0, decode=2.0, chunk=7.0)
    report = Report(
        request=REQUEST,
        weights="random weights in float32",
        device="a device",
        need=count_need(SIZES, REQUEST, torch.float32),
        obstacle=None,
        measurement=Measurement(runs=(first, last), peak=1_500_000_000),
    )
    assert report.ratios == {"chunk": 3.5, "vae": 1.5}
    text = "\n".join(report.lines())
    for line in ("forward                   2.000 s, first run 3.000 s", "1.500 GB", "3.50"):
        assert line in text
    told = report.to_json()
    assert told["seconds"][1] == {"forward": 2.0, "encode": 1.0, "decode": 2.0, "chunk": 7.0}
    assert (told["num_tokens"], told["peak_bytes"]) == (18, 1_500_000_000)


def test_one_chunk_is_one_chunk_without_guidance() -> None:
    guided = replace(FULL_REQUEST, audio_guidance_scale=4.0, schedule="distilled")
    request = single_chunk(guided, 3, None)
    assert (request.num_inference_steps, request.chunk_frames) == (3, 81)
    assert (request.audio_guidance_scale, request.guidance_scale) == (1, 1)
    with pytest.raises(RequestError, match="got 12 frames"):
        single_chunk(guided, 1, 12)
    with pytest.raises(RequestError, match="got num_inference_steps 0"):
        single_chunk(guided, 0, 9)
