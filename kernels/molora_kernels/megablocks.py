"""The grouped product by MegaBlocks: its Triton kernels order and restore tokens around a grouped GEMM. Optional.

    y[t] += sum over k of weights[t, k] * x[t] A_s^T B_s,  s = slots[t, k] >= 0

https://github.com/databricks/megablocks. Its wheel can lack the compiled part, ``megablocks_ops``; :func:`stand_ins`
does in torch what is needed of it. Nothing of MegaBlocks is imported before :func:`load`.
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
from typing import Any, NamedTuple

import torch
from torch.nn.functional import grouped_mm, pad

from molora_kernels.reference import Factors

ALIGN = 16  # ranks and widths are filled up to multiples of it: a grouped GEMM needs strides of 16 bytes
INSTALL = """MegaBlocks is not installed. Install it in two steps:
  1. pip install molora setuptools packaging
  2. pip install --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1"""
_COMPILED = "megablocks_ops"


class MegaBlocks(NamedTuple):
    """ops: the module ``megablocks.ops``. gmm: of the package ``grouped_gemm``, None where it is not installed."""

    ops: Any
    gmm: Callable[..., torch.Tensor] | None


@dataclass(frozen=True)
class FactorStack:
    """Factors of slots 0 to K - 1 as one tensor each, zeros where a slot has none; number K, all zeros, is no slot.

    A: [K + 1, D, R]. B: [K + 1, R, O]. D, R and O are filled up with zeros. outputs: O before that.
    """

    A: torch.Tensor
    B: torch.Tensor
    outputs: int

    @property
    def slots(self) -> int:
        """K."""
        return self.A.shape[0] - 1


@dataclass(frozen=True)
class PairOrder:
    """The (token, column) pairs of a plan by slot, made once for a forward; K stands for none and comes last.

    pairs: [T * S] int32, positions in the flattened plan. slots: [T * S] int32, of each. ends: [K + 1] int32, where
    each slot's pairs end. columns: S.
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
    """A module with those functions of ``megablocks_ops`` that :func:`add_lora_megablocks` needs, in torch.

    ``x`` is int16, int32 or int64, on any device. sort(x [N], end_bit, x_out [N], iota_out [N]): by the lowest
    ``end_bit`` bits, stable; values and their positions. histogram(x [N] or [M, N], bins): [bins] or [M, bins] int32,
    what lies outside is not counted. inclusive_cumsum and exclusive_cumsum(x [M, N], dim, out [M, N]).
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
    for function in (sort, histogram, inclusive_cumsum, exclusive_cumsum):
        setattr(module, function.__name__, function)
    return module


@cache
def load() -> MegaBlocks:
    """Imports MegaBlocks, with the stand-ins where its compiled part is missing.

    Raises:
        ImportError: it is not installed, and how to install it; or it cannot be imported, and why.
    """
    if any(find_spec(name) is None for name in ("megablocks", "stk", "triton")):
        raise ImportError(INSTALL)
    try:
        import_module(_COMPILED)
        missing = False
    except ImportError:
        missing = True
        sys.modules[_COMPILED] = stand_ins()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grouped GEMM not available")
            ops = import_module("megablocks.ops")
            grouped = import_module("megablocks.grouped_gemm_util")
    except ImportError as error:
        raise ImportError(f"MegaBlocks cannot be imported: {error}") from error
    finally:
        if missing:  # its modules hold the stand-ins; nobody else is to take them for the compiled part
            del sys.modules[_COMPILED]
    if os.environ.get("TRITON_INTERPRET") == "1":
        kernels = import_module("megablocks.backend.kernels")
        for name in ("_padded_copy", "_padded_copy_wgrad", "_binned_copy", "_binned_copy_wgrad"):
            kernel = getattr(kernels, name)
            kernel.configs = kernel.configs[:1]  # there is no GPU on which several could be timed
    return MegaBlocks(ops, grouped.ops.gmm if grouped.grouped_gemm_is_available() else None)


def stack_factors(factors: Mapping[int, Factors]) -> FactorStack:
    """Factors by slot (at least one), of any ranks, as one stack; a gradient reaches them through it."""
    A, B = next(iter(factors.values()))
    D, R, O = (_up(size) for size in (A.shape[1], max(len(pair.A) for pair in factors.values()), B.shape[1]))
    none = Factors(A.new_zeros(R, D), B.new_zeros(R, O))
    pairs = [
        Factors(*(pad(f, (0, width - f.shape[1], 0, R - len(f))) for f, width in zip(factors[slot], (D, O), strict=True)))
        if slot in factors
        else none
        for slot in range(max(factors) + 1)
    ]  # fmt: skip
    stacked = [torch.stack(list(side)) for side in zip(*pairs, none, strict=True)]
    return FactorStack(stacked[0].transpose(1, 2).contiguous(), stacked[1], B.shape[1])


def pair_order(slots: torch.Tensor, K: int) -> PairOrder:
    """Orders a plan of slots below K, by MegaBlocks' own sort, histogram and sum; nothing waits for the device.

    slots: [T, S] int32 or int64, -1 (or K and more) for none.
    """
    ops = load().ops
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
        y: [T, O], the base's output, of any floating dtype.
        x: [T, D], its input.
        weights: [T, S] float32.
        stack: the adapters, in bfloat16, float16 or float32.
        order: of the plan's slots, for ``stack.slots``.

    Returns:
        [T, O].

    Raises:
        ValueError: tensors of shapes or dtypes that do not fit; nothing has changed.
    """
    _check(y, x, weights, stack, order)
    if not order.pairs.numel():
        return y
    ops, gmm = load()
    if not (x.is_cuda and stack.A.dtype == torch.bfloat16):
        gmm = None  # made for nothing else
    at = (order.pairs, order.slots)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.to(stack.A.dtype)
        if rows.shape[1] < stack.A.shape[1]:
            rows = pad(rows, (0, stack.A.shape[1] - rows.shape[1]))
        h = _product(ops.gather(rows.contiguous(), *at, order.ends, order.columns), stack.A, order, gmm)  # [P, R]
        # Here they stay in float32, and so does their gradient; MegaBlocks' scatter returns one in the dtype of y.
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
    T, S, width = len(x), order.columns, max(stack.A.shape[1], stack.B.shape[2])
    if x.dim() != 2 or _up(x.shape[1]) != stack.A.shape[1] or tuple(y.shape) != (T, stack.outputs):
        raise ValueError(f"x {list(x.shape)} and y {list(y.shape)} do not fit the adapters.")
    if tuple(weights.shape) != (T, S) or weights.dtype != torch.float32 or len(order.pairs) != T * S:
        raise ValueError(f"weights must be {[T, S]} float32, for an order of as many pairs.")
    if len(order.ends) != stack.slots + 1:
        raise ValueError(f"The order is for {len(order.ends) - 1} slots, the stack has {stack.slots}.")
    if stack.A.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"The factors must be bfloat16, float16 or float32, not {stack.A.dtype}.")
    if T * S * width >= 2**31:
        raise ValueError(f"{T * S} pairs of width {width} are more than MegaBlocks' 32-bit addresses reach.")
