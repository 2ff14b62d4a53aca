"""Time of one whole decode step on a GPU: router, memory, plan, adapters, all layers and the head, in one graph.

python -m benchmarks.step --batch 1 8 64 --adapters 8 64
The model has the shape of Qwen3-1.7B or 8B and random weights; adapters too, on all linear modules.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config, StaticCache

from molora import Router, RouterConfig, Stack, StackLayer
from molora.blueprint import blueprint
from molora.decode import DecodeStep
from molora.groups import AdapterGroup, siblings
from molora.routing import RoutingState
from molora.selection import candidates, resolve, router_rows
from molora.stack import SlotTable
from molora.step_routes import StepRoutes
from molora_kernels.pages import PAGE, RankPages

CONFIGS: dict[str, dict[str, int]] = {
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
READ_BYTES_A_MS = 3.0e9


def make_base(shape: str) -> Any:
    config = Qwen3Config(
        **CONFIGS[shape], num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=8192,
        tie_word_embeddings=shape == "1.7B", rope_theta=1e6,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
        torch.set_default_dtype(before)
    return base


def fill(base: Any, count: int, rank: int) -> dict[str, AdapterGroup]:
    """Random adapters of one rank on every linear module of every layer, straight into the pages."""
    groups: dict[str, AdapterGroup] = {}
    pages_each = -(-rank // PAGE)
    for name, module in base.named_modules():
        name = name.removesuffix(".base_layer")
        if not isinstance(module, torch.nn.Linear) or name == "lm_head" or name in groups:
            continue
        names = siblings(name)
        plain = [getattr(base.get_submodule(other), "base_layer", base.get_submodule(other)) for other in names]
        outputs = [linear.out_features for linear in plain]
        group = AdapterGroup(names, module.in_features, outputs, base.dtype, base.device)
        pages = RankPages(module.in_features, outputs, count, count * pages_each, rank, base.dtype, base.device)
        pages.A.normal_(0, module.in_features**-0.5)
        pages.B.normal_(0, 0.1 * rank**-0.5)
        pages.first.copy_(torch.arange(count, dtype=torch.int32).mul(pages_each).expand_as(pages.first))
        pages.count.fill_(pages_each)
        for runs in pages._runs:
            for slot in range(count):
                runs.take(slot, (slot * pages_each, pages_each))
        group.pages = pages
        for other in names:
            groups[other] = group
    return groups


def routing_of(base: Any, count: int, top: int) -> tuple[RoutingState, Any]:
    stack = Stack([StackLayer("domain", {f"a{i}": Path(f"a{i}") for i in range(count)}, top_k=top)])
    table = SlotTable()
    for label in stack.names:
        table.take(label)
    router = Router(RouterConfig(), router_rows(stack), base.config.hidden_size)
    router = router.to(base.device).eval().requires_grad_(False)
    for part in router._parts:  # tokens spread over the adapters, none to the null
        part.input.weight.normal_(0, 1.0)
        part.output.weight.normal_(0, 1.0)
        part.output.bias[-1] = -1e4
    state = RoutingState(base)
    state.layers = candidates(stack, table)
    state.set_router(router)
    return state, resolve({"domain": "auto"}, stack, state.layers, True)


class Timer:
    def __init__(self, repeats: int = 40) -> None:
        self.repeats = repeats

    def __call__(self, call: Any) -> float:
        """Median milliseconds."""
        times = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times[3:])


def prefill(base: Any, step: DecodeStep, context: int, same: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills the step's cache with ``context`` random tokens for each sequence; returns them and a next one."""
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(0, 150000, (step.batch, context + 1), generator=generator, device="cuda")
    step.cache.reset()
    for layer in step.cache.layers:
        layer.length = 0
    for first in range(0, step.batch, 8):  # a few sequences at a time: logits are large
        part = ids[first : first + 8, :-1]
        cache = DynamicCache(config=base.config)
        base(part, past_key_values=cache, logits_to_keep=1)
        for index, layer in enumerate(cache.layers):
            step.cache.memory[index, 0, first : first + len(part), :, :context] = layer.keys
            step.cache.memory[index, 1, first : first + len(part), :, :context] = layer.values
    for layer in step.cache.layers:
        layer.length = context
    start(step, context)
    return ids[:, :-1], ids[:, -1]


def start(step: DecodeStep, context: int) -> None:
    for layer in step.cache.layers:
        layer.length = context
    seen = torch.ones(step.batch, context, dtype=torch.bool, device="cuda")
    step.start(seen, torch.full((step.batch,), context, device="cuda"))


