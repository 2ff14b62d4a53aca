"""Pace of greedy decoding: the bare base, MoLoRA with every layer on, and PEFT's X-LoRA, in one run on one machine."""

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from molora import MoLoRAModel
from molora.base import load_base
from molora.provenance import commit
from molora.selection import Choice
from molora.stack import AUTO

TOKENS = {"base": 64, "molora": 64, "xlora": 16}
REPEATS = {"base": 5, "molora": 5, "xlora": 3}
PROMPT = "A train travels 180 km in 3 hours. How far does it go in 5 hours, and how is that computed in Python?"


class _Clock(BaseStreamer):
    """Notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def measure_decode(folder: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Measures the three in turns (base, MoLoRA, X-LoRA, base, ...), after one run of each that does not count.

    The pace is that of decoding: tokens after the first over the time since the first, so without the prompt.

    Args:
        folder: a saved MoLoRA, or its Hub id.
        dtype: of the base's weights and all adapters.

    Returns:
        Plain values: the medians and every run in tokens/s, their ratios, what was compared and on what.

    Raises:
        StackError, RouterError, AdapterError, BaseModelError: as for ``MoLoRAModel.from_pretrained``.
    """
    device_map = "cuda" if torch.cuda.is_available() else None
    kind = getattr(torch, dtype)
    molora = MoLoRAModel.from_pretrained(folder, dtype=kind, device_map=device_map)
    selection = full_selection(molora)
    acting = _acting(molora, selection)
    bare, _ = load_base(str(molora.base_name), dtype=kind, device_map=device_map, progress=False)
    for_xlora, _ = load_base(str(molora.base_name), dtype=kind, device_map=device_map, progress=False)
    xlora = _xlora(for_xlora, [molora.adapters[label].path for label in acting])
    inputs = molora.encode([{"role": "user", "content": PROMPT}])
    generators: dict[str, Callable[..., Any]] = {
        "base": bare.generate,
        "molora": lambda **kwargs: molora.generate(selection=selection, **kwargs),
        "xlora": xlora.generate,
    }
    runs: dict[str, list[float]] = {name: [] for name in generators}
    for generate in generators.values():
        _pace(generate, inputs, 4)
    for turn in range(max(REPEATS.values())):
        for name, generate in generators.items():
            if turn < REPEATS[name]:
                runs[name].append(_pace(generate, inputs, TOKENS[name]))
    source = {"command": "molora bench decode --json", "commit": commit(), "date": datetime.date.today().isoformat()}
    pace = {name: statistics.median(values) for name, values in runs.items()}
    ratios = {
        "molora_to_base": round(pace["molora"] / pace["base"], 4),
        "xlora_to_base": round(pace["xlora"] / pace["base"], 4),
        "molora_to_xlora": round(pace["molora"] / pace["xlora"], 3),
    }
    return {
        **source,
        "seed": "none: greedy",
        "data": PROMPT,
        "must": [
            _must("tokens/s of MoLoRA over the base's", ratios["molora_to_base"], 0.7),
            _must("tokens/s of MoLoRA over X-LoRA's", ratios["molora_to_xlora"], 5),
        ],
        "tokens_per_second": {name: round(value, 3) for name, value in pace.items()},
        "runs": {name: [round(value, 3) for value in values] for name, values in runs.items()},
        "tokens": TOKENS,
        "ratios": ratios,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "batch": 1,
        "selection": selection,
        "adapters": acting,
        "note": f"X-LoRA writes {TOKENS['xlora']} tokens, the others {TOKENS['molora']}: it has no cache, so fewer "
        f"tokens are shorter sequences and favour it. Its gate is untrained, which costs the same time.",
        "base": molora.base_name,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": machine_name(),
    }


def _must(name: str, value: float, bar: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bar": bar, "better": "higher", "holds": value >= bar, "note": ""}


def full_selection(model: MoLoRAModel) -> dict[str, Choice]:
    """Every layer on: "auto" where the router decides by default, else the layer's first adapter."""
    selection: dict[str, Choice] = {}
    for layer in model.stack.layers:
        routed = layer.default == AUTO and model.router is not None
        selection[layer.name] = AUTO if routed else next(iter(layer.adapters), None)
    return selection


def machine_name() -> str:
    """The GPU, or the CPU's model."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _acting(model: MoLoRAModel, selection: dict[str, Choice]) -> list[str]:
    """ "layer/adapter" of all that may act under ``selection``: what X-LoRA mixes."""
    labels = []
    for layer in model.stack.layers:
        choice = selection[layer.name]
        names = list(layer.adapters) if choice == AUTO else [choice] if isinstance(choice, str) else []
        labels += [f"{layer.name}/{name}" for name in names]
    return labels


def _xlora(base: Any, folders: list[Path]) -> Any:
    """PEFT's X-LoRA over ``folders``. It wants no cache, and the numbers "0", "1", ... as names."""
    from peft import XLoraConfig, get_peft_model

    base.config.use_cache = False
    hidden = base.config.get_text_config().hidden_size
    adapters = {str(number): str(folder) for number, folder in enumerate(folders)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=hidden, adapters=adapters)
    return get_peft_model(base, config, autocast_adapter_dtype=False).eval()


def _pace(generate: Callable[..., Any], inputs: dict[str, torch.Tensor], tokens: int) -> float:
    """Tokens per second after the first of ``tokens`` greedy ones."""
    clock = _Clock()
    with torch.no_grad():
        generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, streamer=clock)
    times = clock.times[1:]  # the first put is the prompt
    return (len(times) - 1) / (times[-1] - times[0])
