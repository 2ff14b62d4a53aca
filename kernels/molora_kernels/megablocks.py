"""The grouped product by MegaBlocks: its Triton kernels order and restore tokens around a grouped GEMM. Optional.

y[t] += sum over k of weights[t, k] * x[t] A_s^T B_s,  s = slots[t, k] >= 0

https://github.com/databricks/megablocks. Where its compiled part is missing, :func:`stand_ins` does in torch what is
needed of it. Nothing of MegaBlocks is imported before :func:`load`.
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import grouped_mm, pad

from molora_kernels.reference import Factors

ALIGN = 16  # ranks and widths are filled up to multiples of it: a grouped GEMM needs strides of 16 bytes
INSTALL = """MegaBlocks is not installed. Install it in two steps:
  1. pip install setuptools packaging triton
  2. pip install --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1"""
_COMPILED = "megablocks_ops"


@dataclass(frozen=True)
class FactorStack:
    """Factors of slots 0 to K - 1 as one tensor each, zeros where a slot has none; number K, all zeros, is no slot.

    A: [K + 1, D, R]. B: [K + 1, R, O]. D, R and O are filled up with zeros. outputs: O before that.
    """

    A: torch.Tensor
    B: torch.Tensor
    outputs: int


@dataclass(frozen=True)
class PairOrder:
    """The (token, column) pairs of a plan by slot, made once for a forward; K stands for none and comes last.

    pairs, slots: [T * S] int32, positions in the plan, and what stands there. ends: [K + 1] int32. columns: S.
    """

    pairs: torch.Tensor
    slots: torch.Tensor
    ends: torch.Tensor
    columns: int

    @cached_property
    def counts(self) -> torch.Tensor:
        """[K + 1] int64 on the host, which waits for the device: only the package ``grouped_gemm`` wants it so."""
        return self.ends.cpu().long().diff(prepend=torch.zeros(1, dtype=torch.int64))


def stand_ins() -> ModuleType:
    """Functions of ``megablocks_ops`` in torch: those that its permutations need. x is int16, int32 or int64.

    sort(x [N], end_bit, x_out [N], iota_out [N]): stable, by the lowest ``end_bit`` bits; values and their positions.
    histogram(x [N] or [M, N], bins): [bins] or [M, bins] int32; what lies outside is not counted.
    inclusive_cumsum, exclusive_cumsum(x [M, N], dim, out [M, N]).
    """

    def sort(x: torch.Tensor, end_bit: int, x_out: torch.Tensor, iota_out: torch.Tensor) -> None:
        whole = end_bit >= torch.iinfo(x.dtype).bits
        iota_out.copy_((x if whole else x & ((1 << end_bit) - 1)).argsort(stable=True))
        x_out.copy_(x[iota_out.long()])

    def histogram(x: torch.Tensor, bins: int) -> torch.Tensor:
        counts = torch.zeros(*x.shape[:-1], bins + 1, dtype=torch.int32, device=x.device)
        at = x.long().masked_fill((x < 0) | (x >= bins), bins)
        return counts.scatter_add_(-1, at, torch.ones_like(at, dtype=torch.int32))[..., :bins].contiguous()

    def inclusive_cumsum(x: torch.Tensor, dim: int, out: torch.Tensor) -> None:
        out.copy_(x.cumsum(dim))

    def exclusive_cumsum(x: torch.Tensor, dim: int, out: torch.Tensor) -> None:
        out.copy_(x.cumsum(dim) - x)

    module = ModuleType(_COMPILED, "Stand-ins in torch for the compiled part of MegaBlocks.")
    vars(module).update({f.__name__: f for f in (sort, histogram, inclusive_cumsum, exclusive_cumsum)})
    return module


@cache
def load() -> tuple[Any, Callable[..., torch.Tensor] | None]:
    """The module ``megablocks.ops``, over the stand-ins where its compiled part is missing, and ``gmm`` of the package
    ``grouped_gemm``, None where that is not installed.

    Raises:
        ImportError: it is not installed, and how to install it; or it cannot be imported, and why.
    """
    if any(find_spec(name) is None for name in ("megablocks", "stk", "triton")):
        raise ImportError(INSTALL)
    try:
        compiled = import_module(_COMPILED)
    except ImportError:
        compiled = stand_ins()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grouped GEMM not available")
            sys.modules[_COMPILED] = compiled
            ops, grouped = import_module("megablocks.ops"), import_module("megablocks.grouped_gemm_util")
    except ImportError as error:
        raise ImportError(f"MegaBlocks cannot be imported: {error}") from error
    finally:
        if compiled.__spec__ is None:
            del sys.modules[_COMPILED]  # MegaBlocks holds the stand-ins; nobody else is to find them
    if os.environ.get("TRITON_INTERPRET") == "1":
        for kernel in vars(import_module("megablocks.backend.kernels")).values():
            if hasattr(kernel, "configs"):
                kernel.configs = kernel.configs[:1]  # there is no GPU on which several could be timed
    return ops, grouped.ops.gmm if grouped.grouped_gemm_is_available() else None


def stack_factors(factors: Mapping[int, Factors]) -> FactorStack:
    """Factors by slot (at least one), of any ranks, as one stack; a gradient reaches them through it."""
    A, B = next(iter(factors.values()))
    K, R = max(factors) + 1, _up(max(len(pair.A) for pair in factors.values()))
    stack = FactorStack(A.new_zeros(K + 1, _up(A.shape[1]), R), B.new_zeros(K + 1, R, _up(B.shape[1])), B.shape[1])
    for slot, (A, B) in factors.items():
        stack.A[slot, : A.shape[1], : len(A)] = A.T
        stack.B[slot, : len(B), : B.shape[1]] = B
    return stack


def pair_order(slots: torch.Tensor, K: int) -> PairOrder:
    """Orders a plan of slots below K, by MegaBlocks' own sort, histogram and sum; nothing waits for the device.

    slots: [T, S] int32 or int64, -1 (or K and more) for none.
    """
    ops, _ = load()
    flat = slots.flatten().int()
    flat = flat.masked_fill((flat < 0) | (flat >= K), K)
    by_slot, pairs = ops.sort(flat, K.bit_length())
    return PairOrder(pairs, by_slot, ops.inclusive_cumsum(ops.histogram(flat, K + 1), 0), slots.shape[1])


def add_lora_megablocks(
    y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, stack: FactorStack, order: PairOrder
) -> torch.Tensor:
    """y[t] += sum over k of weights[t, k] * x[t] A_s^T B_s; in place where no gradient is needed.

    Gradients go to y, x, weights, and to ``stack.A`` and ``stack.B``. Products are made in the factors' dtype, also
    under autocast; a pair without an adapter costs its row of zeros.

    Args:
        y, x: [T, O] and [T, D], the base's output and its input, of any floating dtype.
        weights: [T, S] float32.
        stack: the adapters, in bfloat16, float16 or float32.
        order: of the plan's slots [T, S], for as many slots.

    Raises:
        ValueError: tensors that do not fit one another; nothing has changed.
    """
    _check(y, x, weights, stack, order)
    if not order.pairs.numel():
        return y
    ops, gmm = load()
    gmm = gmm if x.is_cuda and stack.A.dtype == torch.bfloat16 else None  # it is made for nothing else
    at = (order.pairs, order.slots)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.to(stack.A.dtype)
        rows = rows if rows.shape[1] == stack.A.shape[1] else pad(rows, (0, stack.A.shape[1] - rows.shape[1]))
        h = _product(ops.gather(rows.contiguous(), *at, order.ends, order.columns), stack.A, order, gmm)  # [P, R]
        # Here they and their gradient stay float32; MegaBlocks' scatter gives them one in the dtype of its rows.
        own = ops.gather(weights.reshape(-1, 1).contiguous(), *at, order.ends, 1)  # [P, 1]
        out = _product((h * own).to(h.dtype), stack.B, order, gmm)
        delta = ops.scatter(out, *at, None, order.ends, order.columns)[:, : stack.outputs].to(y.dtype)
    return y + delta if torch.is_grad_enabled() and (delta.requires_grad or y.requires_grad) else y.add_(delta)


def _product(
    rows: torch.Tensor, factors: torch.Tensor, order: PairOrder, gmm: Callable[..., torch.Tensor] | None
) -> torch.Tensor:
    """[P, M] from rows [P, N] in order of slot and factors [K + 1, N, M]."""
    return grouped_mm(rows, factors, offs=order.ends) if gmm is None else gmm(rows, factors, order.counts)


def _up(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _check(y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, stack: FactorStack, order: PairOrder) -> None:
    T, S = len(x), order.columns
    if x.dim() != 2 or _up(x.shape[1]) != stack.A.shape[1] or tuple(y.shape) != (T, stack.outputs):
        raise ValueError(f"x {list(x.shape)} and y {list(y.shape)} do not fit the adapters.")
    if tuple(weights.shape) != (T, S) or weights.dtype != torch.float32:
        raise ValueError(f"weights must be {[T, S]} float32.")
    if len(order.pairs) != T * S or len(order.ends) != len(stack.A):
        raise ValueError("The order is that of another plan, or for another number of slots.")
    if T * S * max(stack.A.shape[1], stack.B.shape[2]) >= 2**31:
        raise ValueError(f"{T * S} pairs are more than MegaBlocks' 32-bit addresses reach: take shorter batches.")
