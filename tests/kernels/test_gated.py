"""LoRA under gates against plain torch, in the interpreter or on a GPU."""

import pytest
import torch

from molora_kernels import gated
from molora_kernels.gated import PAGE, add_gated, open_gates, route_gates
from tests.conftest import DEVICE

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative, of the norm


def bits(gates: torch.Tensor) -> torch.Tensor:
    """[T] int64, of gates [T, R]."""
    parts = gates.split(PAGE, 1)
    return sum(((part != 0).any(1).long() << k for k, part in enumerate(parts)), torch.zeros_like(gates[:, 0]).long())


class Case:
    """Tokens of four slots and of none, in no order; ``page`` ranks together that no gate of their slot's tokens names
    are NaN and must not be read."""

    def __init__(
        self, T: int, ranks: int, widths: tuple[int, ...], dtype: torch.dtype = torch.float32, page: int = PAGE
    ) -> None:
        chance = torch.Generator().manual_seed(T + ranks)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=chance).to(DEVICE, dtype)

        D, self.widths, self.ranks = 100, widths, ranks
        self.slot = torch.randint(-1, 4, (T,), generator=chance)
        self.gates = torch.zeros(T + 3, ranks)
        blocks = -(-ranks // PAGE)
        for token in range(T):  # one or two adapters, and of slot 0 none
            for block in torch.randperm(blocks, generator=chance)[: 1 + token % 2].tolist() if self.slot[token] else []:
                self.gates[token, block * PAGE : (block + 1) * PAGE] = torch.rand(1, generator=chance) + 0.5
        self.A, self.B = [tensor(4, 1, ranks, D) for _ in widths], [tensor(4, 1, wide, ranks) for wide in widths]
        for slot in range(4):
            used = (self.gates[:T][self.slot == slot] != 0).any(0)
            unused = ~torch.cat([part.any().expand(len(part)) for part in used.split(page)])
            for a, b in zip(self.A, self.B, strict=True):
                a[slot, 0, unused.to(DEVICE)] = b[slot, 0, :, unused.to(DEVICE)] = torch.nan
        self.x, self.y = tensor(T, D), tensor(T, sum(widths) + 9)
        ids, counts = self.slot.unique(return_counts=True)
        self.order = self.slot.argsort(stable=True).int().to(DEVICE)
        self.ids = torch.nn.functional.pad(ids, (0, 5 - len(ids)), value=-1).int().to(DEVICE)
        self.counts = torch.nn.functional.pad(counts, (0, 5 - len(counts))).int().to(DEVICE)
        self.starts = torch.nn.functional.pad(self.counts.cumsum(0), (1, 0)).int()

    def run(self, add: bool = True) -> torch.Tensor:
        y, gates = self.y.clone(), self.gates.to(DEVICE)
        of = bits(gates), self.order, self.ids, self.counts, self.starts
        add_gated(y, self.x, self.A, self.B, gates, *of, offset=4, add=add)
        return y

    def expected(self) -> torch.Tensor:
        y, first = self.y.double().cpu(), 4
        for a, b, wide in zip(self.A, self.B, self.widths, strict=True):
            a, b = a.double().nan_to_num(0).cpu(), b.double().nan_to_num(0).cpu()
            for token, slot in enumerate(self.slot.tolist()):
                if slot >= 0:
                    h = self.gates[token].double() * (a[slot, 0] @ self.x[token].double().cpu())
                    y[token, first : first + wide] += b[slot, 0] @ h
            first += wide
        return y


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ranks", [8, 64, 512], ids=["less than a block", "four blocks", "all that vLLM takes"])
@pytest.mark.parametrize("widths", [(40,), (70, 24), (70, 24, 24)])
def test_few_tokens(widths: tuple[int, ...], ranks: int, dtype: torch.dtype) -> None:
    for T in (1, 37):
        case = Case(T, ranks, widths, dtype)
        found, wanted = case.run().double().cpu(), case.expected()
        assert (found - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def test_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated, "FEW", 16)
    for ranks in (8, 128):
        case = Case(130, ranks, (70, 24, 24), page=64)
        found, wanted = case.run().double().cpu(), case.expected()
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_what_has_no_slot_and_no_gate_stays_as_it_was() -> None:
    case = Case(37, 64, (40, 8))
    still = (case.slot <= 0).to(DEVICE)
    assert still.any() and torch.equal(case.run()[still], case.y[still])


def test_written_instead_of_added() -> None:
    """For vLLM's second stream, on a y of zeros."""
    case = Case(37, 64, (40, 8))
    case.y.zero_()
    assert torch.equal(case.run(add=False), case.run())


@pytest.mark.parametrize("ranks, each", [(8, 2), (64, 12), (512, 64)])
def test_gates_of_a_plan(ranks: int, each: int) -> None:
    """Of four adapters of so many ranks, in a stack that has fewer ranks than there are; other tokens are as they were
    opened."""
    places = torch.tensor([0, -1, 2, 2, 2, -1, 2], device=DEVICE)
    gates, acts = torch.full((9, ranks), 7.0, device=DEVICE), torch.full((9,), 7, device=DEVICE)
    open_gates(gates, acts, places)
    at, slots = torch.tensor([2, 3, 6]), torch.tensor([[3, 0, -1], [-1, -1, -1], [2, 2, 1]])
    weights = torch.tensor([[0.5, 1.0, 9.0], [1.0, 1.0, 1.0], [0.25, 0.5, -1.0]])
    owners = torch.tensor([0, 1, 2, 3, 4]).repeat_interleave(each)[: ranks - 1]
    route_gates(gates, acts, *(tensor.to(DEVICE) for tensor in (at, slots, weights, owners)))
    wanted = torch.zeros(9, ranks)
    wanted[[0, 4]], wanted[7:] = 1, 7
    for token, chosen, own in zip(at.tolist(), slots.tolist(), weights.tolist(), strict=True):
        for slot, weight in zip(chosen, own, strict=True):
            if slot >= 0:
                wanted[token, : len(owners)] += weight * (owners == slot)
    assert torch.equal(gates.cpu(), wanted)
    assert acts[at.to(DEVICE)].tolist() == bits(wanted[at]).tolist()
    assert acts[torch.tensor([0, 1, 4, 5, 7, 8])].tolist() == [-1, 0, -1, 0, 7, 7]
