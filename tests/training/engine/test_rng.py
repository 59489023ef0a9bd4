"""Random draws depend on the position in the run, and on nothing else."""

import torch

from training.engine.rng import Draws


def _draw(generator: torch.Generator) -> list[float]:
    return torch.rand(4, generator=generator).tolist()


def test_the_same_place_draws_the_same() -> None:
    before = torch.random.get_rng_state()
    torch.rand(3)
    assert _draw(Draws(1, 2, 3).own("noise")) == _draw(Draws(1, 2, 3).own("noise"))
    torch.random.set_rng_state(before)
    draws = Draws(1, 2, 3)
    assert _draw(draws.own("noise")) == _draw(draws.own("noise"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_slots_share_what_is_shared_and_nothing_else() -> None:
    one, other = Draws(1, 2, 0), Draws(1, 2, 1)
    assert _draw(one.shared("exit step")) == _draw(other.shared("exit step"))
    assert _draw(one.own("noise")) != _draw(other.own("noise"))


def test_every_part_of_the_place_counts() -> None:
    places = [
        Draws(1, 2, 3).own("noise"),
        Draws(0, 2, 3).own("noise"),
        Draws(1, 0, 3).own("noise"),
        Draws(1, 2, 0).own("noise"),
        Draws(1, 2, 3).own("other"),
        Draws(1, 2, 3).shared("noise"),
        Draws(1, 23, 3).own("noise"),
        Draws(12, 2, 3).own("noise"),
    ]
    drawn = [tuple(_draw(generator)) for generator in places]
    assert len(set(drawn)) == len(drawn)


def test_the_numbers_do_not_change() -> None:
    golden = [0.5667954683303833, 0.8570625185966492, 0.4318859577178955, 0.5864635109901428]
    assert _draw(Draws(0, 0, 0).own("noise")) == golden
