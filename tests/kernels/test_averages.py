"""The memory of a whole prompt against the recurrence in float64."""

import pytest
import torch

from molora_kernels.averages import moving_averages, remember
from tests.conftest import DEVICE

PADDING = {
    "none": lambda real: real,
    "left": lambda real: real.index_fill(1, torch.arange(min(70, real.shape[1] - 1)), False),
    "holes": lambda real: real & (torch.arange(real.shape[1]) % 3 > 0),
    "all": lambda real: real & False,
}


def recurrence(
    z: torch.Tensor, real: torch.Tensor, decays: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, T, D, W] and [N, D, W] float64, one token after the other."""
    d, m, rows = decays.view(1, -1, 1).double(), start.double(), []
    for t in range(z.shape[1]):
        new = d * m + (1 - d) * z[:, t].double().unsqueeze(1)
        m = torch.where(real[:, t].view(-1, 1, 1), new, m)
        rows.append(m)
    return torch.stack(rows, 1), m


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("decays", [(0.8, 0.95), (0.999,), ()], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 64, 12), (2, 150, 100)], ids=str)
def test_it_is_the_recurrence(shape: tuple[int, int, int], decays: tuple[float, ...], padding: str) -> None:
    N, T, W = shape
    generator = torch.Generator().manual_seed(0)
    z, start = torch.randn(N, T, W, generator=generator), torch.randn(N, len(decays), W, generator=generator)
    real = PADDING[padding](torch.ones(N, T, dtype=torch.bool))
    expected = recurrence(z, real, torch.tensor(decays), start)
    found = moving_averages(*(tensor.to(DEVICE) for tensor in (z, real, torch.tensor(decays), start)))
    for mine, wanted in zip(found, expected, strict=True):
        close(mine, wanted)


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize("decays", [(0.8, 0.95), ()], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 128), (3, 1, 20), (2, 70, 33), (1, 96, 128)], ids=str)
def test_it_is_what_the_router_reads(
    shape: tuple[int, int, int], decays: tuple[float, ...], by_id: bool, begun: bool
) -> None:
    """z and its averages side by side, by token ids or as they come, from nothing or after other tokens."""
    N, T, W = shape
    generator = torch.Generator().manual_seed(0)
    table, ids = torch.randn(50, W, generator=generator), torch.randint(50, (N, T), generator=generator)
    real, d = PADDING["holes"](torch.ones(N, T, dtype=torch.bool)), torch.tensor(decays)
    start = torch.randn(N, len(decays), W, generator=generator) if begun else None
    z = table[ids]
    averages, after = recurrence(z, real, d, torch.zeros(N, len(decays), W) if start is None else start)
    source = table if by_id else z.flatten(0, 1)
    given = (source, ids if by_id else None, real, d, start)
    found, u, state = remember(*(None if tensor is None else tensor.to(DEVICE) for tensor in given))
    assert torch.equal(found.cpu(), z) and torch.equal(u[..., :W].cpu(), z)
    close(u[..., W:], averages.flatten(2))
    close(state, after)


@pytest.mark.parametrize("layout", ["one for all", "a slice"])
def test_masks_of_any_strides(layout: str) -> None:
    z, decays = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9])
    real = torch.ones(1, 1, dtype=torch.bool).expand(2, 40)
    if layout == "a slice":
        real = PADDING["holes"](torch.ones(2, 90, dtype=torch.bool))[:, -40:]
    assert not real.is_contiguous()
    _, u, state = remember(z.flatten(0, 1).to(DEVICE), None, real.to(DEVICE), decays.to(DEVICE), None)
    averages, after = recurrence(z, real, decays, torch.zeros(2, 1, 16))
    close(u[..., 16:], averages.flatten(2))
    close(state, after)


def test_more_chunks_than_are_summed_at_once() -> None:
    z, real = torch.randn(1, 2100, 16, generator=torch.Generator().manual_seed(0)), torch.ones(1, 2100) > 0
    real[:, 1000:1040] = False
    decays, start = torch.tensor([0.8, 0.9999]), torch.ones(1, 2, 16)
    given = (z.flatten(0, 1), None, real, decays, start)
    _, u, state = remember(*(None if tensor is None else tensor.to(DEVICE) for tensor in given))
    averages, after = recurrence(z, real, decays, start)
    close(u[..., 16:], averages.flatten(2))
    close(state, after)
