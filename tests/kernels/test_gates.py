"""The gated memory of a whole prompt in Triton against the recurrence in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from molora_kernels.gates import remember_gated
from tests.conftest import DEVICE
from tests.kernels.test_averages import PADDING
from tests.unit.test_gates import loop, random_gates


def given(N: int, T: int, W: int, units: Sequence[int], padding: str, reach: int = 4, begun: bool = True) -> list[Any]:
    """z, real, gates, state; where nothing has begun the state is zeros."""
    generator = torch.Generator().manual_seed(0)
    real = PADDING[padding](torch.ones(N, T, dtype=torch.bool))
    gates = [(v, b - 1) for v, b in random_gates(W, units, reach, generator)]
    state = torch.randn(N, (reach - 1) * W + sum(units), generator=generator) * begun
    return [torch.randn(N, T, W, generator=generator), real, gates, state]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Products of a few hundred numbers in float32: what rounding leaves is measured by the largest."""
    assert (found.double().cpu() - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))


def check(z: torch.Tensor, *rest: Any, ids: torch.Tensor | None = None, begun: bool = True) -> None:
    """``z``: of the tokens, or with ids the table. Padding holds NaN where it can."""
    real, gates, state = rest
    tokens = z if ids is None else z[ids]
    h, after = loop(tokens, real, gates, state)
    source = z if ids is not None else tokens.masked_fill(~real.unsqueeze(2), torch.nan).flatten(0, 1)
    there = [(v.to(DEVICE), b.to(DEVICE)) for v, b in gates]
    arguments = (None if tensor is None else tensor.to(DEVICE) for tensor in (source, ids, real))
    mine, u, found = remember_gated(*arguments, there, state.to(DEVICE) if begun else None)
    W = tokens.shape[2]
    assert torch.equal(mine[real.to(DEVICE)].cpu(), tokens[real]) and torch.equal(u[..., :W].cpu()[real], tokens[real])
    close(u[..., W:], h)
    close(found, after)


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 16, (16,)), (2, 2, 12, (5,)), (2, 64, 12, (40,)), (2, 150, 100, (33,)), (2, 40, 12, (8, 8)),
     (1, 20, 20, (5, 70, 17))],
    ids=str,
)  # fmt: skip
def test_it_is_the_recurrence(shape: tuple[int, int, int, tuple[int, ...]], padding: str, begun: bool) -> None:
    check(*given(*shape, padding, begun=begun), begun=begun)


@pytest.mark.parametrize("padding", ["none", "holes"])
@pytest.mark.parametrize("shape", [(1, 1, 128, (128, 128)), (3, 1, 20, (8,)), (2, 70, 33, (17, 9))], ids=str)
def test_by_token_ids(shape: tuple[int, int, int, tuple[int, ...]], padding: str) -> None:
    N, T, W, units = shape
    generator = torch.Generator().manual_seed(1)
    table, ids = torch.randn(50, W, generator=generator), torch.randint(50, (N, T), generator=generator)
    check(table, *given(N, T, W, units, padding)[1:], ids=ids)


@pytest.mark.parametrize("reach", [1, 2, 7])
def test_gates_that_see_more_or_less(reach: int) -> None:
    check(*given(2, 40, 16, (8,), "holes", reach))


@pytest.mark.parametrize("layout", ["one for all", "one for each", "a slice"])
def test_masks_of_any_strides(layout: str) -> None:
    z, real, *rest = given(2, 40, 16, (8,), "none")
    if layout == "one for all":
        real = torch.ones(1, 1, dtype=torch.bool).expand(2, 40)
    elif layout == "one for each":
        real = torch.tensor([[True], [False]]).expand(2, 40)
    else:
        real = PADDING["holes"](torch.ones(2, 90, dtype=torch.bool))[:, -40:]
    assert not real.is_contiguous()
    check(z, real, *rest)


def test_more_chunks_than_are_summed_at_once() -> None:
    z, real, *rest = given(1, 2100, 16, (8,), "none")
    real[:, 1000:1040] = False
    rest[0][0][1][:4] = -9  # gates that keep what was long ago
    check(z, real, *rest)
