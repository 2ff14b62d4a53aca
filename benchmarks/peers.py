"""A token's time beside PEFT on a GPU: X-LoRA, one ordinary LoRA, and ours, in one run.

    python -m benchmarks.peers
    TRITON_INTERPRET=1 python -m benchmarks.peers --device cpu --shape tiny --context 12   # does it run?

One sequence, all adapters of one rank on every linear module, written as PEFT folders with random weights.
- xlora: PEFT's X-LoRA mixes all of them. It has no cache: each token is two passes over the whole sequence. Its
  classifier is untrained, which takes the same time.
- peft: one LoRA in transformers with its cache, eager: a decode step alone, and a token of ``generate``.
- ours: the router chooses one adapter for each token; the captured decode step, and a token of ``generate``.
First, on a model of two layers in float32, one forced adapter has to give PEFT's logits, in a prompt and in a decode
step. The bar is X-LoRA's time over that of our step.
"""

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import DynamicCache

from benchmarks import common
from benchmarks.step import fill
from molora import MoLoRAModel, Stack, StackLayer
from molora.bench import _pace, _xlora
from molora.blueprint import blueprint
from molora.decode import DecodeStep
from molora.step_routes import StepRoutes

BAR = 100.0  # X-LoRA's token over our step
TOLERANCE = 1e-5  # of the logits' norm, float32


def write_adapter(base: Any, folder: Path, rank: int, seed: int) -> Path:
    """A PEFT folder: random A and B for every linear module but the head, in the dtype of ``base``."""
    generator = torch.Generator().manual_seed(seed)
    tensors, targets = {}, set()
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            A = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
            B = torch.randn(module.out_features, rank, generator=generator) * 0.1 * rank**-0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = A.to(base.dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = B.to(base.dtype)
            targets.add(name.rpartition(".")[2])
    LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(targets), task_type="CAUSAL_LM").save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def tokens_of(base: Any, count: int) -> torch.Tensor:
    """[1, count] random token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, base.config.vocab_size, (1, count), generator=generator).to(base.device)


@torch.no_grad()
def check(shape: str, rank: int, context: int, device: torch.device, folder: Path) -> float:
    """Stops unless a forced adapter's logits are PEFT's, through two layers in float32; the larger relative error."""
    base = common.random_base(shape, device, torch.float32, layers=2)
    adapter = write_adapter(base, folder / "exact", rank, 7)
    ids = tokens_of(base, context)
    model = MoLoRAModel.from_base(base, Stack([StackLayer("domain", {"one": adapter})]), backend="triton")
    forced = {"domain": "one"}
    prompt = model(ids, selection=forced, use_cache=False).logits
    plan = blueprint(base)
    step = DecodeStep(plan, model.adapted.groups, StepRoutes(model.routing, 1, plan.device), 1, 2 * context)
    step.capture()
    common.begin(step, model, ids[:, :-1], forced)
    decoded = step(ids[:, -1])
    theirs = PeftModel.from_pretrained(common.random_base(shape, device, torch.float32, layers=2), str(adapter))
    expected = theirs.eval()(ids, use_cache=False).logits
    error = max(common.relative_error(prompt, expected), common.relative_error(decoded, expected[:, -1]))
    print(f"one forced adapter and PEFT's logits, float32: relative error {error:.1e}")
    if not error < TOLERANCE:
        sys.exit("Ours is not PEFT. Nothing is printed.")
    return error


def generated_ms(generate: Any, ids: torch.Tensor, tokens: int) -> float:
    """Milliseconds of a token after the first in ``generate``, greedy: the median of three runs after a short one."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _pace(generate, inputs, 4)
    return 1e3 / sorted(_pace(generate, inputs, tokens) for _ in range(3))[1]


@torch.no_grad()
def eager_step_ms(model: Any, ids: torch.Tensor, clock: common.Clock) -> float:
    """Milliseconds of one forward of one token after the prompt, with a cache, and its argmax."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> None:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)
        cache.crop(-1)

    return clock(step)


@torch.no_grad()
def ours(base: Any, count: int, rank: int, ids: torch.Tensor, tokens: int, clock: common.Clock) -> dict[str, float]:
    """The routed step and a token of generate, and the same without any adapter."""
    context = ids.shape[1]
    torch.manual_seed(3)
    model = common.routed_model(base, fill(base, count, rank))
    plan = blueprint(base)
    found = {}
    for name, groups in (("ours_step_ms", model.adapted.groups), ("ours_step_without_adapters_ms", {})):
        step = DecodeStep(plan, groups, StepRoutes(model.routing, 1, plan.device), 1, context + 512)
        step.capture()
        common.begin(step, model, ids, None)
        step.ids.copy_(ids[:, -1])
        common.restart(step, context)
        found[name] = clock(step.graph.replay if step.graph is not None else step.run)
    found["ours_generate_ms"] = generated_ms(model.generate, ids, tokens)
    if ids.is_cuda and not common.took_steps(model):
        sys.exit("generate did not take the captured step. Nothing is printed.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_device(parser)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/peers.json"))
    settings = parser.parse_args()
    device = common.check_device(settings)
    dtype, clock = common.compute_dtype(device), common.Clock(device)
    few, many = (6, 64) if device.type == "cuda" else (3, 3)  # tokens of generate: of X-LoRA, of the others
    row: dict[str, Any] = {"shape": settings.shape, "batch": 1, "context": settings.context, "rank": settings.rank,
                           "adapters": settings.adapters}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        row["logits_error"] = check(settings.shape, settings.rank, settings.context, device, folder)
        base = common.random_base(settings.shape, device, dtype)
        ids = tokens_of(base, settings.context)
        adapters = [
            write_adapter(base, folder / str(index), settings.rank, index) for index in range(settings.adapters)
        ]
        row["base_step_ms"] = eager_step_ms(base, ids, clock)
        row |= ours(base, settings.adapters, settings.rank, ids, many, clock)
        del base
        gc.collect()
        one = PeftModel.from_pretrained(
            common.random_base(settings.shape, device, dtype), str(adapters[0]), autocast_adapter_dtype=False
        ).eval()
        row["peft_step_ms"] = eager_step_ms(one, ids, clock)
        row["peft_generate_ms"] = generated_ms(one.generate, ids, many)
        del one
        gc.collect()
        mixed = _xlora(common.random_base(settings.shape, device, dtype), adapters).to(device)
        row["xlora_ms"] = generated_ms(mixed.generate, ids, few)
    row["xlora_over_ours"] = row["xlora_ms"] / row["ours_step_ms"]
    row["xlora_over_ours_generate"] = row["xlora_ms"] / row["ours_generate_ms"]
    row["peft_over_ours"] = row["peft_step_ms"] / row["ours_step_ms"]
    row["bar"] = BAR
    common.save(settings.out, [row], device)
    held = "reached" if row["xlora_over_ours"] >= BAR else "missed"
    print(f"X-LoRA's token takes {row['xlora_over_ours']:.0f} times as long as our step (bar {BAR:.0f}: {held})")


if __name__ == "__main__":
    main()
