"""Time of a whole prefill on a GPU, with and without adapters on every linear module, in one graph each: by
transformers' modules with the adapters in them (as any base runs), and by our own kernels (as the known bases run).

python -m benchmarks.prefill --tokens 2048 --adapters 8 64
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import CONFIGS, READ_BYTES_A_MS, Timer, captured, fill, make_base, profile, routing_of, save
from molora.blueprint import Blueprint, blueprint
from molora.layer import MoLoRALinear
from molora.plan import RoutingPlan
from molora.prompt import PromptPass
from molora.step_cache import StepCache

POPULARITY = ("uniform", "zipf", "identical")


class FixedPlan:
    """A plan that was made before: what it costs is timed apart."""

    def __init__(self) -> None:
        self.now: RoutingPlan | None = None
        self.kept: Any = slice(None)

    def plan(self, _: int) -> RoutingPlan | None:
        return self.now


def wrap(base: Any, groups: dict[str, Any], source: FixedPlan) -> None:
    for name, group in groups.items():
        parent, _, child = name.rpartition(".")
        owner = base.get_submodule(parent)
        module = getattr(owner, child)
        module = module.base_layer if isinstance(module, MoLoRALinear) else module
        setattr(owner, child, MoLoRALinear(module, source, 0, group, group.names.index(name)))


def make_plan(tokens: int, count: int, top: int, popularity: str) -> RoutingPlan:
    share = {
        "uniform": torch.ones(count, device="cuda"),
        "zipf": 1 / torch.arange(1, count + 1, device="cuda"),
        "identical": torch.full((count,), 1e-9, device="cuda").index_fill_(0, torch.arange(top, device="cuda"), 1.0),
    }[popularity]
    slots = torch.multinomial(share.expand(tokens, -1), top, generator=torch.Generator("cuda").manual_seed(0))
    return RoutingPlan(slots.unsqueeze(0), torch.rand(1, tokens, top, device="cuda") + 0.5)


def limit_ms(groups: dict[str, Any], plan: RoutingPlan, rank: int) -> float:
    """The bytes that adapters have to move, over the memory's pace: those that act, x, and y twice."""
    acting, tokens = len(plan.slots.unique()), plan.slots.shape[1]
    numbers = 0
    for group in {id(group): group for group in groups.values()}.values():
        inputs, outputs = group.pages.inputs, sum(group.pages.outputs)
        numbers += acting * rank * (len(group.pages.outputs) * inputs + outputs) + tokens * (inputs + 2 * outputs)
    return numbers * 2 / READ_BYTES_A_MS


class Pass:
    """A prompt by our own kernels, over a plan that was made before."""

    def __init__(self, base: Any, plan: Blueprint, tokens: int) -> None:
        self.base, self.plan, self.tokens = base, plan, tokens
        self.cache = StepCache(len(plan.layers), 1, plan.kv_heads, tokens, plan.head_width, plan.dtype, plan.device)
        self.rotary = plan.rotary(tokens)
        self.positions = torch.arange(tokens, device=plan.device).unsqueeze(0)

    def __call__(self, ids: torch.Tensor, groups: dict[str, Any], source: FixedPlan) -> torch.Tensor:
        self.cache.reset()
        read = PromptPass(self.plan, groups, self.rotary)
        return read(ids, self.positions, None, self.cache, source.plan)


@torch.no_grad()
def check(base: Any, ours: Pass, ids: torch.Tensor, groups: dict[str, Any], source: FixedPlan) -> None:
    """Both ways of a routed prompt give the same logits, as far as bf16 goes."""
    theirs = base(ids, use_cache=False, logits_to_keep=1).logits[:, 0].float()
    error = float((ours(ids, groups, source).float() - theirs).norm() / theirs.norm())
    print(f"relative difference between a prompt by modules and by our kernels: {error:.4f}")
    if not error < 0.1:
        sys.exit("A prompt is wrong. Nothing is printed.")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(CONFIGS), default="1.7B")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--popularity", nargs="+", default=["uniform"], choices=POPULARITY)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/prefill.json"))
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("No GPU is here: prefills are only timed on one.")
    clock, base, source = Timer(20), make_base(settings.shape), FixedPlan()
    plan = blueprint(base)
    rows: list[dict[str, Any]] = []
    for tokens in settings.tokens:
        ids = torch.randint(0, 150000, (1, tokens), device="cuda")
        ours = Pass(base, plan, tokens)

        def by_modules(ids: torch.Tensor = ids) -> None:
            base(ids, use_cache=False, logits_to_keep=1)

        def timed(what: str, call: Any) -> float:
            graph = captured(call)
            ms = clock(graph.replay)
            if settings.profile:
                profile(what, graph)
            return ms

        source.now = None
        row = {"shape": settings.shape, "tokens": tokens, "base_ms": timed("base by modules", by_modules)}
        row["our_base_ms"] = timed("base by our kernels", partial(ours, ids, {}, source))
        row["route_us"] = route_us(base, ids, clock)
        rows.append(row)
        save(settings.out, rows)
        base_ms, our_base_ms = row["base_ms"], row["our_base_ms"]
        for count in settings.adapters:
            groups = fill(base, count, settings.rank)
            wrap(base, groups, source)
            for top in settings.top:
                for popularity in settings.popularity:
                    source.now = make_plan(tokens, count, top, popularity)
                    source.now.paged.blocks  # noqa: B018 - made once a forward, timed apart
                    check(base, ours, ids, groups, source)
                    what = f"{count} adapters, {tokens} tokens, top {top}, {popularity}"
                    ms = timed(f"{what}, by our kernels", partial(ours, ids, groups, source))
                    modules_ms = timed(f"{what}, by modules", by_modules)
                    row = {"shape": settings.shape, "tokens": tokens, "adapters": count, "rank": settings.rank,
                           "top": top, "popularity": popularity, "base_ms": base_ms, "our_base_ms": our_base_ms,
                           "ms": ms, "added_ms": ms - our_base_ms, "modules_ms": modules_ms,
                           "modules_added_ms": modules_ms - base_ms,
                           "limit_ms": limit_ms(groups, source.now, settings.rank),
                           "over": ms / base_ms - 1, "added_over": (ms - our_base_ms) / base_ms,
                           "modules_over": modules_ms / base_ms - 1}  # fmt: skip
                    rows.append(row)
                    save(settings.out, rows)
        source.now = None


def route_us(base: Any, ids: torch.Tensor, clock: Timer) -> float:
    """Router, memory and plan of the prompt, the lists of its blocks among them."""
    state, selection = routing_of(base, 8, 1)
    inputs = {"input_ids": ids, "use_cache": False}
    state.selection = selection

    repeats = 4

    def call() -> None:
        for _ in range(repeats):
            state._before_base(base, (), dict(inputs))
            plan = state.plan(0)
            assert plan is not None
            plan.paged.blocks  # noqa: B018 - made when it is asked for

    return clock(captured(call).replay) * 1e3 / repeats


if __name__ == "__main__":
    main()
