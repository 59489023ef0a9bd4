"""TeaCache: when the blocks run, and which residual replaces them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from turbotalk_core.models.denoiser import WanDenoiser
from turbotalk_core.models.teacache import FIT_480, FIT_720, NUM_FIRST_STEPS, TeaCache
from turbotalk_core.models.wan import WanModel
from turbotalk_core.types import AudioTokens, Conditioning

SIGMAS = [1 - step / 12 for step in range(12)]


def _fit(coefficients: tuple[float, ...], change: float) -> float:
    return sum(c * change**power for power, c in enumerate(reversed(coefficients)))


def _ask(cache: TeaCache, change: float, num_steps: int) -> list[bool]:
    """Grow a modulation by the same fraction in each step."""
    modulations = [torch.tensor([(1 + change) ** step]) for step in range(num_steps)]
    return [cache.is_due(modulation) for modulation in modulations]


@pytest.mark.parametrize(("num_cells", "fit"), [(6400, FIT_480), (14400, FIT_720)])
def test_blocks_run_when_the_changes_add_up(num_cells: int, fit: tuple[float, ...]) -> None:
    every_third = TeaCache(2.5 * _fit(fit, 0.2), num_cells)
    runs = _ask(every_third, 0.2, NUM_FIRST_STEPS + 6)
    assert runs == [True] * NUM_FIRST_STEPS + [False, False, True] * 2


def test_a_threshold_of_zero_leaves_nothing_out() -> None:
    assert all(_ask(TeaCache(0.0, 6400), 0.2, 12))


def _told(dit_io: dict[str, Tensor]) -> tuple[Tensor, Conditioning, AudioTokens]:
    conditioning = Conditioning(
        reference_BCFHW=dit_io["in.y"].unsqueeze(0), text_BND=dit_io["in.context"].unsqueeze(0)
    )
    tokens = AudioTokens(tokens_FND=dit_io["mid.audio_tokens"][0])
    return dit_io["in.x"].unsqueeze(0), conditioning, tokens


def test_skipped_blocks_add_what_they_added_last(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    latents, conditioning, tokens = _told(dit_io)
    # The same latents in each step: only the head then tells the steps apart.
    calls: list[int] = []
    dit.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    denoiser = WanDenoiser(dit, teacache_threshold=float("inf"))
    plain = WanDenoiser(dit)
    velocity = torch.zeros(0)
    for step, sigma in enumerate(SIGMAS):
        calls.clear()
        velocity = denoiser(latents, sigma, conditioning, tokens)
        assert len(calls) == (step < NUM_FIRST_STEPS)
        if step < NUM_FIRST_STEPS:
            assert torch.equal(velocity, plain(latents, sigma, conditioning, tokens))
    assert not torch.equal(velocity, plain(latents, SIGMAS[-1], conditioning, tokens))


def test_each_kind_of_call_has_its_own(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    latents, conditioning, tokens = _told(dit_io)
    null_text = torch.zeros(1, 3, 32)
    null_tokens = AudioTokens(tokens_FND=torch.zeros_like(tokens.tokens_FND))
    kinds = [
        (conditioning.text_BND, tokens),
        (null_text, tokens),
        (null_text, null_tokens),
    ]
    together = WanDenoiser(dit, teacache_threshold=float("inf"))
    alone = [WanDenoiser(dit, teacache_threshold=float("inf")) for _ in kinds]
    for sigma in SIGMAS[: NUM_FIRST_STEPS + 2]:
        for (text, voice), denoiser in zip(kinds, alone, strict=True):
            told = replace(conditioning, text_BND=text)
            expected = denoiser(latents, sigma, told, voice)
            assert torch.equal(together(latents, sigma, told, voice), expected)


def test_chunks_of_one_step_leave_nothing_out(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    latents, conditioning, tokens = _told(dit_io)
    denoiser = WanDenoiser(dit, teacache_threshold=float("inf"))
    expected = WanDenoiser(dit)(latents, 1.0, conditioning, tokens)
    for _ in range(NUM_FIRST_STEPS + 2):
        assert torch.equal(denoiser(latents, 1.0, conditioning, tokens), expected)


def test_a_new_chunk_begins_anew(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    latents, conditioning, tokens = _told(dit_io)
    denoiser = WanDenoiser(dit, teacache_threshold=float("inf"))
    for sigma in SIGMAS:
        denoiser(latents, sigma, conditioning, tokens)
    expected = WanDenoiser(dit)(latents, 1.0, conditioning, tokens)
    assert torch.equal(denoiser(latents, 1.0, conditioning, tokens), expected)
