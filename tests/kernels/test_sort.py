"""The order of tokens by counting against that by sorting."""

import pytest
import torch

from molora_kernels import order
from molora_kernels.blocks import make_blocks
from tests.conftest import DEVICE
from tests.kernels.plans import KINDS, make_slots


def by_sorting(slots: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    with monkeypatch.context() as here:
        here.setattr(order, "_COUNTED", -1)
        return order.order_by_slot(slots)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("S", [1, 2, 3, 4])  # of four columns it looks at three
@pytest.mark.parametrize("T", [0, 1, 63, 133])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_stable_sort(kind: str, T: int, S: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = make_slots(kind, T, S).to(dtype) if T else torch.empty(0, S, dtype=dtype, device=DEVICE)
    found = order.order_by_slot(slots)
    assert found.dtype == torch.int64
    assert torch.equal(found, by_sorting(slots, monkeypatch))


@pytest.mark.parametrize("S", [1, 3])
def test_more_tokens_than_a_tile_has(S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = torch.randint(-1, 3, (2100, S), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(DEVICE)
    assert torch.equal(order.order_by_slot(slots), by_sorting(slots, monkeypatch))


def test_the_largest_slots_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2**20 - 1
    slots = torch.tensor([[most, most, most], [most, -1, most], [-1, -1, -1], [most, most, -1]], device=DEVICE)
    assert order.order_by_slot(slots).tolist() == [2, 1, 3, 0]
    assert torch.equal(order.order_by_slot(slots), by_sorting(slots, monkeypatch))


def test_a_block_of_pairs_meets_few_slots() -> None:
    T, K = 2048, 8
    random = torch.rand(T, K, generator=torch.Generator().manual_seed(0))
    slots = random.topk(2, dim=1).indices.int().to(DEVICE)
    blocks = make_blocks(slots, order.order_by_slot(slots))
    assert float(blocks.counts.float().mean()) < 4  # by the first column alone nearly all eight
