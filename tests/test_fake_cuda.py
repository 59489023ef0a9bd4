"""The fake CUDA device refuses what a real one refuses, and counts memory and waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fake_cuda import CUDA, FakeCuda


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as device:
        yield device


def _make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=CUDA)


@pytest.mark.parametrize(
    "mix",
    [
        lambda: _make(2) + torch.zeros(2),
        lambda: torch.cat((_make(2), torch.zeros(2))),
        lambda: nn.Linear(2, 2)(_make(1, 2)),
        lambda: nn.Conv2d(2, 2, 1)(_make(1, 2, 3, 3)),
        lambda: nn.Conv2d(2, 2, 1).to(CUDA)(_make(1, 2, 3, 3, dtype=torch.bfloat16)),
        lambda: nn.LayerNorm(2).to(CUDA)(_make(1, 2, dtype=torch.bfloat16)),
        lambda: F.linear(_make(1, 2, dtype=torch.float16), _make(2, 2)),
        lambda: F.scaled_dot_product_attention(
            _make(1, 1, 4, 8), _make(1, 1, 4, 8, dtype=torch.float16), _make(1, 1, 4, 8)
        ),
        lambda: torch.randn(2, device=CUDA, generator=torch.Generator()),
    ],
)
@pytest.mark.usefixtures("cuda")
def test_devices_and_dtypes_do_not_mix(mix: Callable[[], Tensor]) -> None:
    with pytest.raises(RuntimeError):
        mix()


@pytest.mark.parametrize(
    ("wait", "kind"),
    [
        (lambda x: x.cpu(), "to cpu"),
        (lambda x: x.copy_(torch.zeros(3)), "to cuda"),
        (lambda x: x[torch.tensor([0, 1])], "to cuda"),
        (lambda x: torch.tensor([1.0], device=CUDA), "to cuda"),
        (lambda x: x.sum().item(), "item"),
        (lambda x: x.tolist(), "item"),
        (lambda x: bool((x > 0).any()), "item"),
        (lambda x: torch.equal(x, x), "equal"),
    ],
)
def test_each_wait_is_recorded(cuda: FakeCuda, wait: Callable[[Tensor], object], kind: str) -> None:
    x = _make(3)
    assert not cuda.syncs
    wait(x)
    assert {sync.kind for sync in cuda.syncs} == {kind}


@pytest.mark.parametrize("find", [torch.nonzero, torch.unique, lambda x: x[x > 0]])
def test_an_output_of_unknown_size_is_an_error(
    cuda: FakeCuda, find: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(Exception, match=r"nonzero|unique|index|data-dependent"):
        find(_make(3))
    assert cuda.syncs


def test_what_is_alive_counts(cuda: FakeCuda) -> None:
    kept = _make(1000)
    for _ in range(3):
        (kept + 1).mul(2)
    assert (cuda.live, cuda.peak) == (4000, 12_000)
    kept.view(10, 100).add_(1)
    assert cuda.live == 4000
    del kept
    assert cuda.live == 0


def test_attention_counts_its_output_and_its_row_sums(cuda: FakeCuda) -> None:
    query = _make(1, 2, 5000, 8, dtype=torch.float16)
    before = cuda.live
    attended = F.scaled_dot_product_attention(query, query, query)
    assert attended.shape == query.shape
    assert cuda.live - before == query.nbytes
    assert query.nbytes < cuda.peak - before <= query.nbytes + 2 * 5000 * 4 + 100


def test_tensors_of_inference_mode_are_moved(cuda: FakeCuda) -> None:
    with torch.inference_mode():
        weight = torch.ones(2, 2)
    with torch.no_grad():
        assert weight.to(CUDA).device.type == "cuda"
        assert weight.to(CUDA, torch.float16).T.reshape(4).cpu().tolist() == [0] * 4
    assert [sync.kind for sync in cuda.syncs] == ["to cuda", "to cuda", "to cpu"]


def test_memory_has_a_limit(cuda: FakeCuda) -> None:
    cuda.limit = 10_000
    kept = _make(2000)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        _ = kept + 1
    assert cuda.live == kept.nbytes


def test_a_copy_to_the_cpu_is_real(cuda: FakeCuda) -> None:
    layer = nn.Linear(2, 3).to(CUDA, torch.float16).requires_grad_(False)
    result = layer(_make(1, 2, dtype=torch.float16)).to("cpu", torch.float32)
    assert type(result) is Tensor
    assert torch.equal(result, torch.zeros(1, 3))
    weights = sum(weight.nbytes for weight in layer.parameters())
    assert weights == 2 * (2 * 3 + 3)
    del layer
    assert cuda.live == 0
