"""Network calls: numbers per step against closed forms, and their repetition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.training.tiny_networks import make_batch, make_engines, make_model, take_step
from training.benchmark.calls import BareCalls, Call, count_calls, record_calls
from training.engine.engine import PlainEngine
from training.engine.rng import Draws
from training.methods.adversarial import Adversarial
from training.methods.dmd import Dmd
from training.methods.flow_matching import FlowMatching
from training.methods.method import Learning, Method, prepare_role
from training.methods.rollout import draw_exit

LORA = Learning(trains="lora", learning_rate=1e-3, rank=2, alpha=2.0)


def _record(
    method: Method, step: int = 0, seed: int = 0
) -> tuple[list[Call], dict[str, PlainEngine]]:
    engines = make_engines(method, learning_rate=1e-3)
    networks = {role: engine.module for role, engine in engines.items()}
    with record_calls(networks) as calls:
        take_step(method, engines, make_batch(), step, seed=seed)
    return calls, engines


def _without_zeros(counts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    kept = {name: {k: n for k, n in kinds.items() if n} for name, kinds in counts.items()}
    return {name: kinds for name, kinds in kept.items() if kinds}


def test_flow_matching_makes_one_call() -> None:
    calls, _ = _record(FlowMatching())
    assert count_calls(calls) == {"teacher": {"weights": 1}}


@pytest.mark.parametrize(
    ("scales", "num_asked"), [((5.0, 4.0), 3), ((1.0, 4.0), 2), ((5.0, 1.0), 3), ((1.0, 1.0), 1)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_dmd_goes_to_the_step_that_is_drawn(
    scales: tuple[float, float], num_asked: int, seed: int
) -> None:
    method = Dmd(
        student_every=2, num_steps=4, guidance_scale=scales[0], audio_guidance_scale=scales[1]
    )
    for step, learns in ((0, False), (1, True)):
        passed = draw_exit(4, Draws(seed, step, 0).shared("exit step"))
        calls, _ = _record(method, step, seed)
        assert count_calls(calls) == _without_zeros(
            {
                "student": {"forward": passed + (not learns), "weights": int(learns)},
                "fake_score": {"forward": int(learns), "weights": 1},
                "teacher": {"forward": num_asked * learns},
            }
        )


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("memory_light", [True, False])
@pytest.mark.parametrize("penalty_weight", [100.0, 0.0])
@pytest.mark.parametrize("four_step", ["adapters_off", "frozen", None])
def test_adversarial_scores_each_sample(
    num_steps: int, memory_light: bool, penalty_weight: float, four_step: Any
) -> None:
    method = Adversarial(
        num_steps=num_steps,
        warmup_steps=0,
        discriminator=LORA,
        memory_light=memory_light,
        penalty_weight=penalty_weight,
        self_compare_weight=50.0 if four_step else 0.0,
        four_step=four_step or "adapters_off",
    )
    # Real and the student's are told apart; a penalty looks at all samples, each once more.
    scored = 2 * (2 + bool(four_step)) if penalty_weight else 2
    repeated = scored - 1 if memory_light else 0
    calls, _ = _record(method)
    assert count_calls(calls) == _without_zeros(
        {
            "student": {"forward": (num_steps - 1) + 1, "weights": 1},
            "discriminator": {
                # The student's update compares with the real sample and the four-step one.
                "forward": repeated + 1 + bool(four_step),
                "weights": scored,
                "inputs": 1,
            },
            "discriminator.backbone": {"forward": 4 * (four_step == "adapters_off")},
            "four_step": {"forward": 4 * (four_step == "frozen")},
        }
    )


def test_only_the_four_step_model_has_its_adapters_off() -> None:
    calls, _ = _record(Adversarial(num_steps=1, discriminator=LORA))
    assert {call.name for call in calls if not call.has_adapters} == {"discriminator.backbone"}


def test_a_call_is_what_came_back_of_it() -> None:
    model, batch, sigma_B = make_model(), make_batch(), torch.tensor([0.3, 0.7])
    with record_calls({"model": model}) as calls:
        model(batch.latents_BCFHW, sigma_B, batch)  # a graph that nobody goes back through
        model(batch.latents_BCFHW, sigma_B, batch).sum().backward()
        model.requires_grad_(False)
        latents = batch.latents_BCFHW.clone().requires_grad_()
        model(latents, sigma_B, batch, uses_audio=False).sum().backward()
    model(batch.latents_BCFHW, sigma_B, batch)  # not noted any more
    assert [call.kind for call in calls] == ["forward", "weights", "inputs"]
    assert [call.named for call in calls] == [{}, {}, {"uses_audio": False}]


@pytest.mark.parametrize("is_mixed", [False, True])
def test_bare_calls_are_those_of_the_step(is_mixed: bool) -> None:
    method = Adversarial(num_steps=2, discriminator=LORA)
    calls, engines = _record(method)
    networks: dict[str, nn.Module] = {
        role: prepare_role(spec, make_model()) for role, spec in method.roles().items()
    }
    seen = []
    handle = networks["student"].register_forward_hook(
        lambda *call: seen.append(torch.is_autocast_enabled("cpu"))
    )
    precision = "mixed" if is_mixed else "float32"
    bare = BareCalls(networks, make_batch(), precision=precision)
    with record_calls(networks) as again:
        bare.make(calls)
    handle.remove()
    assert again == calls
    assert seen == [is_mixed] * 3
    for role, network in networks.items():
        assert all(weight.grad is None for weight in network.parameters())
        pairs = zip(network.parameters(), engines[role].module.parameters(), strict=True)
        assert all(mine.shape == theirs.shape for mine, theirs in pairs)


def test_bare_calls_go_all_the_way_back() -> None:
    model = make_model()
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    reached: set[str] = set()
    for name, weight in model.named_parameters():
        weight.register_hook(lambda _, name=name: reached.add(name))
    bare = BareCalls({"model": model}, make_batch())
    call = Call(role="model", part="", kind="weights", named={}, has_adapters=True)
    bare.make([call])
    assert reached == learning
