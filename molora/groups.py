"""Adapters of modules that read the same input, in memory that the kernels and captured steps read."""

import os
from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from molora.adapter import SharedBasis
from molora.backend import broken
from molora.cores import add_apart, composed, spanned, widened, without_cores
from molora.spread import device_of, local, sharded
from molora_kernels import Factors
from molora_kernels.order import PagedPlan
from molora_kernels.pages import MAX_RANK, PAGE, RankPages, Writes

_FIRST_SLOTS, _FIRST_PAGES = 16, 16
Sizes = tuple[int, int, int]
"""Slots, pages, and the most pages of a slot."""

# Modules of one parent that read one input, each family in the order in which the base calls them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def siblings(name: str) -> tuple[str, ...]:
    """Names of the modules that read what module ``name`` reads, itself among them."""
    parent, _, child = name.rpartition(".")
    for family in SIBLINGS:
        if child in family:
            return tuple(f"{parent}.{other}" for other in family)
    return (name,)


class AdapterGroup:
    """Rank pages that grow when more or larger adapters come.

    Args:
        names: of the modules.
        inputs: D, which the modules share.
        outputs: O of each.
        dtype, device: of the factors.
    """

    def __init__(
        self, names: Sequence[str], inputs: int, outputs: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.names = tuple(names)
        self.pages = RankPages(inputs, outputs, _FIRST_SLOTS, _FIRST_PAGES, PAGE, dtype, device)
        self._shrunk: tuple[torch.Tensor, PagedPlan, list[tuple[PagedPlan, torch.Tensor]]] | None = None
        self._parent = self.names[0].rpartition(".")[0]
        self._factors: tuple[RankPages, list[tuple[torch.Tensor, torch.Tensor]]] | None = None
        self.cores: RankPages | None = None  # of compressed adapters, whose bases lie in the pages; also pages.cores
        self.version = 0  # changes when the pages move: what was captured before then reads memory that is gone

    @classmethod
    def of(cls, base: PreTrainedModel, names: Sequence[str]) -> "AdapterGroup":
        """For modules of ``base``, in their dtype (of quantised ones: the base's) and on their device."""
        found: list[Any] = [base.get_submodule(name) for name in names]
        modules: list[Any] = [getattr(module, "base_layer", module) for module in found]
        weight = modules[0].weight
        sizes = [_size(module) for module in modules]
        dtype = weight.dtype if weight.is_floating_point() else base.dtype
        return cls(names, sizes[0][0], [out for _, out in sizes], dtype, device_of(modules[0]))

    def put(
        self,
        slot: int,
        piece: int,
        factors: Factors | None,
        writes: Writes | None = None,
        basis: SharedBasis | None = None,
    ) -> None:
        """Writes an adapter's factors for one of the modules into a slot; None empties it there.

        Args:
            writes: gathers what is written, for the caller to do.
            basis: of a compressed adapter, whose core the factors are; told from others by identity.

        Raises:
            ValueError: a rank over 256, or factors of another shape.
        """
        core = None
        if basis is not None and factors is not None:
            core, factors = factors, spanned(basis)
        ranks = [1 if pair is None else len(pair.A) for pair in (factors, core)]
        if max(ranks) > MAX_RANK:
            raise ValueError(f"Rank {max(ranks)} is over {MAX_RANK}, the most that the kernels take.")
        sizes = _enough(self.pages, slot, piece, ranks[0], basis)
        if sizes != _sizes(self.pages):
            if writes is not None:
                writes.done()  # what is not written yet would not move
            self._move(sizes)
        if core is not None:
            self._fit_core(slot, piece, ranks[1], ranks[0], writes)
        if self.cores is not None:
            self.cores.put_slice(slot, piece, None if core is None else widened(core, self.cores.inputs), writes)
        self.pages.put_slice(slot, piece, factors, writes, basis)
        self._written(piece)

    def _written(self, piece: int) -> None:
        """Of a piece something changed: for groups that keep copies."""

    def _fit_core(self, slot: int, piece: int, rank: int, width: int, writes: Writes | None) -> None:
        """Makes room for a core of ``rank`` ranks between bases of ``width`` columns."""
        pages, cores = self.pages, self.cores
        if cores is None:
            widths = (width,) * len(pages.outputs)
            cores = RankPages(width, widths, pages.slots, pages.pages, PAGE, pages.A.dtype, pages.A.device)
        width, sizes = max(width, cores.inputs), _enough(cores, slot, piece, rank)
        if (width, sizes) != (cores.inputs, _sizes(cores)):
            if writes is not None:
                writes.done()
            cores = _moved(cores, sizes, width)
        if cores is not self.cores:
            self.cores = pages.cores = cores
            self.version += 1

    def reserve(self, slot: int, count: int = 0) -> None:
        """Makes room up to a slot that a plan may name: the kernels do not look whether there is one. And for so many
        pages."""
        slots, pages = self.pages.slots, self.pages.pages
        while slot >= slots:
            slots *= 2
        while count > pages:
            pages *= 2
        if (slots, pages) != (self.pages.slots, self.pages.pages):
            self._move((slots, pages, self.pages.max_pages))

    def factors(self, piece: int, slots: Collection[int]) -> dict[int, Factors]:
        """slot -> factors of one of the modules, of those slots that have some; of compressed adapters they are made
        here."""
        cores = {} if self.cores is None else self.cores.factors(piece)
        held = self.pages.factors(piece)
        return {
            slot: composed(cores[slot], held[slot]) if slot in cores else held[slot] for slot in slots if slot in held
        }

    @property
    def adapts(self) -> bool:
        """Whether any adapter adapts any of the modules."""
        return any(map(self.pages.adapted, range(len(self.names))))

    def serves(self, x: torch.Tensor) -> bool:
        """Whether the kernels can run on x."""
        on_gpu = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
        return on_gpu and x.device == self.pages.A.device and not broken()

    def add(self, y: torch.Tensor, x: torch.Tensor, flat: torch.Tensor, plan: PagedPlan, piece: int) -> torch.Tensor:
        """y plus what the adapters add to it, in place.

        Args:
            y: [..., O of the piece], the module's output of T tokens, contiguous.
            x: its input as the module got it: its siblings get the same object, and share its shrink.
            flat: [T, D], the same input.
            plan: of the T tokens.
            piece: the module's number in the group.
        """
        from molora_kernels import forms
        from molora_kernels.paged import (
            add_lora_paged,
            expand_paged,
            passes,
            shrink_paged,
            trained_hot,
        )

        if not self.pages.adapted(piece):
            return y
        flat = flat.to(self.pages.A.dtype)
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or plan.weights.requires_grad):
            pages = replace(self.pages.piece(piece), cores=None)
            if self.compressed(piece):
                y = add_apart(y, flat, self.pages, plan, piece)
                plan = without_cores(plan, self.pages, piece)
            blocks = None if forms.by_token(len(flat)) or trained_hot(pages) else plan.blocks
            return add_lora_paged(y, flat, pages, plan.slots, plan.weights, blocks)
        if self._shrunk is None or self._shrunk[0] is not x or self._shrunk[1] is not plan:
            parts = passes(plan, self.pages)
            self._shrunk = (x, plan, [(part, shrink_paged(flat, self.pages, part)) for part in parts])
        shrunk = self._shrunk[2]
        if not any(map(self.pages.adapted, range(piece + 1, len(self.pages.outputs)))):
            self._shrunk = None  # nothing is kept beyond the last of the siblings
        rows = y.view(-1, y.shape[-1])
        for part, h in shrunk:
            expand_paged(rows, h, self.pages, part, piece)
        return y

    def compressed(self, piece: int) -> bool:
        """Whether a compressed adapter adapts the piece."""
        return self.cores is not None and self.cores.adapted(piece)

    def linear(self, base: Any, x: torch.Tensor, plan: PagedPlan, piece: int) -> torch.Tensor | None:
        """The product of a frozen module and of few frozen adapters as one step of the way back, [..., O]; None where
        these are not what they are."""
        pages = self.pages
        trains = torch.is_grad_enabled() and (x.requires_grad or plan.weights.requires_grad)
        fit = trains and type(base) is nn.Linear and x.dtype == base.weight.dtype == pages.A.dtype
        if not fit or torch.is_autocast_enabled(x.device.type) or _watched(base) or not pages.adapted(piece):
            return None
        if self.compressed(piece):
            return None
        from molora_kernels.hot import linear_hot
        from molora_kernels.paged import trained_hot

        constants = (base.weight, base.bias, pages.A, pages.B)
        if not trained_hot(pages) or any(t is not None and t.requires_grad for t in constants):
            return None
        if self._factors is None or self._factors[0] is not pages:
            views = [(A.flatten(0, 1), pages.b_slice(index).flatten(0, 1)) for index, A in enumerate(pages.A)]
            self._factors = (pages, views)
        gate = plan.gates(self._parent, pages)[piece]
        return linear_hot(x, base.weight, base.bias, gate, *self._factors[1][piece])

    def apply(self, change: Any) -> None:
        """``.to()`` and the like."""
        A = change(self.pages.A)
        if A.dtype != self.pages.A.dtype or A.device != self.pages.A.device:
            self._move(_sizes(self.pages), A.dtype, A.device)

    def _move(self, sizes: Sizes, dtype: torch.dtype | None = None, device: Any = None) -> None:
        """Pages of other sizes, or elsewhere. Cores go with them, and have room for as many slots and adapters."""
        self.pages = _moved(self.pages, sizes, None, dtype, device)
        if self.cores is not None:
            slots, pages, most = sizes[0], max(sizes[1], self.cores.pages), self.cores.max_pages
            self.cores = self.pages.cores = _moved(self.cores, (slots, pages, most), None, dtype, device)
        self.version += 1


