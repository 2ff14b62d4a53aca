"""The causal memory against its recurrence, written as a loop in float64."""

import pytest
import torch

from molora.gates import Gates
from molora.memory import CHUNK, Averages, Memory, Rule, moving_averages
from tests.unit.test_gates import random_gates

DECAYS = torch.tensor([0.5, 0.8, 0.95, 0.999])


def rule(kind: str) -> Rule:
    """A memory of tokens of width 5."""
    if kind == "averages":
        return Averages(DECAYS, 5)
    generator = torch.Generator().manual_seed(3)
    return Gates(random_gates(5, (3, 2), 4, generator), 5)


RULES = ["averages", "gates"]


def loop(
    z: torch.Tensor, real: torch.Tensor, decays: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m_t = d m_{t-1} + (1 - d) z_t at real tokens, one number after the other."""
    z, state = z.double(), start.double().clone()
    d = decays.double().view(-1, 1)
    outputs = []
    for t in range(z.shape[1]):
        for b in range(z.shape[0]):
            if real[b, t]:
                state[b] = d * state[b] + (1 - d) * z[b, t]
        outputs.append(state.clone())
    return torch.stack(outputs, 1), state


def inputs(T: int, padding: str = "none", batch: int = 3, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    z = torch.randn(batch, T, width, generator=generator)
    real = torch.ones(batch, T, dtype=torch.bool)
    if padding == "left":
        real[1, : T // 2] = False
        real[2, : T - 1] = False
    elif padding == "middle":
        real = torch.rand(batch, T, generator=generator) > 0.4
    elif padding == "everywhere":
        real[:] = False
    return z, real


@pytest.mark.parametrize("padding", ["none", "left", "middle", "everywhere"])
@pytest.mark.parametrize("T", [1, 2, 17, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_it_is_the_recurrence(T: int, padding: str) -> None:
    z, real = inputs(T, padding)
    start = torch.randn(3, len(DECAYS), 5, generator=torch.Generator().manual_seed(1))
    found = moving_averages(z, real, DECAYS, start)
    expected = loop(z, real, DECAYS, start)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert (a - b).abs().max() < 1e-5


def test_padding_leaves_no_trace() -> None:
    z, real = inputs(40, "left")
    start = torch.zeros(3, len(DECAYS), 5)
    poisoned = z.masked_fill(~real.unsqueeze(-1), 1e6)
    assert torch.equal(moving_averages(poisoned, real, DECAYS, start)[1], moving_averages(z, real, DECAYS, start)[1])
    alone = moving_averages(z[1:2, 20:], real[1:2, 20:], DECAYS, start[1:2])[1]
    assert (moving_averages(z, real, DECAYS, start)[1][1:2] - alone).abs().max() < 1e-6


def test_it_is_causal() -> None:
    z, real = inputs(2 * CHUNK)
    start = torch.zeros(3, len(DECAYS), 5)
    changed = z.clone()
    changed[:, 150:] += 3
    a, b = (moving_averages(values, real, DECAYS, start)[0] for values in (z, changed))
    assert torch.equal(a[:, :150], b[:, :150])
    assert (a[:, 150:] != b[:, 150:]).any()


def test_no_decays() -> None:
    z, real = inputs(9)
    averages, state = moving_averages(z, real, torch.zeros(0), torch.zeros(3, 0, 5))
    assert averages.shape == (3, 9, 0, 5) and state.shape == (3, 0, 5)


@pytest.mark.parametrize("pieces", [[1] * 5 + [CHUNK + 40], [CHUNK + 44, 1], [20, 60, 1, CHUNK - 36]])
@pytest.mark.parametrize("padding", ["none", "left", "middle"])
@pytest.mark.parametrize("kind", RULES)
def test_appended_pieces_are_the_whole(kind: str, pieces: list[int], padding: str) -> None:
    z, real = inputs(sum(pieces), padding)
    expected = rule(kind)(z, real, rule(kind).empty(3))
    if kind == "averages":
        averages, state = loop(z, real, DECAYS, torch.zeros(3, len(DECAYS), 5))
        expected = averages.flatten(2), state
    memory = Memory(3, 5, rule(kind))
    found = [memory.append(a, b) for a, b in zip(z.split(pieces, 1), real.split(pieces, 1), strict=True)]
    assert len(memory) == sum(pieces) and memory.batch == 3
    assert (torch.cat(found, 1) - expected[0]).abs().max() < 1e-5
    assert (memory.state - expected[1]).abs().max() < 1e-5


@pytest.mark.parametrize("length", [0, 1, 30, CHUNK + 20, CHUNK + 70, 10_000])
@pytest.mark.parametrize("kind", RULES)
def test_cropped_is_never_seen(kind: str, length: int) -> None:
    z, real = inputs(CHUNK + 70, "middle")
    memory, shorter = Memory(3, 5, rule(kind)), Memory(3, 5, rule(kind))
    memory.append(z, real)
    memory.crop(length)
    if length:
        shorter.append(z[:, :length], real[:, :length])
    assert len(memory) == len(shorter)
    assert (memory.state - shorter.state).abs().max() < 1e-6
    more, everywhere = inputs(5)
    assert (memory.append(more, everywhere) - shorter.append(more, everywhere)).abs().max() < 1e-6


@pytest.mark.parametrize("how", ["select", "repeat"])
@pytest.mark.parametrize("kind", RULES)
def test_sequences_move(kind: str, how: str) -> None:
    z, real = inputs(33, "left")
    memory = Memory(3, 5, rule(kind))
    memory.append(z, real)
    order = torch.tensor([2, 0, 0, 1]) if how == "select" else torch.tensor([0, 0, 1, 1, 2, 2])
    if how == "select":
        memory.select(order)
    else:
        memory.repeat(2)
    direct = Memory(len(order), 5, rule(kind))
    direct.append(z[order], real[order])
    assert memory.batch == len(order)
    for name in ("z", "real", "state"):
        assert torch.allclose(getattr(memory, name).float(), getattr(direct, name).float(), atol=1e-6)
    memory.crop(7)
    direct.crop(7)
    assert torch.allclose(memory.state, direct.state, atol=1e-6)


@pytest.mark.parametrize("T", [1, 11, CHUNK + 9])
def test_gradient_reaches_decays_and_input(T: int) -> None:
    z, real = inputs(T, "middle")
    real[0] = True
    start = torch.randn(3, len(DECAYS), 5, generator=torch.Generator().manual_seed(2))
    grads = []
    for function, dtype in ((moving_averages, torch.float32), (loop_with_grad, torch.float64)):
        logits = torch.logit(DECAYS.to(dtype)).requires_grad_()
        leaf = z.clone().to(dtype).requires_grad_()
        out = function(leaf, real, torch.sigmoid(logits), start.to(dtype))[0]
        (out * torch.arange(out.numel(), dtype=dtype).view_as(out).cos()).sum().backward()
        grads.append((logits.grad, leaf.grad))
    for found, expected in zip(*grads, strict=True):
        assert expected.abs().max() > 0
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def loop_with_grad(
    z: torch.Tensor, real: torch.Tensor, decays: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence without writing in place, so that autograd follows it."""
    d = decays.view(1, -1, 1)
    outputs, state = [], start
    for t in range(z.shape[1]):
        new = d * state + (1 - d) * z[:, t : t + 1]
        state = torch.where(real[:, t].view(-1, 1, 1), new, state)
        outputs.append(state)
    return torch.stack(outputs, 1), state
