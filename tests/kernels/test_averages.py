"""The memory of a whole prompt against the recurrence in float64."""

import pytest
import torch

from molora_kernels.averages import moving_averages
from tests.conftest import DEVICE

PADDING = {
    "none": lambda real: real,
    "left": lambda real: real.index_fill(1, torch.arange(min(70, real.shape[1] - 1)), False),
    "holes": lambda real: real & (torch.arange(real.shape[1]) % 3 > 0),
    "all": lambda real: real & False,
}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("decays", [(0.8, 0.95), (0.999,), ()], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 64, 12), (2, 150, 100)], ids=str)
def test_it_is_the_recurrence(shape: tuple[int, int, int], decays: tuple[float, ...], padding: str) -> None:
    N, T, W = shape
    generator = torch.Generator().manual_seed(0)
    z, start = torch.randn(N, T, W, generator=generator), torch.randn(N, len(decays), W, generator=generator)
    real = PADDING[padding](torch.ones(N, T, dtype=torch.bool))
    d = torch.tensor(decays).view(1, -1, 1).double()
    m, rows = start.double(), []
    for t in range(T):
        new = d * m + (1 - d) * z[:, t].double().unsqueeze(1)
        m = torch.where(real[:, t].view(-1, 1, 1), new, m)
        rows.append(m)
    found, state = moving_averages(*(tensor.to(DEVICE) for tensor in (z, real, torch.tensor(decays), start)))
    torch.testing.assert_close(found.double().cpu(), torch.stack(rows, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double().cpu(), m, rtol=1e-5, atol=1e-5)
