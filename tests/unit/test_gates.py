"""The gated memory against its recurrence, written as a loop in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from molora.gates import GateWeights, gated_averages

WIDTH, UNITS, REACH = 5, 6, 4


def loop(
    z: torch.Tensor, real: torch.Tensor, gates: GateWeights, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence and one token after the other, in float64; the list of the last real tokens is a list."""
    width = z.shape[2]
    back = gates[0][0].shape[1] // width - 1
    rows, states = [], []
    for one, mask, begun in zip(z.double(), real, state.double(), strict=True):
        last = list(begun[: back * width].split(width))
        layers = list(begun[back * width :].split([len(bias) // 2 for _, bias in gates]))
        row = []
        for token, counts in zip(one, mask, strict=True):
            if counts:
                last = [token, *last]
                for index, (weight, bias) in enumerate(gates):
                    x = torch.cat([*last, *layers[max(index - 1, 0) : index]])
                    gate, candidate = (weight.double() @ x + bias.double()).chunk(2)
                    layers[index] = (1 - gate.sigmoid()) * layers[index] + gate.sigmoid() * candidate
                last = last[:back]
            row.append(torch.cat(layers))
        rows.append(torch.stack(row))
        states.append(torch.cat([*last, *layers]))
    return torch.stack(rows), torch.stack(states)


def random_gates(width: int, units: Sequence[int], reach: int, generator: torch.Generator) -> GateWeights:
    """Of layers of so many units."""
    inputs = [reach * width + below for below in (0, *units[:-1])]
    return [
        (torch.randn(2 * own, size, generator=generator) / size**0.5, torch.randn(2 * own, generator=generator))
        for own, size in zip(units, inputs, strict=True)
    ]


def inputs(T: int, padding: str, units: Sequence[int] = (UNITS,)) -> list[Any]:
    """z, real, gates, state of three sequences."""
    generator = torch.Generator().manual_seed(T)
    z = torch.randn(3, T, WIDTH, generator=generator)
    real = torch.ones(3, T, dtype=torch.bool)
    if padding == "left":
        real[1, : T // 2] = real[2, : T - 1] = False
    elif padding == "middle":
        real = torch.rand(3, T, generator=generator) > 0.4
    elif padding == "everywhere":
        real[:] = False
    gates = random_gates(WIDTH, units, REACH, generator)
    return [z, real, gates, torch.randn(3, (REACH - 1) * WIDTH + sum(units), generator=generator)]


@pytest.mark.parametrize("units", [(UNITS,), (UNITS, UNITS), (4, 7, 2)], ids=str)
@pytest.mark.parametrize("padding", ["none", "left", "middle", "everywhere"])
@pytest.mark.parametrize("T", [1, 2, 3, 17, 130])
def test_it_is_the_recurrence(T: int, padding: str, units: tuple[int, ...]) -> None:
    given = inputs(T, padding, units)
    for found, expected in zip(gated_averages(*given), loop(*given), strict=True):
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5


def test_padding_leaves_no_trace() -> None:
    z, real, *rest = inputs(40, "left")
    poisoned = z.masked_fill(~real.unsqueeze(-1), torch.nan)
    for clean, found in zip(gated_averages(z, real, *rest), gated_averages(poisoned, real, *rest), strict=True):
        assert torch.equal(clean, found)


def test_it_is_causal() -> None:
    z, *rest = inputs(60, "none")
    changed = z.clone()
    changed[:, 40:] += 3
    a, b = (gated_averages(values, *rest)[0] for values in (z, changed))
    assert torch.equal(a[:, :40], b[:, :40])
    assert (a[:, 40:] != b[:, 40:]).any(-1).all()


def test_gates_wide_open_and_shut() -> None:
    """An open gate takes the candidate whole, a shut one keeps what was, with no overflow in between."""
    z, real, gates, state = inputs(40, "none")
    for value, expected in ((1e4, None), (-1e4, state[:, -UNITS:])):
        gates[0][1][:UNITS] = value
        h, _ = gated_averages(z, real, gates, state)
        assert torch.isfinite(h).all()
        if expected is None:
            assert (h - loop(z, real, gates, state)[0]).abs().max() < 1e-5
        else:
            assert torch.equal(h, expected.unsqueeze(1).expand_as(h))


@pytest.mark.parametrize("padding", ["none", "middle"])
@pytest.mark.parametrize("T", [1, 11, 70])
def test_its_gradient_is_the_recurrences(T: int, padding: str) -> None:
    z, real, gates, state = inputs(T, padding, (UNITS, 4))
    real[0] = True
    grads = []
    for function, dtype in ((gated_averages, torch.float32), (loop, torch.float64)):
        given = (z, state, *(tensor for pair in gates for tensor in pair))
        leaves = [tensor.clone().to(dtype).requires_grad_() for tensor in given]
        out = function(leaves[0], real, [tuple(leaves[2:4]), tuple(leaves[4:])], leaves[1])[0]
        (out * torch.arange(out.numel(), dtype=dtype).view_as(out).cos()).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for found, expected in zip(*grads, strict=True):
        assert expected.abs().max() > 0
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
