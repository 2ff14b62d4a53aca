"""What stands between a model's products: each function takes the product before it, adds the adapters' expand, and
does the base's own work on the result in the same pass, so that adapters cost no pass of their own over the output.

add_norm: residual and RMSNorm. heads: norm of q and k, rotary position, write to the cache. gate: SiLU(gate) * up.
The products come as parts of a sum. Few tokens are taken one by one (:mod:`molora_kernels.epilogue_token`), many in
blocks (:mod:`molora_kernels.epilogue_block`).

The scale of a norm is one number for each token, and products are linear: so it need not be known before the product
that follows. With a :class:`Scale`, add_norm writes residual * gain and parts of the sum of squares, from many programs
for each token, and gate and heads scale what the product made of it.
"""

from dataclasses import dataclass

import torch
import triton

from molora_kernels import epilogue_block as by_block
from molora_kernels import epilogue_token as by_token
from molora_kernels import forms
from molora_kernels.blocks import Blocks
from molora_kernels.pages import PageView


@dataclass
class Added:
    """What adapters add to a group's product: their shrink and the plan.

    h: of :func:`molora_kernels.shrink.shrink`, of ``shrink_hot`` or of :func:`molora_kernels.linear.linear`. slots:
    [T, S] int32. weights: [T, S] float32. blocks: of the plan, in its order; without them tokens are taken one by one.
    Of slots that have a core, h by block has gone through it.
    """

    h: torch.Tensor
    pages: PageView
    slots: torch.Tensor
    weights: torch.Tensor
    blocks: Blocks | None = None


@dataclass
class Scale:
    """The scale of a norm that the product before was made without: rsqrt(sum of squares / width + eps).

    squares: [T, parts or more] float32, of which the first T x parts numbers are the parts of the sums. parts: as many
    as the kernel that wrote them last made; None: all.
    """

    squares: torch.Tensor
    width: int
    eps: float
    parts: int | None = None

    @classmethod
    def of(cls, tokens: int, width: int, eps: float, dtype: torch.dtype, device: torch.device) -> "Scale | None":
        """For ``tokens`` tokens; None in float16, which residual * gain can leave."""
        if dtype == torch.float16:
            return None
        smallest = min(by_token.ADAPTED_COLUMNS, by_block.ADD_BLOCK)
        return cls(torch.empty(tokens, triton.cdiv(width, smallest), device=device), width, eps)


def add_norm(
    residual: torch.Tensor,
    y: torch.Tensor | None,
    gain: torch.Tensor,
    x: torch.Tensor,
    eps: float,
    added: Added | None = None,
    pdl: bool = False,
    scale: Scale | None = None,
) -> None:
    """residual += sum of y + adapters; x = RMSNorm(residual) * gain.

    Args:
        residual: [T, D], read and written.
        y: [parts, T, D], a sum; None: only the norm.
        gain: [D]. x: [T, D], written. eps: of the norm.
        added: what adapters add to y.
        pdl: launch as a programmatic dependent of the kernel before (Hopper), where tokens are taken one by one.
        scale: written, and x left without it.
    """
    if y is not None:
        given = (gain, x, scale) if scale is not None else None
        if _in_blocks(len(residual), added):
            by_block.add(residual, y, added, given)
        else:
            by_token.add(residual, y, added, given, pdl)
    if y is None or scale is None:
        by_token.norm(residual, gain, x, eps, pdl)


def heads(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    rotary: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    length: torch.Tensor,
    added: Added | None = None,
    pdl: bool = False,
    scale: Scale | None = None,
) -> None:
    """From the product of q, k and v: q to ``q``, k and v to their places in the cache.

    Args:
        y: [parts, N T, (H + 2 G) d], a sum. bias: [(H + 2 G) d].
        q: [N, T, H, d], written; in a decode step T is 1.
        keys, values: [N, G, longest, d] contiguous; T positions from its ``length`` on are written of each sequence,
            none where that is -1.
        norms: gains [d] of the norms of q and k, and their eps; None: there are none.
        rotary: cos and sin [positions, d / 2].
        positions: [N T] int64, the rotary position of each token. length: [N] int64.
        added: what adapters add to y.
        pdl: as for :func:`add_norm`.
        scale: of the product's input.

    Raises:
        ValueError: a length of another number of sequences.
    """
    if len(length) != len(q):
        raise ValueError(f"{len(length)} lengths for {len(q)} sequences.")
    if _in_blocks(y.shape[1], added):
        by_block.heads(y, bias, q, keys, values, norms, rotary, positions, length, added, scale)
    else:
        by_token.heads(y, bias, q, keys, values, norms, rotary, positions, length, added, pdl, scale)


def gate(
    y: torch.Tensor, m: torch.Tensor, added: Added | None = None, pdl: bool = False, scale: Scale | None = None
) -> None:
    """m [T, I] = SiLU(gate) * up, of y [parts, T, 2 I], a sum, and of what adapters add to it; the rest as for
    :func:`heads`."""
    if _in_blocks(len(m), added):
        by_block.gate(y, m, added, scale)
    else:
        by_token.gate(y, m, added, pdl, scale)


def _in_blocks(tokens: int, added: Added | None) -> bool:
    return not forms.by_token(tokens) and (added is None or added.blocks is not None)
