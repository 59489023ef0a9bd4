"""Benchmark: memory counts, and real chunks, on very small networks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.family import make_config
from turbotalk_core.benchmark.memory import count_memory
from turbotalk_core.benchmark.report import (
    FULL_REQUEST,
    FULL_SIZES,
    Measurement,
    Report,
    Sizes,
    build_random_models,
    count_need,
    find_obstacle,
    measure,
    plain_request,
    run_chunks,
)
from turbotalk_core.benchmark.timing import ChunkTiming, Speed, VideoTiming
from turbotalk_core.errors import RequestError
from turbotalk_core.models.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.models.denoiser import ProjectionAdapter, WanDenoiser
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanModel
from turbotalk_core.pipeline import Models

CPU = torch.device("cpu")
SIZES = Sizes(
    transformer=make_config(
        dim=48, ffn_dim=64, num_layers=3, image_dim=10, audio_heads=4, audio_token_dim=6
    ),
    projection=AudioAdapterConfig(frame_width=14, hidden_dim=9, num_tokens=3, token_dim=6),
    vae_width=2,
)
REQUEST = plain_request(replace(FULL_REQUEST, height=32, width=48), 9)


@pytest.fixture(scope="module")
def models() -> Models:
    return build_random_models(SIZES, torch.bfloat16, CPU)


def _list_modules(models: Models) -> tuple[WanModel, AudioProjection, WanVAE]:
    assert isinstance(models.denoiser, WanDenoiser)
    assert isinstance(models.adapter, ProjectionAdapter)
    assert isinstance(models.vae, WanVAE)
    return models.denoiser.model, models.adapter.projection, models.vae


def test_the_full_size_is_the_published_one() -> None:
    assert (FULL_REQUEST.width, FULL_REQUEST.height, FULL_REQUEST.chunk_frames) == (832, 480, 81)
    small = plain_request(replace(FULL_REQUEST, height=32, width=32), 5)
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
            assert weight.dtype == (torch.float32 if one is models.vae else torch.bfloat16)


def test_videos_are_made_and_timed(models: Models) -> None:
    requests = [replace(REQUEST, num_inference_steps=number) for number in (1, 3)]
    measured = run_chunks(models, SIZES, requests, CPU, 2)
    assert measured.peak is None
    assert [speed.num_steps for speed in measured.speeds] == [1, 3]
    for speed in measured.speeds:
        assert [chunk.num_calls for chunk in speed.video.chunks] == [speed.num_steps] * 2
        assert speed.video.num_frames == 9 + 8
    assert measured.speeds[0].bare == measured.speeds[1].bare > 0


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
    small = plain_request(replace(FULL_REQUEST, height=32, width=32), 5)
    report = measure(small, FULL_SIZES, files=None, dtype=torch.bfloat16, device=CPU)
    assert report.measurement is None
    text = "\n".join(report.lines())
    assert "transformer weights 32.790 GB" in " ".join(text.split())
    assert "not run: on cpu weights of this size would take hours" in text
    told = json.loads(json.dumps(report.to_json()))
    assert (told["speeds"], told["peak_bytes"]) == ([], None)
    assert told["needed_bytes"]["peak"] == report.need.peak


def _chunk(**seconds: float) -> ChunkTiming:
    named = dict.fromkeys(("encode", "adapter", "forward", "decode", "rest", "write"), 0.5)
    return ChunkTiming(**(named | seconds), num_encoded=9, num_calls=1)  # pyright: ignore[reportArgumentType]


def test_it_is_told_to_people_and_programs() -> None:
    chunks = (_chunk(encode=3.0), _chunk(decode=2.5))
    video = VideoTiming(chunks=chunks, seconds=10.0, num_frames=100)
    speed = Speed(num_steps=1, bare=2.0, video=video)
    report = Report(
        request=REQUEST,
        weights="random weights in float32",
        device="a device",
        need=count_need(SIZES, REQUEST, torch.float32),
        obstacle=None,
        measurement=Measurement(speeds=(speed,), peak=1_500_000_000),
    )
    text = [" ".join(line.split()) for line in report.lines()]
    for line in (
        "steps per chunk 1",
        "bare call, s 2.000",
        "chunk: decode, s 2.500",
        "chunk: chunk, s 5.000",
        "chunk / bare call 2.500",
        "first chunk, s 5.500",
        "frames per second 10.000",
        "measured peak 1.500 GB",
    ):
        assert line in text
    told = json.loads(json.dumps(report.to_json()))
    (record,) = told["speeds"]
    assert (told["num_tokens"], told["peak_bytes"]) == (18, 1_500_000_000)
    assert record["steady_chunk"]["decode"] == 2.5
    assert record["first_chunk"]["chunk"] == 5.5
    assert record["chunk_in_bare_calls"] == 2.5
    assert not any("reference" in text for text in (*told, *record, *report.lines()))


def test_chunks_are_plain_and_without_guidance() -> None:
    guided = replace(FULL_REQUEST, audio_guidance_scale=4.0, schedule="distilled")
    request = plain_request(guided, None)
    assert (request.chunk_frames, request.num_motion_frames) == (81, 9)
    assert (request.audio_guidance_scale, request.guidance_scale) == (1, 1)
    assert (REQUEST.chunk_frames, REQUEST.num_motion_frames) == (9, 1)
    with pytest.raises(RequestError, match="got 12 frames"):
        plain_request(guided, 12)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": (0,)}, "got num_inference_steps 0"),
        ({"num_chunks": 1}, "got 1 chunks"),
    ],
)
def test_settings_that_measure_nothing(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        measure(REQUEST, SIZES, files=None, dtype=torch.float32, device=CPU, **settings)
