"""Videos with the 14B networks on a fake CUDA device, from model files to a take.

A fake device shows devices and dtypes that do not mix, memory, and synchronisations. It has no
values, no kernels and no time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.core.cuda.family import (
    SIZES,
    Meter,
    load,
    make_request,
    make_sizes,
    make_small_request,
    render,
)
from tests.fake_cuda import CUDA, FakeCuda
from turbotalk_core.benchmark.report import count_need
from turbotalk_core.cli.main import main
from turbotalk_core.models.denoiser import WanDenoiser
from turbotalk_core.models.teacache import NUM_FIRST_STEPS
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.pipeline import Models
from turbotalk_core.types import AudioTokens, Conditioning

# Places where the program waits for the device; the code gives a reason for each. A new one must be
# removed, or get a reason and an entry here.
CALL = Counter({"models/denoiser.py call": 3, "models/denoiser.py _move": 2})
SPEAKERS = Counter(  # per call, not per block
    {
        "models/wan.py forward": 1,
        "models/speaker_embedding.py draw_line": 1,
        "models/rotary.py line_frequencies": 1,
    }
)
FIRST_CALL = Counter({"models/rotary.py rotary_table": 2})
CHUNK = Counter({"pipeline.py _generate": 1, "sampling/sampler.py sample": 1})
PICTURE = Counter({"pipeline.py _condition": 1})
IMAGE = Counter({"models/image_encoder.py forward": 2, "models/image_encoder.py prepare": 1})
ADAPTER = Counter({"models/denoiser.py __call__": 2})  # per voice, and for the null audio
ENCODE = Counter({"models/vae.py call": 1})
REFERENCE = Counter({"models/vae.py encode_reference": 1})
DECODE = Counter({"models/vae.py iter_decode": 1})


def _times(number: int, syncs: Counter[str]) -> Counter[str]:
    return Counter({place: number * count for place, count in syncs.items()})


def _with_text(models: Models) -> Models:
    """Add the embeddings of two prompts, as ``encode_prompt`` returns them."""
    return replace(
        models, text_BND=torch.zeros(1, 40, 4096), null_text_BND=torch.zeros(1, 60, 4096)
    )


def _networks(models: Models) -> tuple[WanDenoiser, WanVAE]:
    assert isinstance(models.denoiser, WanDenoiser)
    assert isinstance(models.vae, WanVAE)
    return models.denoiser, models.vae


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeCuda, Models]:
    """The device with networks of one block."""
    return load(tmp_path_factory.mktemp("family"), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "num_speakers"), [("480p", 1), pytest.param("720p", 2, marks=pytest.mark.long)]
)
def test_the_whole_model_takes_the_memory_that_bench_reports(
    tmp_path: Path, size: str, num_speakers: int
) -> None:
    height, width = SIZES[size]
    request = make_request(height=height, width=width)
    need = count_need(make_sizes(40), request, torch.bfloat16)
    cuda, models = load(tmp_path, 40)
    assert cuda.live == pytest.approx(need.weights, rel=1e-6)
    meter = Meter(cuda, _with_text(models))
    with cuda:
        render(meter, request, tmp_path / "take", num_speakers=num_speakers)
    parts = meter.parts
    assert meter.peak == pytest.approx(need.peak, rel=0.05)
    for name, expected in (
        ("encode", need.encode),
        ("forward", need.forward),
        ("decode", need.decode),
    ):
        assert parts[name].peak - need.weights == pytest.approx(expected, rel=0.05)
    several = SPEAKERS if num_speakers > 1 else Counter()
    assert parts["forward"].syncs == CALL + several + FIRST_CALL


@pytest.mark.slow
def test_each_step_and_chunk_waits_where_it_must(
    tmp_path: Path, family: tuple[FakeCuda, Models]
) -> None:
    request = make_small_request(
        num_inference_steps=2, guidance_scale=5.0, audio_guidance_scale=4.0, uses_apg=True
    )
    cuda, models = family
    meter = Meter(cuda, _with_text(models))
    with cuda:
        render(meter, request, tmp_path / "take", num_chunks=2)
    parts = meter.parts
    assert parts["forward"].num_calls == 2 * 2 * 3
    assert parts["forward"].syncs == _times(12, CALL) + FIRST_CALL
    assert parts["encode"].syncs == REFERENCE + _times(2, ENCODE)
    assert parts["image"].syncs == IMAGE
    assert parts["adapter"].syncs == _times(3, ADAPTER)
    assert parts["decode"].syncs == _times(2, DECODE)
    assert parts["rest"].syncs == PICTURE + _times(2, CHUNK)
    assert meter.results == {
        "forward": {"cpu torch.float32"},
        "adapter": {"cuda torch.bfloat16"},
        "image": {"cpu torch.float32"},
        "encode": {"cuda torch.float32"},
        "decode": {"cuda torch.float32"},
    }


@pytest.mark.slow
def test_several_speakers_wait_once_per_call(tmp_path: Path) -> None:
    cuda, models = load(tmp_path, 3, torch.float16, image_encoder=None)
    request = make_small_request(audio_guidance_scale=4.0, num_inference_steps=2)
    meter = Meter(cuda, models)
    with cuda:
        render(meter, request, tmp_path / "take", num_speakers=2)
    parts = meter.parts
    # Of the two calls per step, that with null audio has no speakers; there is no text or picture.
    expected = _times(4, Counter({"models/denoiser.py call": 3})) + _times(2, SPEAKERS)
    assert parts["forward"].syncs == expected + FIRST_CALL
    assert parts["adapter"].syncs == _times(3, ADAPTER)
    assert meter.results["adapter"] == {"cuda torch.float16"}


@pytest.mark.slow
def test_a_film_is_encoded_and_moved_once_per_chunk(
    tmp_path: Path, family: tuple[FakeCuda, Models]
) -> None:
    request = make_small_request(anchors_chunks=True, color_strength=0.5)
    film = [torch.full((64, 96, 3), frame / 40) for frame in range(40)]
    cuda, models = family
    meter = Meter(cuda, models)
    with cuda:
        render(meter, request, tmp_path / "take", num_chunks=2, film=film)
    parts = meter.parts
    assert parts["image"].num_calls == 2
    assert parts["encode"].syncs == _times(2, REFERENCE + ENCODE)
    assert parts["image"].syncs == _times(2, IMAGE)
    anchor = Counter({"pipeline.py _anchor": 1})  # the second chunk's
    assert parts["rest"].syncs == _times(2, PICTURE + CHUNK) + anchor


@pytest.mark.slow
def test_teacache_waits_once_per_call_when_it_may_skip(
    tmp_path: Path, family: tuple[FakeCuda, Models], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_steps = NUM_FIRST_STEPS + 4
    request = make_small_request(num_inference_steps=num_steps, audio_guidance_scale=4.0)
    cuda, models = family
    denoiser = WanDenoiser(_networks(models)[0].model, teacache_threshold=0.2)
    num_runs = 0

    def count(*_: object) -> None:
        nonlocal num_runs
        num_runs += 1

    hook = denoiser.model.blocks[0].register_forward_pre_hook(count)
    # The change of the modulation counts as 0, at which the fit gives 0.13.
    monkeypatch.setattr(cuda, "answer", lambda _: 0.0)
    meter = Meter(cuda, replace(models, denoiser=denoiser, image_encoder=None))
    with cuda:
        render(meter, request, tmp_path / "take")
    hook.remove()
    assert num_runs == 2 * (NUM_FIRST_STEPS + 2)  # 0.13, 0.27 runs, 0.13, 0.27 runs
    item = Counter({"models/teacache.py is_due": 1})
    calls = _times(2 * num_steps, Counter({"models/denoiser.py call": 3}))
    assert meter.parts["forward"].syncs == calls + _times(2 * 4, item) + FIRST_CALL


@pytest.mark.slow
def test_noise_is_that_of_a_cpu(tmp_path: Path, family: tuple[FakeCuda, Models]) -> None:
    request = make_small_request(update="renoise", num_inference_steps=2, seed=7)
    cuda, models = family
    meter = Meter(cuda, replace(models, image_encoder=None))
    with cuda:
        render(meter, request, tmp_path / "take")
    generator = torch.Generator().manual_seed(7)
    first, second = (torch.randn(1, 16, 3, 8, 12, generator=generator) for _ in range(2))
    # The first latent frame is pinned. The fake network predicts zeros, so the second step begins
    # with the first noise and the share of new noise at its level.
    assert torch.equal(meter.noises[0][:, :, 1:], first[:, :, 1:])
    sigma = 7 * 0.001 / (1 + 6 * 0.001)
    expected = (1 - sigma) * first + sigma * second
    torch.testing.assert_close(meter.noises[1][:, :, 1:], expected[:, :, 1:])


@pytest.mark.slow
def test_the_vae_saves_memory_that_runs_out(
    tmp_path: Path, family: tuple[FakeCuda, Models], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(chunk_frames=9, num_motion_frames=5)
    cuda, models = family
    vae = _networks(models)[1]
    monkeypatch.setattr(vae, "saves_memory", False)  # and sets it back
    before = cuda.live
    monkeypatch.setattr(cuda, "limit", before + 7_000_000_000)  # of 8.7 that decoding takes
    meter = Meter(cuda, replace(models, image_encoder=None))
    with cuda:
        render(meter, request, tmp_path / "take")
    assert vae.saves_memory
    assert 5_000_000_000 < meter.parts["decode"].peak - before < 7_000_000_000


def test_the_transformer_saves_memory_that_runs_out(
    family: tuple[FakeCuda, Models], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, models = family
    denoiser = _networks(models)[0]
    monkeypatch.setattr(denoiser.model, "saves_memory", False)
    before = cuda.live
    monkeypatch.setattr(cuda, "limit", before + 1_000_000_000)  # of 1.4
    cuda.reset_peak()
    with cuda:
        tokens_FND = torch.zeros(6, 64, 768, dtype=torch.bfloat16).to(CUDA)
        tokens = AudioTokens(tokens_FND=tokens_FND, num_speakers=2)
        conditioning = Conditioning(
            reference_BCFHW=torch.zeros(1, 20, 6, 60, 104), regions_PHW=torch.zeros(3, 60, 104)
        )
        velocity = denoiser(torch.zeros(1, 16, 6, 60, 104), 0.5, conditioning, tokens)
    cuda.syncs.clear()
    assert velocity.device.type == "cpu"
    assert denoiser.model.saves_memory
    assert cuda.peak - before < 1_000_000_000


@pytest.mark.weights
@pytest.mark.slow
def test_talk_runs_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbotalk_core.cli.arguments.list_devices", lambda: ["cpu", "cuda"])
    with FakeCuda() as cuda:
        main(
            [
                "talk", "--image", "assets/two_people.png", "--size", "64x32", "--turns",
                "--speaker", "Ben", "assets/speech_left.wav", "auto",
                "--speaker", "Anna", "assets/speech_right.wav", "auto",
                "--device", "cuda", "--max-seconds", "0.5", "--chunk-frames", "13",
                "--motion-frames", "5", "--out", str(tmp_path / "out.mp4"),
            ]
        )  # fmt: skip
        calls = Counter(s.kind for s in cuda.syncs if s.place == "models/denoiser.py call")
    assert calls == {"to cuda": 2, "to cpu": 1}  # one step
    assert (tmp_path / "out.mp4").stat().st_size > 0
