"""Tiles that were measured on one GPU shrink to what another has room for."""

import pytest
import torch

from molora_kernels import expand, limits
from molora_kernels.limits import fitting_block, fitting_stages


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (limits, expand):
        monkeypatch.setattr(module, "shared_memory", lambda _: 100_000)


@pytest.mark.parametrize(("block", "bytes_each", "expected"), [(256, 100, 256), (256, 1000, 64), (256, 10**6, 16)])
def test_blocks(block: int, bytes_each: int, expected: int) -> None:
    assert fitting_block(block, bytes_each, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("stages", "bytes_each", "expected"), [(5, 20_000, 5), (5, 40_000, 3), (5, 10**6, 2), (2, 1, 2)]
)
def test_stages(stages: int, bytes_each: int, expected: int) -> None:
    assert fitting_stages(stages, bytes_each, torch.device("cpu")) == expected


@pytest.mark.parametrize(("max_pages", "top", "expected"), [(1, 1, 3), (4, 1, 3), (4, 4, 1), (16, 1, 1)])
def test_the_pipeline_over_slots(max_pages: int, top: int, expected: int) -> None:
    shape = {"AT_ONCE": 1, "PAGES": min(4, max_pages), "MAX_PAGES": max_pages, "TOP": top, "SPLIT": 1}
    h = b = torch.zeros(1, dtype=torch.bfloat16)
    assert expand.block_stages(3, shape, h, b, 64, 128) == expected


def test_without_a_gpu_there_is_some_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert limits.shared_memory(torch.device("cpu")) == 1 << 16
