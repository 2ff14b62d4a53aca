"""The arithmetic alone: what the adapters of PEFT's folders add, and what it costs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from molora.adapter import Adapter
from molora.plan import RoutingPlan
from molora.vllm import wrapper_gpu
from molora.vllm.routed import Group, RoutedStack, Step
from molora.vllm.wrapper_cpu import SparseCPU
from molora_kernels.gated import add_gated
from tests.vllm.interpreted import Interpreted


def wrapper_of(kind: Any, tokens: torch.Tensor, rank: int) -> Any:
    """tokens: [T] int64, the slot of each, -1 for the base."""
    config = SimpleNamespace(max_lora_rank=rank, max_loras=7, specialize_active_lora=False)
    found = kind(64, max_batches=8, device=torch.device("cpu"), lora_config=config)
    found._token_lora_indices[: len(tokens)] = tokens
    found.is_prefill = False
    found.indices_len[0] = len(tokens)
    if isinstance(found, Interpreted):
        found.token_mapping_meta.prepare_tensors(tokens)
    return found


def add_sharded(wrapper: Any, y: torch.Tensor, x: torch.Tensor, A: Any, B: Any, widths: Any, workers: int) -> None:
    """As fully sharded LoRA does: each worker has its share of the ranks of A, and what they make of x is gathered."""
    share = A[0].shape[2] // workers
    made = []
    for worker in range(workers):
        with patch("molora.vllm.wrapper_cpu.get_tensor_model_parallel_rank", return_value=worker):
            h = torch.zeros(len(A), len(x), share)
            wrapper.add_shrink(h, x, tuple(a[:, :, worker * share : (worker + 1) * share] for a in A), 1.0)
            made.append(h)
    wrapper.add_expand(y, torch.cat(made, 2), B, widths, offset_start=0, add_input=True)


@pytest.mark.parametrize(
    "kind, workers", [(SparseCPU, 1), (SparseCPU, 4), (SparseCPU, 16), (Interpreted, 1), (Interpreted, 4)]
)
def test_every_token_gets_its_own_adapters(
    kind: Any, workers: int, folders: dict[str, Path], adapters: dict[str, Path]
) -> None:
    """Tokens of a stack at two places of the batch, of an ordinary adapter, and of the base; with 16 workers adapters
    begin and end within a worker's ranks and go over several workers'."""
    torch.manual_seed(0)
    names = ["law", "math", "code", "ada", "bob"]
    at = torch.tensor([[0, 1, 2], [6, 7, 8]])
    ordinary, base = [3, 4], [5, 9]
    slots = torch.tensor([[[1, -1, 2], [0, 1, -1], [-1, -1, -1]], [[4, 3, 1], [2, -1, -1], [1, 0, 4]]])
    weights = torch.rand(slots.shape)
    tokens = torch.full((10,), -1)
    tokens[at], tokens[ordinary] = 1, 0
    wrapper = wrapper_of(kind, tokens, 32)
    step = Step(None, torch.full((2,), -1), torch.zeros(2, 3, dtype=torch.int64))
    stack = RoutedStack(folders["averages"], torch.device("cpu"))
    wrapper.route(10, [(Group(stack, 1, at, step), RoutingPlan(slots, weights))])

    modules = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    tensors = load_file(folders["averages"] / "adapter_model.safetensors")
    widths = tuple(len(tensors[f"base_model.model.{module}.lora_B.weight"]) for module in modules)
    own = [Adapter.load(adapters[name]).modules for name in names]
    A = [torch.zeros(2, 1, 32, 64) for _ in modules]
    B = [torch.zeros(2, 1, width, 32) for width in widths]
    for index, module in enumerate(modules):
        A[index][1, 0, :16] = tensors[f"base_model.model.{module}.lora_A.weight"]
        B[index][1, 0, :, :16] = tensors[f"base_model.model.{module}.lora_B.weight"]
        A[index][0, 0, :5], B[index][0, 0, :, :5] = torch.randn(5, 64), torch.randn(widths[index], 5)

    x, before = torch.randn(10, 64), torch.randn(10, sum(widths))
    y = before.clone()
    if workers == 1:
        wrapper.add_lora_linear(y, x, tuple(A), tuple(B), 1.0, widths)
    else:
        add_sharded(wrapper, y, x, A, tuple(B), widths, workers)
    wanted = before.clone()
    for index, module in enumerate(modules):
        here = slice(sum(widths[:index]), sum(widths[: index + 1]))
        wanted[ordinary, here] += x[ordinary] @ A[index][0, 0].T @ B[index][0, 0].T
        for place in at.flatten().tolist():
            n, t = (at == place).nonzero()[0].tolist()
            for slot, weight in zip(slots[n, t].tolist(), weights[n, t].tolist(), strict=True):
                if slot >= 0 and module in own[slot]:
                    one = own[slot][module]
                    wanted[place, here] += weight * one.scale * (one.B @ (one.A @ x[place]))
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(y[base], before[base])


def cost(kind: Any, adapters: int) -> int:
    """Operations of a module for 6 tokens of which each has one of so many adapters of rank 4."""
    tokens, rank = torch.zeros(6, dtype=torch.int64), 4 * adapters
    columns = [slice(4 * k, 4 * k + 4) for k in range(adapters)]
    stack: Any = SimpleNamespace(columns=columns, owners=torch.arange(adapters).repeat_interleave(4))
    at = torch.arange(6).unsqueeze(0)
    group = Group(stack, 0, at, Step(None, torch.tensor([-1]), at))
    wrapper = wrapper_of(kind, tokens, rank)
    slots = torch.arange(6).view(1, 6, 1) % adapters
    wrapper.route(6, [(group, RoutingPlan(slots, torch.ones(slots.shape)))])
    factors = torch.randn(1, 1, rank, 64), torch.randn(1, 1, 48, rank)
    with FlopCounterMode(display=False) as counter:
        wrapper.add_lora_linear(torch.zeros(6, 48), torch.randn(6, 64), factors[:1], factors[1:], 1.0, (48,))
    return counter.get_total_flops()


def test_adapters_that_do_not_act_cost_nothing() -> None:
    one = 2 * 6 * 4 * (64 + 48)  # a token times a rank times inputs and outputs
    assert cost(SparseCPU, 2) == cost(SparseCPU, 8) == cost(SparseCPU, 64) == one


def test_without_loras_nothing_is_done_on_a_gpu() -> None:
    """vLLM says so beside metadata that it then leaves as they were."""
    wrapper = wrapper_of(Interpreted, torch.full((3,), -1), 32)
    y = torch.randn(3, 8)
    before = y.clone()
    wrapper.add_lora_linear(y, torch.randn(3, 16), (torch.randn(2, 1, 32, 16),), (torch.randn(2, 1, 8, 32),), 1.0, (8,))
    assert torch.equal(y, before)


def test_more_slices_than_the_kernels_take_are_all_multiplied() -> None:
    wrapper = wrapper_of(Interpreted, torch.tensor([0, -1, 0]), 32)
    with patch.object(PunicaWrapperCPU, "add_lora_linear") as theirs:
        wrapper.add_lora_linear(*torch.zeros(2, 3, 4), [0] * 4, [0] * 4, 1.0, (1, 1, 1, 1))
    assert theirs.call_count == 1


def test_a_compiled_model_goes_on_under_other_gates_and_with_more_tokens() -> None:
    wrapper = wrapper_of(Interpreted, torch.zeros(5, dtype=torch.int64), 32)
    A, B = torch.randn(1, 1, 32, 16), torch.randn(1, 1, 8, 32)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = x @ torch.ones(16, 8)
        wrapper.add_lora_linear(y, x, (A,), (B,), 1.0, (8,))
        return y

    # vLLM drops all guards: what was found once while tracing is taken to hold.
    dropped = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager", options=dropped)
    for tokens in (3, 5):
        wrapper.token_mapping_meta.prepare_tensors(torch.zeros(tokens, dtype=torch.int64))
        for first in (0, 16):
            stack: Any = SimpleNamespace(columns=[slice(first, first + 16)], owners=torch.ones(32, dtype=torch.int64))
            stack.owners[first : first + 16] = 0
            at = torch.arange(tokens).unsqueeze(0)
            group = Group(stack, 0, at, Step(None, torch.tensor([-1]), at))
            wrapper.route(tokens, [(group, RoutingPlan(torch.zeros_like(at)[..., None], torch.ones(1, tokens, 1)))])
            x = torch.randn(tokens, 16)
            wanted = x @ torch.ones(16, 8) + x @ A[0, 0, first : first + 16].T @ B[0, 0, :, first : first + 16].T
            torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_captured_graph_goes_on_with_other_requests() -> None:
    """It was captured with 8 tokens and is run with as many or fewer, from the addresses that it was given: what was of
    an earlier step stays in the rows that pad, and in gates and metadata beyond this step's. A step of the base alone
    may run it, too."""
    torch.manual_seed(0)
    wrapper = wrapper_of(Interpreted, torch.zeros(8, dtype=torch.int64), 32)
    x, y = torch.zeros(8, 16), torch.zeros(8, 8)
    A, B = torch.randn(7, 1, 32, 16), torch.randn(7, 1, 8, 32)
    with patch.object(wrapper_gpu, "add_gated") as launch:
        wrapper.add_lora_linear(y, x, (A,), (B,), 1.0, (8,))
    ((captured, options),) = [(call.args, call.kwargs) for call in launch.call_args_list]
    stack: Any = SimpleNamespace(owners=torch.arange(2).repeat_interleave(16))
    for lora in ([3, 3, 3, 3, 5, 5, -1, 3], [-1, 5, 3, 3], [3], [-1, -1], [5, 5, 3, 3, 3, 3, 3, 3], [3, -1, 5]):
        loras, tokens = torch.tensor(lora), len(lora)
        wrapper._token_lora_indices[:tokens] = loras  # where vLLM writes it; slot 3 has a stack, slot 5 an adapter
        wrapper.token_mapping_meta.prepare_tensors(loras)
        at = (loras == 3).nonzero().view(1, -1)
        slots, weights = torch.randint(-1, 2, (1, at.shape[1], 1)), torch.rand(1, at.shape[1], 1)
        group = Group(stack, 3, at, Step(None, torch.tensor([-1]), at))
        wrapper.route(tokens, [(group, RoutingPlan(slots, weights))] if at.numel() else [])
        x[:tokens], before = torch.randn(tokens, 16), torch.randn(8, 8)
        y.copy_(before)
        with patch.object(torch, "empty", lambda shape, **of: torch.full(shape, torch.nan, **of)):  # of a graph's pool
            add_gated(*captured, **options)
        gates = torch.zeros(tokens, 32)
        gates[loras == 5] = 1
        gates[loras == 3] = (stack.owners == slots[0]) * weights[0]
        for token, slot in enumerate(lora):
            before[token] += B[slot, 0] @ (gates[token] * (A[slot, 0] @ x[token]))
        torch.testing.assert_close(y, before, rtol=1e-4, atol=1e-4)