@torch.no_grad()
def check(base: Any, exact: Any, step: DecodeStep, context: int) -> None:
    """The step without adapters is as near to the base in float32 as the base in bf16 is."""
    ids, following = prefill(base, step, context)
    found = step(following)[:4].float()
    whole = torch.cat([ids, following.unsqueeze(1)], 1)[:4]
    theirs = base(whole, logits_to_keep=1).logits[:, 0].float()
    expected = exact(whole, logits_to_keep=1).logits[:, 0].float()
    ours, peers = (float((logits - expected).norm() / expected.norm()) for logits in (found, theirs))
    print(f"relative error to float32: ours {ours:.4f}, the base in bf16 {peers:.4f}")
    if not ours < 1.2 * peers:
        sys.exit("The step is wrong. Nothing is printed.")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(CONFIGS), default="1.7B")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--peer", action="store_true", help="also the base by torch.compile (a minute a batch size)")
    parser.add_argument("--profile", action="store_true", help="where the time goes, kernel by kernel")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/step.json"))
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("No GPU is here: steps are only timed on one.")
    clock, base = Timer(), make_base(settings.shape)
    exact = copy.deepcopy(base).float()
    plan = blueprint(base)
    rows: list[dict[str, Any]] = []
    weights = sum(p.numel() for p in base.parameters() if p.data_ptr() != plan.embedding.data_ptr())
    weights += plan.head.numel() if plan.head.data_ptr() == plan.embedding.data_ptr() else 0
    for batch in settings.batch:
        cache = 2 * len(plan.layers) * batch * plan.kv_heads * plan.head_width * settings.context
        limit = (weights + cache) * 2 / READ_BYTES_A_MS
        nothing = RoutingState(base)
        step = DecodeStep(plan, {}, StepRoutes(nothing, batch, plan.device), batch, 1024)
        step.capture()
        check(base, exact, step, settings.context)
        graph = step.graph
        assert graph is not None
        start(step, settings.context)
        base_ms = clock(graph.replay)
        row: dict[str, Any] = {"shape": settings.shape, "batch": batch, "limit_ms": limit, "base_ms": base_ms}
        if settings.profile:
            profile(f"base, batch {batch}", graph)
        del step, graph
        if settings.peer:
            row["compiled_base_ms"] = compiled(base, batch, settings.context, clock)
        rows.append(row)
        save(settings.out, rows)
    for count in settings.adapters:
        groups = fill(base, count, settings.rank)
        for batch in settings.batch:
            for top in settings.top:
                state, selection = routing_of(base, count, top)
                routes = StepRoutes(state, batch, plan.device)
                routes.start(selection.expand(batch).to(plan.device), None)
                step = DecodeStep(plan, groups, routes, batch, 1024)
                step.capture()
                routes.start(selection.expand(batch).to(plan.device), None)
                step.ids.copy_(prefill(base, step, settings.context)[1])
                graph = step.graph
                assert graph is not None
                start(step, settings.context)
                routed = clock(graph.replay)
                slots = len(routes.plan(99)[0].unique())
                before = next(row for row in rows if row["batch"] == batch and "adapters" not in row)
                row = {"shape": settings.shape, "batch": batch, "adapters": count, "top": top, "rank": settings.rank,
                       "acting": slots, "routed_ms": routed, "added_ms": routed - before["base_ms"],
                       "route_us": route_us(routes, step, clock),
                       }  # fmt: skip
                rows.append(row)
                save(settings.out, rows)
                if settings.profile:
                    profile(f"{count} adapters, batch {batch}", graph)
                del step, graph, routes
        del groups


def route_us(routes: StepRoutes, step: DecodeStep, clock: Timer) -> float:
    """Router, memory and plan of a step: many in a row, since alone they would wait for the graph's start."""
    repeats = 20

    def call() -> None:
        for _ in range(repeats):
            routes.read_tokens(step.ids, step.pdl)

    return clock(captured(call).replay) * 1e3 / repeats


def save(out: Path, rows: list[dict[str, Any]]) -> None:
    """Writes what is measured so far, and prints the last row."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "seed": 0, "rows": rows}, indent=1))
    print(json.dumps(rows[-1]), flush=True)


def captured(call: Any) -> torch.cuda.CUDAGraph:
    """A graph of ``call``, which has run before."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def compiled(base: Any, batch: int, context: int, clock: Timer) -> float:
    """The base as transformers' users get it fastest: a static cache under torch.compile with CUDA graphs."""
    peer = copy.copy(base)
    torch._dynamo.reset()
    cache = StaticCache(config=base.config, max_cache_len=1024)
    prompt = torch.randint(0, 150000, (batch, context), device="cuda")
    base(prompt, past_key_values=cache, logits_to_keep=1)
    forward = torch.compile(peer.forward, mode="reduce-overhead", fullgraph=True)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    position = torch.full((batch, 1), context, device="cuda")
    mask = torch.zeros(batch, 1, 1, 1024, dtype=torch.bool, device="cuda")
    mask[..., : context + 1] = True

    def step() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
        step.call()

    def call() -> None:
        forward(input_ids=ids, past_key_values=cache, attention_mask=mask, position_ids=position, use_cache=True)

    step.call = call  # type: ignore[attr-defined]
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    for layer in cache.layers:
        layer.cumulative_length.fill_(context)
    torch.cuda.synchronize()
    return clock(call)


def profile(what: str, graph: torch.cuda.CUDAGraph) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    print(what)
    for event in sorted(trace.key_averages(), key=lambda e: -e.device_time_total)[:16]:
        print(f"  {event.device_time_total / 3 / 1e3:8.3f} ms  {event.count // 3:5} x  {event.key[:90]}")


if __name__ == "__main__":
    main()