def _sizes(pages: RankPages) -> Sizes:
    return pages.slots, pages.pages, pages.max_pages


def _enough(pages: RankPages, slot: int, piece: int, rank: int, shared: Hashable | None = None) -> Sizes:
    """The sizes that these pages have, or would have to have, to take such factors into a slot."""
    slots, count, most = _sizes(pages)
    while slot >= slots:
        slots *= 2
    while most * PAGE < rank:
        most *= 2
    larger = most > pages.max_pages
    # An ordinary adapter of more ranks is followed by others. And where pages move, a slot's own are no room.
    if (larger and shared is None) or not pages.has_room(-1 if larger else slot, piece, rank, shared):
        while count < pages.pages + most:
            count *= 2
    return slots, count, most


def _moved(
    old: RankPages, sizes: Sizes, width: int | None, dtype: torch.dtype | None = None, device: Any = None
) -> RankPages:
    """A copy in memory of its own. width: of cores."""
    inputs, outputs = (old.inputs, old.outputs) if width is None else (width, (width,) * len(old.outputs))
    slots, pages, most = sizes
    new = RankPages(inputs, outputs, slots, pages, most * PAGE, dtype or old.A.dtype, device or old.A.device)
    writes = Writes()
    for piece in range(len(outputs)):
        names = old.names(piece)
        for slot, factors in old.factors(piece).items():
            pair = factors if width is None else widened(factors, width)
            new.put_slice(slot, piece, pair, writes, names.get(slot))
    writes.done()
    return new


def _size(module: Any) -> tuple[int, int]:
    """(in, out) of a linear module, of one that processes share those of this process's part."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    if sharded(module.weight):
        out, inside = local(module.weight).shape
        return inside, out
    return module.in_features, module.out_features


def _watched(module: nn.Module) -> bool:
    """Whether somebody wants to see the module's own calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
