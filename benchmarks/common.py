"""What the benchmarks of whole models share: a base of random weights, a clock, and rows saved as they are measured.

They run on a GPU. On a CPU they run through with the shape ``tiny``, to show mistakes; its times mean nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.prefill import wrap
from benchmarks.step import CONFIGS
from molora import MoLoRAModel, Router, RouterConfig, Stack, StackLayer
from molora.decode import DecodeStep
from molora.selection import router_rows

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = (*CONFIGS, "tiny")


def add_device(parser: argparse.ArgumentParser) -> None:
    """The options --shape and --device."""
    parser.add_argument("--shape", choices=SHAPES, default="1.7B", help="of the base: Qwen3's, or tiny for a CPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: runs through, times nothing")


def check_device(settings: argparse.Namespace) -> torch.device:
    """The device that was asked for; stops where there is none."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        sys.exit("No GPU is here. On a CPU try: TRITON_INTERPRET=1 ... --device cpu --shape tiny")
    if settings.device == "cpu" and settings.shape != "tiny":
        sys.exit("A CPU takes the shape tiny alone.")
    return torch.device(settings.device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16; float32 in Triton's interpreter, which gets half precision wrong."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_base(shape: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """A frozen Qwen3 of random weights from a fixed seed; ``layers``: instead of all of them."""
    sizes = dict(TINY if shape == "tiny" else CONFIGS[shape])
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    heads, width, vocabulary = (2, 16, 199) if shape == "tiny" else (8, 128, 151936)
    config = Qwen3Config(
        **sizes, num_key_value_heads=heads, head_dim=width, vocab_size=vocabulary, max_position_embeddings=8192,
        tie_word_embeddings=shape != "8B", rope_theta=1e6,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    return base.eval().requires_grad_(False)


def routed_model(base: Any, groups: dict[str, Any], top: int = 1) -> MoLoRAModel:
    """``base`` with the adapters in ``groups`` (of benchmarks.step.fill) as one layer of a stack, and a router of
    random weights that spreads tokens over all of them."""
    model = MoLoRAModel(base)
    names = [f"a{index}" for index in range(next(iter(groups.values())).pages.slots)]
    model.stack = Stack([StackLayer("domain", {name: Path(name) for name in names}, top_k=top, default="auto")])
    for label in model.stack.names:
        model.slots.take(label)
    wrap(base, groups, model.routing)
    model.adapted.groups.update(groups)
    model.set_router(random_router(model.stack, base))
    return model.eval()


def random_router(stack: Stack, base: Any) -> Router:
    """That spreads tokens over all adapters, by their ids."""
    torch.manual_seed(2)
    router = Router(RouterConfig(), router_rows(stack), base.config.hidden_size)
    with torch.no_grad():
        for part in router.parts:
            part.std.fill_(float(base.get_input_embeddings().weight.float().std()))
            part.input.weight.normal_(0, 0.1)
            part.output.weight.normal_(0, 1.0)
            part.output.bias[-1] = -1e4  # none to the null
    return router


def begin(step: DecodeStep, model: MoLoRAModel, ids: torch.Tensor, selection: Any = None) -> None:
    """Fills the step's cache with prompts [sequences, tokens] through the model, and takes over their routes."""
    with model.routing.active(lambda: model._resolve(selection)):
        step.cache.reset()
        model.base(ids, past_key_values=step.cache, logits_to_keep=1)
        resolved = model.routing.selection
        assert resolved is not None
        step.routes.start(resolved.expand(len(ids)).to(ids.device), getattr(step.cache, "routing_memories", None))
    restart(step, ids.shape[1])


def restart(step: DecodeStep, length: int) -> None:
    """Back to the end of the prompts."""
    for layer in step.cache.layers:
        layer.length = length
    device = step.ids.device
    seen = torch.ones(step.batch, length, dtype=torch.bool, device=device)
    step.start(seen, torch.full((step.batch,), length, device=device))


def took_steps(model: MoLoRAModel) -> bool:
    """Whether the last generation ran through its captured step (on a CPU none does)."""
    steps = list(model.steps._steps.values())
    return bool(steps) and int(steps[-1][1].length) > 0


def release(model: MoLoRAModel) -> None:
    """Takes the hooks off the base, which may get another stack."""
    for hook in model.routing._hooks:
        hook.remove()


class Clock:
    """Median milliseconds of a call: between CUDA events, on a CPU by the wall clock.

    Args:
        device: where the call works.
        repeats: how many are timed, after ``warm`` that are not.
    """

    def __init__(self, device: torch.device, repeats: int = 20, warm: int = 3) -> None:
        self.cuda = device.type == "cuda"
        self.repeats, self.warm = (repeats, warm) if self.cuda else (1, 0)

    def __call__(self, call: Callable[[], Any]) -> float:
        for _ in range(self.warm):
            call()
        return statistics.median(self._one(call) for _ in range(self.repeats))

    def _one(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (times mean nothing)"


def save(out: Path, rows: list[dict[str, Any]], device: torch.device, seed: int | str = 0) -> None:
    """Writes what is measured so far, and prints the last row."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"device": device_name(device), "seed": seed, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows[-1]), flush=True)


def profile(what: str, call: Callable[[], Any], device: torch.device, repeats: int = 3, lines: int = 24) -> None:
    """Where the time of a call goes: its kernels (on a CPU its operations), longest first, and their sum."""
    kinds = torch.profiler.ProfilerActivity
    cuda = device.type == "cuda"
    call()
    with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU]) as trace:
        for _ in range(repeats):
            call()
        if cuda:
            torch.cuda.synchronize()

    def spent(event: Any) -> float:
        return event.device_time_total if cuda else event.self_cpu_time_total

    events = sorted(trace.key_averages(), key=lambda event: -spent(event))
    total, count = sum(map(spent, events)) / repeats / 1e3, sum(event.count for event in events) // repeats
    print(f"{what}: {total:.3f} ms in {count} {'kernels' if cuda else 'operations'}")
    for event in events[:lines]:
        print(f"  {spent(event) / repeats / 1e3:8.3f} ms  {event.count // repeats:5} x  {event.key[:90]}")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
