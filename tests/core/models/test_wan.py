"""The transformer: effects that its inputs must and must not have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.family import CONFIG, seeded
from turbotalk_core.errors import MismatchError
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.rotary import rotary_table, rotate
from turbotalk_core.models.wan import WanConfig, WanModel

TINY = replace(CONFIG, audio_token_dim=6)


def _assert_near(result: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


def _inputs(io: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "latents_BCFHW": io["in.x"].unsqueeze(0),
        "timestep_B": io["in.t"],
        "reference_BCFHW": io["in.y"].unsqueeze(0),
        "text_BND": io["in.context"].unsqueeze(0),
        "image_embeds_BND": io["in.clip_fea"],
        "audio_BFND": io["mid.audio_tokens"],
    }


def _tiny_inputs(*, batch: int = 1, frames: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents_BCFHW": torch.randn(batch, 16, frames, 4, 6, generator=generator),
        "timestep_B": torch.linspace(900, 100, batch),
        "reference_BCFHW": torch.randn(batch, 20, frames, 4, 6, generator=generator),
        "audio_BFND": torch.randn(batch, frames, 3, 6, generator=generator),
    }


def _tiny(config: WanConfig = TINY) -> WanModel:
    with seeded():
        return WanModel(config)


@torch.no_grad()
def _call(model: WanModel, inputs: dict[str, Any], **changes: Any) -> Tensor:
    return model(**(inputs | changes))


def test_rotary_scores_depend_on_distance_alone() -> None:
    table = rotary_table((4, 4, 4), 16, torch.device("cpu"))
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    q, k = (
        rotate(x.expand(1, 64, 1, 16), table)[0, :, 0].unflatten(0, (4, 4, 4)) for x in (query, key)
    )
    near = (q[0, 0, 0] * k[1, 2, 1]).sum()
    shifted = (q[2, 1, 2] * k[3, 3, 3]).sum()
    torch.testing.assert_close(near, shifted)
    assert not torch.isclose(near, (q[0, 0, 0] * k[2, 1, 1]).sum())


def test_null_text_is_512_rows_of_zeros(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    inputs = _inputs(dit_io)
    null = _call(dit, inputs, text_BND=None)
    _assert_near(null, _call(dit, inputs, text_BND=torch.zeros(1, 512, 32)), 1e-5)
    _assert_near(null, _call(dit, inputs, text_BND=torch.zeros(1, 7, 32)), 1e-5)
    assert not torch.allclose(null, _call(dit, inputs))


def test_a_batch_is_as_its_members_alone() -> None:
    model, inputs = _tiny(), _tiny_inputs(batch=2)
    alone = [
        _call(model, {key: tensor[i : i + 1] for key, tensor in inputs.items()}) for i in range(2)
    ]
    _assert_near(_call(model, inputs), torch.cat(alone), 1e-5)


def test_audio_at_no_strength_is_no_audio(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    inputs = _inputs(dit_io)
    silent = _call(dit, inputs, audio_BFND=None)
    assert torch.equal(_call(dit, inputs, audio_scale=0.0), silent)
    full, half = _call(dit, inputs), _call(dit, inputs, audio_scale=0.5)
    assert (silent - full).norm() > (half - full).norm() > 0


def test_the_image_branch_is_optional(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    inputs = _inputs(dit_io)
    imageless = WanModel(replace(dit.config, image_dim=None))
    names = imageless.state_dict().keys()
    left_out = dit.state_dict().keys() - names
    assert all("_img" in name or name.startswith("img_emb.") for name in left_out)
    imageless.load_state_dict({k: t for k, t in dit.state_dict().items() if k in names})
    result = _call(imageless, inputs, image_embeds_BND=None)
    assert torch.equal(result, _call(dit, inputs, image_embeds_BND=None))
    assert not torch.allclose(result, _call(dit, inputs))


def test_each_region_hears_its_own_speaker() -> None:
    model, inputs = _tiny(), _tiny_inputs()
    inputs["audio_BFND"] = inputs["audio_BFND"].repeat(1, 1, 2, 1)
    regions = torch.zeros(3, 4, 6)
    regions[0, :, :2] = regions[1, :, 4:] = regions[2, :, 2:4] = 1
    placed = _call(model, inputs, regions_PHW=regions)
    assert not torch.allclose(placed, _call(model, inputs))
    assert not torch.allclose(placed, _call(model, inputs, regions_PHW=regions[[1, 0, 2]]))


def test_gradients_reach_every_weight(
    dit: WanModel, projection: AudioProjection, dit_io: dict[str, Tensor]
) -> None:
    tokens = projection(dit_io["mid.audio_first_in"][0], dit_io["mid.audio_latter_in"])
    dit(**(_inputs(dit_io) | {"audio_BFND": tokens})).square().mean().backward()
    for name, weight in (*dit.named_parameters(), *projection.named_parameters()):
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), name


def test_recomputing_blocks_changes_no_gradient() -> None:
    model, inputs = _tiny(replace(TINY, num_layers=2)), _tiny_inputs()

    def gradients() -> list[Tensor]:
        weights = [weight for block in model.blocks for weight in block.parameters()]
        return list(torch.autograd.grad(model(**inputs).square().mean(), weights))

    stored = gradients()
    model.uses_checkpointing = True
    torch.testing.assert_close(gradients(), stored)


def test_recomputing_blocks_stores_less() -> None:
    model, inputs = _tiny(replace(TINY, num_layers=2)), _tiny_inputs()

    def count_stored() -> int:
        stored: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            stored.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**inputs)
        return sum(stored)

    everything = count_stored()
    model.uses_checkpointing = True
    assert count_stored() < everything / 2


def test_half_precision_stays_near(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    inputs = _inputs(dit_io)
    exact = _call(dit, inputs)
    rough = _call(dit.bfloat16(), inputs)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).norm() < 0.03 * exact.norm()


def test_new_weights_begin_with_no_velocity_and_learn() -> None:
    model, inputs = _tiny(), _tiny_inputs()
    torch.manual_seed(0)
    model.initialize()
    velocity = model(**inputs)
    assert velocity.shape == inputs["latents_BCFHW"].shape
    assert not velocity.any()
    (velocity - 1).square().mean().backward()
    gradient = model.head.head.weight.grad
    assert gradient is not None
    assert gradient.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_BCFHW": (1, 12, 2, 4, 6)}, r"got 12 \+ 20 channels.*takes 36"),
        ({"reference_BCFHW": (1, 20, 3, 4, 6)}, r"\(3, 4, 6\).*\(2, 4, 6\)"),
        (
            {"latents_BCFHW": (1, 16, 2, 4, 5), "reference_BCFHW": (1, 20, 2, 4, 5)},
            "latents of 4x5; both sides must be even",
        ),
        ({"image_embeds_BND": (1, 257, 32)}, "32 wide.*takes none: leave"),
        ({"audio_BFND": (1, 3, 3, 6)}, "3 latent frames, 6 wide; needed 2 frames, 6 wide"),
        ({"audio_BFND": (1, 2, 3, 7)}, "2 latent frames, 7 wide; needed 2 frames, 6 wide"),
        ({"regions_PHW": (3, 2, 3)}, r"regions of \(2, 3\).*latents of \(4, 6\)"),
        ({"regions_PHW": (3, 4, 6)}, "2 regions and a background for 3 audio tokens"),
        ({"regions_PHW": (2, 4, 6)}, "1 regions and a background.*at least two"),
        ({"text_BND": (1, 5, 9)}, "5 text tokens, 9 wide.*at most 512, 8 wide"),
        ({"text_BND": (1, 513, 8)}, "513 text tokens, 8 wide.*at most 512, 8 wide"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, tuple[int, ...]], message: str) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(MismatchError, match=message):
        _call(_tiny(), _tiny_inputs(), **tensors)


def test_image_tokens_of_another_width_are_refused(
    dit: WanModel, dit_io: dict[str, Tensor]
) -> None:
    with pytest.raises(MismatchError, match="is 40 wide, the model's image branch takes 32"):
        _call(dit, _inputs(dit_io), image_embeds_BND=torch.zeros(1, 257, 40))


def test_a_voice_needs_audio_attention() -> None:
    with pytest.raises(MismatchError, match="no audio attention; load an adapter"):
        _call(_tiny(replace(TINY, audio_heads=None)), _tiny_inputs())


@pytest.mark.parametrize("num_heads", [5, 8, 6])
def test_heads_that_cannot_be_are_refused(num_heads: int) -> None:
    with pytest.raises(MismatchError, match=f"got width 24 and {num_heads} heads"):
        replace(TINY, num_heads=num_heads)
