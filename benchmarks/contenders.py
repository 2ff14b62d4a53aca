"""Ways to add many adapters' products to a base GEMM's output, behind one interface: y [T, O] in place.

Ours, and what people use instead; each is prepared outside the timing. Those in EAGER wait for the device on the host,
so that no graph can hold them. PEFT's own LoRA serves one adapter at a time: it stands in benchmarks/peers.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from molora_kernels import Factors
from molora_kernels.megablocks import add_lora_megablocks, pair_order, stack_factors
from molora_kernels.order import PagedPlan
from molora_kernels.paged import add_lora_paged
from molora_kernels.pages import RankPages


@dataclass
class Problem:
    """One group of modules that share an input, its adapters, and the plan of T tokens."""

    x: torch.Tensor  # [T, D]
    y: torch.Tensor  # [T, O] the base's output
    outputs: tuple[int, ...]
    factors: list[Factors]  # by slot, A [slices x R, D] and B [slices x R, O], block diagonal in the slices
    slots: torch.Tensor  # [T, S] int64
    weights: torch.Tensor  # [T, S] float32
    pages: RankPages

    @property
    def rank(self) -> int:
        return self.factors[0].A.shape[0] // len(self.outputs)


def make_problem(
    T: int, D: int, outputs: tuple[int, ...], K: int, S: int, rank: int, popularity: str,
    dtype: torch.dtype, device: str, seed: int = 0,
) -> Problem:  # fmt: skip
    """Random inputs; ``popularity`` is uniform, zipf or identical."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    pages = RankPages(D, outputs, K, K * -(-rank // 16), rank, dtype, device)
    factors = []
    for slot in range(K):
        parts = [Factors(randn(rank, D) / D**0.5, randn(rank, wide) / rank**0.5) for wide in outputs]
        pages.put(slot, parts)
        factors.append(Factors(torch.cat([part.A for part in parts]), torch.block_diag(*(part.B for part in parts))))
    share = {
        "uniform": torch.ones(K, device=device),
        "zipf": 1 / torch.arange(1, K + 1, device=device),
        "identical": torch.full((K,), 1e-9, device=device).index_fill_(0, torch.arange(S, device=device), 1.0),
    }[popularity]
    slots = torch.multinomial(share.expand(T, -1), S, generator=generator)
    weights = torch.rand(T, S, generator=generator, device=device) + 0.5
    return Problem(randn(T, D), randn(T, sum(outputs)), outputs, factors, slots, weights, pages)


def exact(p: Problem) -> torch.Tensor:
    """In float64, a slot at a time: [T, O]."""
    y, x = p.y.double().clone(), p.x.double()
    for slot, (A, B) in enumerate(p.factors):
        weight = (p.weights.double() * (p.slots == slot)).sum(1, keepdim=True)
        if weight.any():
            y += weight * (x @ A.double().T @ B.double())
    return y


def ours_by_token(p: Problem) -> Callable[[], torch.Tensor]:
    return lambda: add_lora_paged(p.y, p.x, p.pages, p.slots, p.weights, by_token=True)


def ours_by_block(p: Problem) -> Callable[[], torch.Tensor]:
    """The blocks are made once a forward and shared by its modules, so they are timed apart."""
    blocks = PagedPlan(p.slots.int(), p.weights).blocks
    return lambda: add_lora_paged(p.y, p.x, p.pages, p.slots, p.weights, blocks, by_token=False)


def dense(p: Problem) -> Callable[[], torch.Tensor]:
    """All adapters by two GEMMs and a mask between them."""
    A, B = torch.cat([f.A for f in p.factors]), torch.cat([f.B for f in p.factors])
    T, K, R = len(p.x), len(p.factors), p.factors[0].A.shape[0]

    def run() -> torch.Tensor:
        gate = torch.zeros(T, K, device=p.x.device).scatter_add_(1, p.slots, p.weights).to(p.x.dtype)
        h = (p.x @ A.T).view(T, K, R) * gate.unsqueeze(2)
        return p.y.addmm_(h.view(T, K * R), B)

    return run


