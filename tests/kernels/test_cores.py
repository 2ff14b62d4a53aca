"""Compressed adapters by the kernels, beside ordinary ones, against U b a V^T x in float64."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from molora.groups import AdapterGroup
from molora_kernels import Factors, rows
from molora_kernels.blocks import make_blocks
from molora_kernels.epilogue import Added, add_norm, gate, heads
from molora_kernels.forms import TOGETHER
from molora_kernels.linear import LinearTile, linear, shrink_block
from molora_kernels.order import PagedPlan
from molora_kernels.paged import add_lora_paged, shrink_paged
from molora_kernels.pages import PAGE, Writes
from tests.conftest import DEVICE
from tests.kernels.test_paged import TOLERANCE

TILE = LinearTile(32, 16, split=3)


@dataclass(frozen=True, eq=False)
class Basis:
    U: torch.Tensor
    V: torch.Tensor


class Mixed:
    """A group of modules with slots of both kinds: 0 and 1 share a small basis and 2 has a larger one, of which the
    first slice has a part; 3 is ordinary; 4 is compressed in the first slice and ordinary in the others; 5 is empty.
    No core has more than ``most`` ranks."""

    SLOTS = 6

    def __init__(
        self,
        T: int,
        D: int,
        outputs: tuple[int, ...],
        top: int = 2,
        dtype: torch.dtype = torch.float32,
        most: int = 40,
    ) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(0), dtype
        self.outputs = outputs
        self.x, self.weight = self.randn(T, D), self.randn(sum(outputs), D) / D**0.5
        self.group = AdapterGroup([f"m.{index}" for index in range(len(outputs))], D, outputs, dtype, DEVICE)
        self.deltas: dict[tuple[int, int], torch.Tensor] = {}  # by slot and slice, [O, D] in float64
        self.small = [self.basis(10, 10, index) for index in range(len(outputs))]
        self.large = [self.basis(40, 40 if index else 33, index) for index in range(len(outputs))]
        for index in range(len(outputs)):
            self.compress(0, index, self.small[index], 4)
            self.compress(1, index, self.small[index], min(20, most))
            self.compress(2, index, self.large[index], most)
            self.raw(3, index, 20)
            if index == 0:
                self.compress(4, index, self.large[index], 3)
            else:
                self.raw(4, index, 3)
        self.slots = torch.randint(-1, self.SLOTS, (T, top), generator=self.generator, dtype=torch.int32).to(DEVICE)
        self.slots[0] = torch.arange(top)  # of one basis, for one token
        self.weights = self.randn(T, top).float()

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, self.dtype)

    def basis(self, down: int, up: int, index: int) -> Basis:
        D = self.x.shape[1]
        return Basis(self.randn(self.outputs[index], up) / up**0.5, self.randn(D, down) / D**0.5)

    def compress(self, slot: int, index: int, basis: Basis, rank: int) -> None:
        a, b = self.randn(rank, basis.V.shape[1]), self.randn(rank, basis.U.shape[1]) / rank**0.5
        self.group.put(slot, index, Factors(a, b), basis=basis)
        self.deltas[slot, index] = basis.U.double() @ b.double().T @ a.double() @ basis.V.double().T

    def raw(self, slot: int, index: int, rank: int) -> None:
        A, B = self.randn(rank, self.x.shape[1]) / self.x.shape[1] ** 0.5, self.randn(rank, self.outputs[index])
        self.group.put(slot, index, Factors(A, B))
        self.deltas[slot, index] = B.double().T @ A.double()

    def empty(self, slot: int, index: int) -> None:
        self.group.put(slot, index, None)
        del self.deltas[slot, index]

    def added(self, x: torch.Tensor | None = None, weights: torch.Tensor | None = None) -> torch.Tensor:
        """What the adapters add to every slice, [T, sum of O], float64."""
        x = self.x.double() if x is None else x
        weights = self.weights.double() if weights is None else weights
        wide = list(self.outputs)
        parts = [torch.zeros(len(x), width, dtype=torch.float64, device=DEVICE) for width in wide]
        for (slot, index), delta in self.deltas.items():
            parts[index] = parts[index] + (weights * (self.slots == slot)).sum(1, keepdim=True) * (x @ delta.T)
        return torch.cat(parts, 1)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("by_slot", [False, True], ids=["by token", "by slot"])
@pytest.mark.parametrize(("T", "D", "top"), [(2, 64, 1), (5, 64, 2), (70, 64, 2), (3, 2100, 3)])
def test_between_a_steps_product_and_what_follows(T: int, D: int, top: int, by_slot: bool) -> None:
    """With an input of 2,100 the shrink comes in several parts; with three columns of a plan, cores of as many ranks as
    elsewhere would be code that takes ten seconds to compile."""
    mixed = Mixed(T, D, (150, 150), top, most=16 if top == 3 else 40)
    pages, blocks = mixed.group.pages, make_blocks(mixed.slots, None) if by_slot else None
    cuts = -(-D // shrink_block(T, D))
    assert cuts == (1 if D == 64 else 5)
    h = torch.full((cuts, T, top, 2 * pages.max_pages * PAGE), torch.nan, device=DEVICE)
    y = torch.full((TILE.split, T, 300), torch.nan, device=DEVICE)
    linear(y, mixed.x, mixed.weight, TILE, h, pages, mixed.slots, blocks=blocks)
    m = torch.full((T, 150), torch.nan, device=DEVICE)
    gate(y, m, Added(h, pages, mixed.slots, mixed.weights))
    g, u = (mixed.x.double() @ mixed.weight.double().T + mixed.added()).split(150, 1)
    close(m, F.silu(g) * u)


# Neighbours with the same slots and with others, an empty row, one slot twice, both kinds, and a slot that is empty.
ROWS = [[0, 1], [0, 1], [-1, -1], [2, 2], [3, 4], [5, -1], [4, 0], [1, 3]]


def product_of(mixed: Mixed) -> tuple[torch.Tensor, Added]:
    """A step's product and the shrink beside it, of tokens with the slots of ``ROWS``."""
    pages, T = mixed.group.pages, len(mixed.x)
    mixed.slots = torch.tensor(ROWS, dtype=torch.int32, device=DEVICE).repeat(T // len(ROWS), 1)
    h = torch.full((1, T, 2, len(mixed.outputs) * pages.max_pages * PAGE), torch.nan, device=DEVICE)
    y = torch.full((TILE.split, T, sum(mixed.outputs)), torch.nan, device=DEVICE)
    linear(y, mixed.x, mixed.weight, TILE, h, pages, mixed.slots, blocks=make_blocks(mixed.slots, None))
    return y, Added(h, pages, mixed.slots, mixed.weights)


@pytest.mark.parametrize("T", [8, 24])  # up to 16 tokens a program has fewer columns
def test_of_one_module_with_the_residual(T: int) -> None:
    mixed = Mixed(T, 64, (150,))
    y, added = product_of(mixed)
    gain, x, residual = mixed.randn(150), torch.full((T, 150), torch.nan, device=DEVICE), mixed.randn(T, 150)
    wanted = residual.double() + mixed.x.double() @ mixed.weight.double().T + mixed.added()
    add_norm(residual, y, gain, x, 1e-6, added)
    close(residual, wanted)
    close(x, F.rms_norm(wanted, (150,), gain.double(), 1e-6))


def test_of_three_modules_with_their_heads() -> None:
    """At an angle of 0 their numbers stay what they are."""
    mixed = Mixed(8, 64, (64, 32, 32), most=16)
    y, added = product_of(mixed)
    q = torch.full((8, 1, 4, 16), torch.nan, device=DEVICE)
    keys, values = torch.full((2, 8, 2, 3, 16), torch.nan, device=DEVICE).unbind(0)
    rotary, zeros = (torch.ones(1, 8, device=DEVICE), torch.zeros(1, 8, device=DEVICE)), mixed.slots.new_zeros(8).long()
    heads(y, None, q, keys, values, None, rotary, zeros, zeros + 1, added)
    wanted = (mixed.x.double() @ mixed.weight.double().T + mixed.added()).split(mixed.outputs, 1)
    for found, its in zip((q.squeeze(1), keys[:, :, 1], values[:, :, 1]), wanted, strict=True):
        close(found.flatten(1), its)


@pytest.mark.parametrize("held", [1, 1536, 3072])  # bytes: one page of a basis at once, two, and all four
def test_more_of_a_basis_than_is_read_early(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "HELD", held)
    mixed = Mixed(8, 64, (150, 150), most=16)
    assert rows.first_pages(mixed.group.pages, 2, 128, 1, 2) == {1: 1, 1536: 2, 3072: 4}[held]
    y, added = product_of(mixed)
    m = torch.full((8, 150), torch.nan, device=DEVICE)
    gate(y, m, added)
    g, u = (mixed.x.double() @ mixed.weight.double().T + mixed.added()).split(150, 1)
    close(m, F.silu(g) * u)


def test_of_a_prompts_product_by_block() -> None:
    mixed = Mixed(70, 64, (150, 150))
    plan = PagedPlan(mixed.slots, mixed.weights)
    h = shrink_paged(mixed.x, mixed.group.pages, plan)
    m = torch.full((70, 150), torch.nan, device=DEVICE)
    y = (mixed.x @ mixed.weight.T).unsqueeze(0)
    gate(y, m, Added(h, mixed.group.pages, mixed.slots, mixed.weights, plan.blocks))
    g, u = (mixed.x.double() @ mixed.weight.double().T + mixed.added()).split(150, 1)
    close(m, F.silu(g) * u)


@pytest.mark.parametrize(("form", "T"), [("by token", 1), ("by token", 70), ("by block", 70), ("by column", 70)])
def test_between_shrink_and_expand(form: str, T: int) -> None:
    mixed = Mixed(T, 48, (40, 24, 24))
    if form == "by column":
        mixed.group.reserve(TOGETHER)  # so many slots that each column of a plan is a pass
    by_token = form == "by token"
    y = mixed.randn(T, 88)
    wanted = y.double() + mixed.added()
    close(add_lora_paged(y, mixed.x, mixed.group.pages, mixed.slots, mixed.weights, by_token=by_token), wanted)


@pytest.mark.parametrize("by_token", [True, False], ids=["by token", "by block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, by_token: bool) -> None:
    mixed = Mixed(20, 48, (40, 24), dtype=dtype)
    y = mixed.randn(20, 64)
    wanted = y.double() + mixed.added()
    found = add_lora_paged(y, mixed.x, mixed.group.pages, mixed.slots, mixed.weights, by_token=by_token)
    close(found, wanted, TOLERANCE[dtype])


def test_module_by_module_and_as_plain_factors() -> None:
    mixed = Mixed(70, 48, (40, 24))
    plan = PagedPlan(mixed.slots, mixed.weights)
    wanted = mixed.added().split((40, 24), 1)
    for index, width in enumerate((40, 24)):
        y = torch.zeros(70, width, device=DEVICE)
        close(mixed.group.add(y, mixed.x, mixed.x, plan, index), wanted[index])
        factors = mixed.group.factors(index, range(8))
        assert sorted(factors) == [0, 1, 2, 3, 4]
        for slot, (A, B) in factors.items():
            close(B.T @ A, mixed.deltas[slot, index])


def test_gradients_go_through_them() -> None:
    mixed = Mixed(9, 48, (40, 24))
    for index, width in enumerate((40, 24)):
        x, weights = (part.clone().requires_grad_() for part in (mixed.x, mixed.weights))
        back = mixed.randn(9, width)
        found = mixed.group.add(torch.zeros(9, width, device=DEVICE), x, x, PagedPlan(mixed.slots, weights), index)
        found.backward(back)
        exact = [part.detach().double().requires_grad_() for part in (x, weights)]
        wanted = mixed.added(*exact).split((40, 24), 1)[index]
        wanted.backward(back.double())
        close(found.detach(), wanted.detach())
        for mine, its in zip((x, weights), exact, strict=True):
            assert mine.grad is not None and its.grad is not None
            close(mine.grad, its.grad)


def check(mixed: Mixed) -> None:
    y = torch.zeros(len(mixed.x), sum(mixed.outputs), device=DEVICE)
    close(add_lora_paged(y, mixed.x, mixed.group.pages, mixed.slots, mixed.weights), mixed.added())


def test_they_come_and_go() -> None:
    """A basis is there once, and as long as any slot needs it."""
    mixed = Mixed(30, 48, (40, 24))
    pages = mixed.group.pages
    version = mixed.group.version
    runs = {index: pages.shared_runs(index) for index in (0, 1)}
    assert all(len(found) == 2 for found in runs.values())
    mixed.empty(0, 0)
    mixed.raw(2, 0, 5)  # slot 4 has its basis still
    mixed.compress(3, 0, mixed.large[0], 7)
    check(mixed)
    assert pages.shared_runs(0) == runs[0]
    mixed.empty(1, 0)  # the last of the small basis
    assert len(pages.shared_runs(0)) == 1
    mixed.raw(0, 0, 16)  # into pages that it left
    mixed.compress(5, 1, mixed.small[1], 30)
    check(mixed)
    mixed.compress(1, 0, mixed.small[0], 2)
    mixed.compress(1, 0, mixed.small[0], 9)  # the only one of its basis, in place of itself
    mixed.compress(3, 0, mixed.small[0], 9)  # of another basis than before
    check(mixed)
    for slot, index in list(mixed.deltas):
        mixed.empty(slot, index)
    assert not any(pages.adapted(index) or mixed.group.compressed(index) for index in (0, 1))
    assert mixed.group.pages is pages and mixed.group.version == version


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_step_stays_right_when_they_come_and_go() -> None:
    """And its launches wait for one another."""
    mixed, pdl = Mixed(9, 2100, (150, 150)), torch.cuda.get_device_capability() >= (9, 0)
    pages, blocks = mixed.group.pages, make_blocks(mixed.slots, None)
    h = torch.empty(-(-2100 // shrink_block(9, 2100)), 9, 2, 2 * pages.max_pages * PAGE, device=DEVICE)
    y, m = torch.empty(TILE.split, 9, 300, device=DEVICE), torch.empty(9, 150, device=DEVICE)

    def step() -> None:
        for _ in range(3):
            linear(y, mixed.x, mixed.weight, TILE, h, pages, mixed.slots, pdl, blocks)
            gate(y, m, Added(h, pages, mixed.slots, mixed.weights), pdl)

    step()
    torch.cuda.synchronize()
    graph, version = torch.cuda.CUDAGraph(), mixed.group.version
    with torch.cuda.graph(graph):
        step()
    for swap in range(20):
        slot, index = swap % 6, swap // 2 % 2
        if swap % 3 == 2:
            mixed.raw(slot, index, 1 + swap)
        else:
            mixed.compress(slot, index, (mixed.small, mixed.large)[swap % 2][index], 1 + swap)
        m.fill_(torch.nan)
        graph.replay()
        g, u = (mixed.x.double() @ mixed.weight.double().T + mixed.added()).split(150, 1)
        close(m, F.silu(g) * u)
    assert mixed.group.version == version


def test_what_is_gathered_is_written_in_order() -> None:
    mixed = Mixed(30, 48, (40,))
    writes = Writes()
    for slot in (0, 1):
        mixed.group.put(slot, 0, None, writes)
        del mixed.deltas[slot, 0]
    other, (a, b) = mixed.basis(10, 10, 0), (mixed.randn(6, 10), mixed.randn(6, 10))
    mixed.group.put(0, 0, Factors(a, b), writes, other)  # where the small basis lay
    mixed.deltas[0, 0] = other.U.double() @ b.double().T @ a.double() @ other.V.double().T
    writes.done()
    check(mixed)


def test_memory_grows_with_cores_and_not_with_bases() -> None:
    mixed = Mixed(30, 48, (40, 24))
    group = mixed.group
    before, pages = group.version, group.pages.pages
    for slot in range(6, 40):
        for index in (0, 1):
            mixed.compress(slot, index, mixed.small[index], 16)
    assert group.version > before and group.cores is not None
    assert group.pages.pages == pages and group.cores.pages >= 40
    mixed.slots.copy_(torch.randint(-1, 40, mixed.slots.shape, generator=mixed.generator))
    check(mixed)
    wide = mixed.basis(100, 90, 0)  # than any before: cores have to have room for it
    mixed.compress(7, 0, wide, 33)
    mixed.slots[1, 0] = 7
    check(mixed)


def test_the_first_core_changes_what_a_step_was_captured_for() -> None:
    mixed = Mixed(1, 48, (40,))
    group = AdapterGroup(("m",), 48, (40,), torch.float32, DEVICE)
    A, B = mixed.randn(4, 48), mixed.randn(4, 40)
    group.put(0, 0, Factors(A, B))
    version = group.version
    assert group.pages.cores is None
    core = Factors(mixed.randn(4, 10), mixed.randn(4, 10))
    group.put(1, 0, core, basis=mixed.small[0])
    assert group.pages.cores is not None and group.version == version + 1
    group.put(2, 0, core, basis=mixed.small[0])
    assert group.version == version + 1


def test_reserved_pages_are_enough_for_what_shares_a_basis() -> None:
    mixed = Mixed(1, 48, (40,))
    group = AdapterGroup(("m",), 48, (40,), torch.float32, DEVICE)
    group.reserve(39, 40)
    versions = []
    for slot in range(40):
        group.put(slot, 0, Factors(mixed.randn(16, 40), mixed.randn(16, 33)), basis=mixed.large[0])
        versions.append(group.version)
    assert len(set(versions)) == 1 and group.pages.pages == 64


def test_a_basis_over_the_kernels_largest_is_refused() -> None:
    mixed = Mixed(1, 300, (280,))
    with pytest.raises(ValueError, match="Rank 257 is over 256"):
        mixed.compress(5, 0, mixed.basis(257, 20, 0), 4)
    check(mixed)


def test_moved_to_another_dtype() -> None:
    mixed = Mixed(20, 48, (40, 24))
    mixed.group.apply(lambda tensor: tensor.double())
    pages = mixed.group.pages
    assert pages.A.dtype == torch.float64 and pages.cores is not None and pages.cores.A.dtype == torch.float64
    for index in (0, 1):
        for slot, (A, B) in mixed.group.factors(index, range(6)).items():
            close(B.T @ A, mixed.deltas[slot, index])
