"""Where the kernels find adapters: arenas of rank pages with addresses that never change.

One `RankPages` holds the adapters of a group of modules that read the same input (q, k and v; gate and up; o alone),
each module a *slice* of the group's output. A slot holds a run of pages in each slice; a page is `PAGE` ranks. So an
adapter of rank 8 takes one page where one of rank 64 takes four, and a swap writes into memory that a captured graph
already reads. Rows past an adapter's rank are zeros in A and in B: kernels need no mask for them.

Slots may share a run: of compressed adapters the pages hold what they have in common, once, and ``cores``, which are
pages themselves, what each has of its own (:mod:`molora_kernels.cores`).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from molora_kernels.reference import Factors
from molora_kernels.runs import Run, Runs

PAGE = 16  # ranks; the shortest side of a tensor core's tile
MAX_RANK = 256


@dataclass
class PageView:
    """What the kernels read.

    A: [slices, pages, PAGE, D]. B: flat, slice after slice, each [pages, PAGE, O of the slice].
    first, count: [slices, slots] int32, the run of pages of each slot. columns: [slices + 1] int32, where each slice
    begins in the output. inputs: D. outputs: O of each slice. max_pages: the most that a slot can have. cores: of slots
    that share their run, by slot and slice what stands between A and B, of as many slots; None: there are none.
    """

    inputs: int
    outputs: tuple[int, ...]
    slots: int
    pages: int
    max_pages: int
    A: torch.Tensor
    B: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    columns: torch.Tensor
    cores: "PageView | None" = None

    def b_slice(self, index: int, of: torch.Tensor | None = None) -> torch.Tensor:
        """[pages, PAGE, O], the pages of one slice in B, or in a tensor ``of`` the same layout; a view."""
        width, start = self.outputs[index], self.pages * PAGE * sum(self.outputs[:index])
        return (self.B if of is None else of)[start : start + self.pages * PAGE * width].view(self.pages, PAGE, width)

    def span(self, index: int) -> tuple[int, int]:
        """Where a slice begins in the output, and how wide it is."""
        return sum(self.outputs[:index]), self.outputs[index]

    def piece(self, index: int) -> "PageView":
        """One slice as a group of its own: the same memory."""
        width, here = self.outputs[index], slice(index, index + 1)
        return PageView(
            self.inputs,
            (width,),
            self.slots,
            self.pages,
            self.max_pages,
            A=self.A[here],
            B=self.b_slice(index).flatten(),
            first=self.first[here],
            count=self.count[here],
            columns=_span(width, self.first.device),
            cores=None if self.cores is None else self.cores.piece(index),
        )

    def transposed(self, index: int) -> "PageView":
        """One slice with A and B exchanged, for gradients: the same memory read the other way round."""
        return PageView(
            self.outputs[index],
            (self.inputs,),
            self.slots,
            self.pages,
            self.max_pages,
            A=self.b_slice(index),
            B=self.A[index],
            first=self.first[index],
            count=self.count[index],
            columns=_span(self.inputs, self.first.device),
        )


@cache
def _span(width: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([0, width], dtype=torch.int32, device=device)


class Writes:
    """What is to be written into pages: gathered, since on a GPU many writes then take few launches."""

    def __init__(self) -> None:
        self.emptied: list[torch.Tensor] = []  # counts
        self.factors: list[tuple[torch.Tensor, torch.Tensor]] = []  # where, and what
        self.rest: list[torch.Tensor] = []  # of a last page
        self.runs: list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]] = []  # first, count, and what they become

    @torch.no_grad()
    def done(self) -> None:
        """Writes it, in an order in which nothing is read that is half written."""
        if self.emptied:
            torch._foreach_zero_(self.emptied)
        if self.factors:
            where, what = zip(*self.factors, strict=True)
            torch._foreach_copy_(list(where), list(what))
        if self.rest:
            torch._foreach_zero_(self.rest)
        if self.runs:
            firsts, counts, runs = zip(*self.runs, strict=True)
            numbers, device = torch.tensor(runs, dtype=torch.int32), firsts[0].device
            if device.type == "cuda":  # from other memory the copy would wait for the step that runs there
                numbers = numbers.pin_memory()
            numbers = numbers.to(device, non_blocking=True)
            for which, into in enumerate((firsts, counts)):
                torch._foreach_copy_(list(into), list(numbers[:, which].unbind()))
        for gathered in (self.emptied, self.factors, self.rest, self.runs):
            gathered.clear()


class RankPages(PageView):
    """Factors of up to ``slots`` adapters, in memory that never moves.

    Args:
        inputs: D, the width of the input.
        outputs: the width of each slice's output.
        slots: how many adapters.
        pages: how many pages in each slice.
        max_rank: the largest rank that may come; launches cover as many pages a slot.
        dtype, device: of the factors.
    """

    def __init__(
        self,
        inputs: int,
        outputs: Sequence[int],
        slots: int,
        pages: int,
        max_rank: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
    ) -> None:
        if not 1 <= max_rank <= MAX_RANK:
            raise ValueError(f"max_rank must lie in [1, {MAX_RANK}], not {max_rank}.")
        slices = len(outputs)
        super().__init__(
            inputs,
            tuple(outputs),
            slots,
            pages,
            -(-max_rank // PAGE),
            A=torch.zeros(slices, pages, PAGE, inputs, dtype=dtype, device=device),
            B=torch.zeros(pages * PAGE * sum(outputs), dtype=dtype, device=device),
            first=torch.zeros(slices, slots, dtype=torch.int32, device=device),
            count=torch.zeros(slices, slots, dtype=torch.int32, device=device),
            columns=torch.tensor(
                [sum(outputs[:index]) for index in range(slices + 1)], dtype=torch.int32, device=device
            ),
        )
        self._runs = [Runs(index, pages) for index in range(slices)]
        # [pages * PAGE, D or O] of each slice; views that are made once, for a swap takes hundreds.
        self._rows = [(self.A[index].flatten(0, 1), self.b_slice(index).flatten(0, 1)) for index in range(slices)]

    @torch.no_grad()
    def put(self, slot: int, factors: Sequence[Factors | None]) -> None:
        """Writes an adapter into a slot, in place of what was there; None: it does not adapt that slice.

        Raises:
            IndexError: there is no such slot.
            ValueError: a factor of another shape, or of a rank over ``max_rank``; nothing has changed.
            MemoryError: no run of free pages is long enough; nothing has changed.
        """
        if not 0 <= slot < self.slots:
            raise IndexError(f"There is no slot {slot}: slots are 0 to {self.slots - 1}.")
        if len(factors) != len(self.outputs):
            raise ValueError(f"Give {len(self.outputs)} factors, one a slice, not {len(factors)}.")
        for index, pair in enumerate(factors):
            if pair is not None:
                self._check(index, pair)
        runs = [self._place(index, slot, pair) for index, pair in enumerate(factors)]
        writes = Writes()
        for index, (pair, run) in enumerate(zip(factors, runs, strict=True)):
            self._write(index, slot, pair, run, writes)
        writes.done()

    def put_slice(
        self,
        slot: int,
        index: int,
        pair: Factors | None,
        writes: Writes | None = None,
        shared: Hashable | None = None,
    ) -> None:
        """As :meth:`put`, for one slice; what the slot has in the others stays.

        Args:
            writes: gathers what is written, for the caller to do before the pages are read.
            shared: a name of the factors: where they lie under it already, the slot gets their run.
        """
        if not 0 <= slot < self.slots:
            raise IndexError(f"There is no slot {slot}: slots are 0 to {self.slots - 1}.")
        if pair is not None:
            self._check(index, pair)
        mine = Writes() if writes is None else writes
        self._write(index, slot, pair, self._place(index, slot, pair, shared), mine, shared)
        if writes is None:
            mine.done()

    def has_room(self, slot: int, index: int, rank: int, shared: Hashable | None = None) -> bool:
        """Whether :meth:`put_slice` finds pages for factors of this rank."""
        return self.holds(index, shared) or self._runs[index].fit(-(-rank // PAGE), slot) is not None

    def holds(self, index: int, shared: Hashable | None) -> bool:
        """Whether a slice has factors under this name; None is none."""
        return self._runs[index].shared(shared) is not None

    def names(self, index: int) -> dict[int, Hashable]:
        """slot -> the name of the factors that it shares, of one slice."""
        return self._runs[index].names

    def shared_runs(self, index: int) -> set[Run]:
        """The runs of one slice that are held under a name."""
        runs = self._runs[index]
        return {runs.of[slot] for slot in runs.names}

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        self.put(slot, [None] * len(self.outputs))

    def adapted(self, index: int) -> bool:
        """Whether an adapter adapts this slice."""
        return bool(self._runs[index].of)

    @property
    def layout(self) -> tuple[int, ...]:
        """Equal for pages of as many slices whose slots have the same runs."""
        return self.slots, self.pages, *(runs.digest for runs in self._runs)

    def factors(self, index: int) -> dict[int, Factors]:
        """slot -> factors of one slice, with the zero rows that fill the last page; views."""
        A, B = self._rows[index]
        found = {}
        for slot, (first, count) in self._runs[index].of.items():
            rows = slice(first * PAGE, (first + count) * PAGE)
            found[slot] = Factors(A[rows], B[rows])
        return found

    def _check(self, index: int, pair: Factors) -> None:
        rank = pair.A.shape[0]
        if pair.A.shape != (rank, self.inputs) or pair.B.shape != (rank, self.outputs[index]):
            raise ValueError(
                f"Slice {index} takes A [R, {self.inputs}] and B [R, {self.outputs[index]}], "
                f"not {list(pair.A.shape)} and {list(pair.B.shape)}."
            )
        if not 1 <= rank <= self.max_pages * PAGE:
            raise ValueError(f"Rank {rank} does not fit: these pages take ranks up to {self.max_pages * PAGE}.")

    def _place(self, index: int, slot: int, pair: Factors | None, shared: Hashable | None = None) -> Run:
        if pair is None:
            return 0, 0
        runs, need = self._runs[index], -(-pair.A.shape[0] // PAGE)
        held = runs.shared(shared)
        if held is not None:
            return held
        first = runs.fit(need, slot)
        if first is None:
            raise MemoryError(f"No {need} free pages in a row: {self.pages} serve {len(runs.of)} adapters.")
        return first, need

    def _write(
        self, index: int, slot: int, pair: Factors | None, run: Run, writes: Writes, shared: Hashable | None = None
    ) -> None:
        runs = self._runs[index]
        if runs.give(slot) is not None:  # nothing is read there while its pages are written
            writes.emptied.append(self.count[index, slot])
        if pair is None:
            return
        (first, count), rank = run, pair.A.shape[0]
        if not self.holds(index, shared):
            for rows, factor in zip(self._rows[index], pair, strict=True):
                writes.factors.append((rows.narrow(0, first * PAGE, rank), factor))
                if rank % PAGE:
                    writes.rest.append(rows.narrow(0, first * PAGE + rank, count * PAGE - rank))
        writes.runs.append((self.first[index, slot], self.count[index, slot], run))
        runs.take(slot, run, shared)
