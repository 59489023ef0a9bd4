"""Low-memory mode: out of memory, a network repeats the call in small pieces, and remains so."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.family import seeded
from turbotalk_core.benchmark.memory import count_memory
from turbotalk_core.models.denoiser import WanDenoiser
from turbotalk_core.models.low_memory import is_shortage
from turbotalk_core.models.teacache import NUM_FIRST_STEPS
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanConfig, WanModel
from turbotalk_core.types import AudioTokens, Conditioning

TEACACHE = 1e6  # with random weights the steps differ much: the blocks run in 0 to 4 and in 9


def _assert_near(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


class AcceleratorError(RuntimeError):
    """Counterpart of torch's AcceleratorError, which older versions do not have."""


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.OutOfMemoryError(), True),
        (AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, is_one: bool) -> None:
    assert is_shortage(error) is is_one


class TooSmall:
    """Device on which a network fits only in low-memory mode, or never; counts the calls."""

    def __init__(self, network: Any, part: nn.Module, *, is_hopeless: bool = False) -> None:
        self.tries = 0
        self.held: list[weakref.ref[Tensor]] = []
        self._network, self._is_hopeless = network, is_hopeless
        part.register_forward_pre_hook(self._begin)

    def _begin(self, _part: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.tries += 1
        if self._is_hopeless or not self._network.saves_memory:
            self.held.append(weakref.ref(inputs[0]))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _told(dit_io: dict[str, Tensor]) -> tuple[Tensor, float, Conditioning, AudioTokens]:
    conditioning = Conditioning(
        reference_BCFHW=dit_io["in.y"].unsqueeze(0),
        text_BND=dit_io["in.context"].unsqueeze(0),
        image_embeds_BND=dit_io["in.clip_fea"],
    )
    tokens = AudioTokens(tokens_FND=dit_io["mid.audio_tokens"][0])
    return dit_io["in.x"].unsqueeze(0), 0.7, conditioning, tokens


def _told_of_two(dit_io: dict[str, Tensor]) -> tuple[Tensor, float, Conditioning, AudioTokens]:
    latents, sigma, conditioning, tokens = _told(dit_io)
    regions_PHW = torch.zeros(3, *latents.shape[3:])
    half = latents.shape[4] // 2
    regions_PHW[0, :, :half] = regions_PHW[1, :, half:] = 1
    regions_PHW[:2, :1] = 0
    regions_PHW[2, :1] = 1
    voices_FND = torch.cat((tokens.tokens_FND, tokens.tokens_FND.flip(0)), 1)
    return (
        latents,
        sigma,
        replace(conditioning, regions_PHW=regions_PHW),
        AudioTokens(tokens_FND=voices_FND, num_speakers=2),
    )


@pytest.mark.parametrize("tell", [_told, _told_of_two])
def test_the_transformer_in_pieces_says_the_same(
    dit: WanModel, dit_io: dict[str, Tensor], tell: Any
) -> None:
    told = tell(dit_io)
    assert told[0].shape[2] > 2  # several latent frames
    expected = WanDenoiser(dit)(*told)
    lengths = []
    dit.blocks[0].get_submodule("ffn").register_forward_pre_hook(
        lambda _part, inputs: lengths.append(inputs[0].shape[1])
    )
    dit.saves_memory = True
    _assert_near(WanDenoiser(dit)(*told), expected)
    _, _, num_frames, height, width = told[0].shape
    assert lengths == num_frames * [height * width // 4]


def test_the_transformer_is_asked_once_more_and_stays_frugal(
    dit: WanModel, dit_io: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    told = _told(dit_io)
    denoiser = WanDenoiser(dit)
    expected = denoiser(*told)
    device = TooSmall(dit, dit.blocks[1])
    for tries in (2, 3, 4):
        _assert_near(denoiser(*told), expected)
        assert device.tries == tries
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "memory ran out in the video transformer" in record.getMessage()
    assert "from now on" in record.getMessage()


def test_a_second_shortage_is_told(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    device = TooSmall(dit, dit.blocks[1], is_hopeless=True)
    for tries in (2, 3):  # frugal from then on, so that there is nothing else to try
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            WanDenoiser(dit)(*_told(dit_io))
        assert device.tries == tries


def test_what_lay_in_memory_is_free_before_the_second_try(
    dit: WanModel, dit_io: dict[str, Tensor]
) -> None:
    device = TooSmall(dit, dit.blocks[1])
    alive: list[bool] = []

    def look(*_: object) -> None:
        gc.collect()
        alive.append(device.held[0]() is not None)

    dit.blocks[0].register_forward_pre_hook(lambda *_: look() if device.held else None)
    WanDenoiser(dit)(*_told(dit_io))
    assert alive == [False]


def test_other_errors_are_not_tried_again(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    dit.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mat1"):
        WanDenoiser(dit)(*_told(dit_io))
    assert len(calls) == 1
    assert not dit.saves_memory


@pytest.mark.parametrize("step", [2, NUM_FIRST_STEPS + 1])
def test_teacache_counts_a_repeated_call_once(
    dit: WanModel, dit_io: dict[str, Tensor], step: int
) -> None:
    latents, _, conditioning, tokens = _told(dit_io)
    is_short = False
    calls: list[int] = []

    def run(*_: object) -> None:
        calls.append(index)
        if is_short and not dit.saves_memory:
            raise torch.OutOfMemoryError

    def sample() -> Tensor:
        denoiser = WanDenoiser(dit, teacache_threshold=TEACACHE)
        nonlocal index, is_short
        velocity = torch.zeros(0)
        for index in range(12):
            is_short = index >= first_short
            velocity = denoiser(latents, 1 - index / 12, conditioning, tokens)
        return velocity

    dit.blocks[1].register_forward_pre_hook(run)
    index, first_short = 0, 99
    expected, usual = sample(), calls.copy()
    calls.clear()
    first_short = step
    velocity = sample()
    assert NUM_FIRST_STEPS < len(usual) < 12  # some are left out
    repeated = next(number for number in usual if number >= step)
    assert calls == sorted([*usual, repeated])
    _assert_near(velocity, expected)


def test_the_transformer_in_pieces_needs_less_than_half() -> None:
    config = WanConfig(dim=240, ffn_dim=640, num_heads=4, num_layers=1, text_dim=8, audio_heads=4)
    needs = []
    with torch.device("meta"):
        model = WanModel(config).to(torch.bfloat16)
        for saves_memory in (False, True):
            model.saves_memory = saves_memory

            def call() -> Tensor:
                return model(
                    torch.zeros(1, 16, 9, 20, 32),
                    torch.zeros(1),
                    torch.zeros(1, 20, 9, 20, 32),
                    audio_BFND=torch.zeros(1, 9, 4, 768),
                )

            needs.append(count_memory(model, call))
    assert needs[1] < needs[0] / 2


@pytest.fixture
def vae() -> WanVAE:
    with seeded():
        return WanVAE(4).requires_grad_(False)


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_the_vae_frame_by_frame_says_the_same(vae: WanVAE, num_frames: int) -> None:
    frames = torch.rand(1, 3, num_frames, 32, 48, generator=torch.Generator().manual_seed(1))
    latents = vae.encode(frames)
    decoded = vae.decode(latents)
    reference = vae.encode_reference(frames[:, :, 0], num_frames)
    vae.saves_memory = True
    lengths = []
    layers = (vae.encoder.conv1, vae.decoder.conv1, *vae.decoder.upsamples)
    for layer in layers:
        layer.register_forward_pre_hook(lambda _layer, inputs: lengths.append(len(inputs[0])))
    _assert_near(vae.encode(frames), latents)
    _assert_near(vae.decode(latents), decoded)
    _assert_near(vae.encode_reference(frames[:, :, 0], num_frames), reference)
    assert set(lengths) == {1}


@pytest.mark.parametrize("way", ["encode", "encode_reference", "decode"])
def test_the_vae_is_asked_once_more_and_stays_frugal(
    vae: WanVAE, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(1)
    given = {
        "encode": (torch.rand(1, 3, 9, 16, 16, generator=generator),),
        "encode_reference": (torch.rand(1, 3, 16, 16, generator=generator), 9),
        "decode": (torch.randn(1, 16, 3, 2, 2, generator=generator),),
    }[way]
    call = getattr(vae, way)
    expected = call(*given)
    device = TooSmall(vae, vae.decoder.head[0] if way == "decode" else vae.encoder.middle[0])
    seen = []
    for _ in range(3):
        _assert_near(call(*given), expected)
        seen.append(device.tries)
        device.tries = 0
    assert seen[0] == 1 + seen[1] == 1 + seen[2]
    (record,) = caplog.records
    assert "memory ran out in the video VAE" in record.getMessage()


def test_a_vae_that_does_not_fit_even_so(vae: WanVAE) -> None:
    TooSmall(vae, vae.decoder.conv1, is_hopeless=True)
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(torch.randn(1, 16, 2, 2, 2))
    assert vae.saves_memory


@pytest.mark.slow
def test_the_vae_frame_by_frame_needs_less() -> None:
    needs: dict[bool, tuple[int, int, int]] = {}
    with torch.device("meta"):
        vae = WanVAE(8)
        for saves_memory in (False, True):
            vae.saves_memory = saves_memory
            needs[saves_memory] = (
                count_memory(vae, lambda: vae.encode(torch.zeros(1, 3, 9, 64, 96))),
                count_memory(vae, lambda: vae.encode_reference(torch.zeros(1, 3, 64, 96), 9)),
                count_memory(vae, lambda: vae.decode(torch.zeros(1, 16, 4, 8, 12))),
            )
    for usual, frugal in zip(needs[False], needs[True], strict=True):
        assert frugal < 0.85 * usual