def grouped_mm(p: Problem) -> Callable[[], torch.Tensor]:
    """torch.nn.functional.grouped_mm over sorted pairs, gathered and scattered."""
    A = torch.stack([f.A.T for f in p.factors]).contiguous()  # [K, D, R]
    B = torch.stack([f.B for f in p.factors]).contiguous()  # [K, R, O]
    S, slots = p.slots.shape[1], torch.arange(len(p.factors), device=p.x.device)

    def run() -> torch.Tensor:
        ordered, pairs = p.slots.flatten().sort(stable=True)
        ends = torch.searchsorted(ordered, slots, right=True).int()
        token = pairs // S
        h = torch.nn.functional.grouped_mm(p.x[token], A, offs=ends)
        h = h * p.weights.flatten()[pairs].unsqueeze(1).to(h.dtype)
        return p.y.index_add_(0, token, torch.nn.functional.grouped_mm(h, B, offs=ends))

    return run


def torch_loop(p: Problem) -> Callable[[], torch.Tensor]:
    """As MixLoRA runs its experts: adapter after adapter, the tokens that chose it, two products, index_add. (X-LoRA
    loops too, over all tokens.) One loop for a group of modules, where they have one each."""

    def run() -> torch.Tensor:
        for slot, (A, B) in enumerate(p.factors):
            token, column = torch.where(p.slots == slot)  # the host waits for their number
            h = (p.x[token] @ A.T) * p.weights[token, column].unsqueeze(1).to(p.x.dtype)
            p.y.index_add_(0, token, h @ B)
        return p.y

    return run


def vllm(p: Problem) -> Callable[[], torch.Tensor]:
    """The kernels of an installed vLLM. They give a token one adapter, so each column of a plan is a call, and know no
    weights, which are multiplied in between. Their sort of the tokens is timed no more than ours."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    T, K, slices, rank = len(p.x), len(p.factors), len(p.outputs), p.rank
    A = [torch.stack([f.A.view(slices, rank, -1)[i] for f in p.factors]).contiguous() for i in range(slices)]
    B = []  # of each slice [K, O, R]
    for i, wide in enumerate(p.outputs):
        columns = slice(sum(p.outputs[:i]), sum(p.outputs[:i]) + wide)
        B.append(torch.stack([f.B[i * rank : (i + 1) * rank, columns].T for f in p.factors]).contiguous())
    h = torch.zeros(slices, T, rank, dtype=torch.float32, device=p.x.device)
    plans = []
    for column in p.slots.T:
        plan = LoRAKernelMeta.make(K, T, p.x.device)
        plan.prepare_tensors(column.contiguous().int())
        plans.append(plan.meta_args(T, False))

    def run() -> torch.Tensor:
        for plan, weights in zip(plans, p.weights.T, strict=True):
            lora_shrink(p.x, A, h, *plan, 1.0)
            h.mul_(weights.view(1, T, 1))
            lora_expand(h, B, p.y, *plan, offset_start=0, add_inputs=True)
        return p.y

    return run


def megablocks(p: Problem) -> Callable[[], torch.Tensor]:
    """MegaBlocks' permutations around a grouped GEMM; the order is made once a forward, and timed apart."""
    stack = stack_factors(dict(enumerate(p.factors)))
    order = pair_order(p.slots, len(p.factors))
    return lambda: add_lora_megablocks(p.y, p.x, p.weights, stack, order)


OPTIONAL = {"megablocks": megablocks, "vllm": vllm}  # taken where it is installed
CONTENDERS = {
    "ours, by token": ours_by_token,
    "ours, by block": ours_by_block,
    "dense": dense,
    "grouped_mm": grouped_mm,
    "torch loop": torch_loop,
}
EAGER = ("torch loop",)
