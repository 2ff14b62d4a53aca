"""Time of a training step of the router on a GPU, over the base's own forward and backward.

    python -m benchmarks.train
    python -m benchmarks.train --profile                                       # where both spend their time
    TRITON_INTERPRET=1 python -m benchmarks.train --device cpu --shape tiny    # does it run?

- routed: the trainer's own objective (training/molora_training/router_objective.py), here the loss on next tokens
  alone, through the chosen adapters, which act at weight 1 with the gradient of their probability; forward and
  backward, with gradients to the router alone. The adapters are random, of one rank, on all linear modules.
- base: forward and backward of the activations. Weights are frozen, the gradient goes down to inputs_embeds.
The same loss code, attention and dtype in both, no gradient checkpointing, no optimizer step. Both run as the trainer
runs on a GPU, captured in a CUDA graph, which the ratio compares; and called anew ("eager"), which is the host's time.
Before anything is timed, a model of two layers is held against plain PyTorch in float32: the router's gradients must be
as near to it as those of plain PyTorch in the dtype of the timing are.
"""

import argparse
import copy
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.step import fill
from molora.layer import MoLoRALinear
from molora_training.attention import attend_causally
from molora_training.captured import CapturedSteps
from molora_training.data import IGNORED, Batch
from molora_training.router_objective import Labels, RouterObjective
from molora_training.router_settings import LossWeights

BAR = 1.35  # routed over base


def make_batch(sequences: int, tokens: int, domains: int, vocabulary: int, device: torch.device) -> Batch:
    """Random conversations without padding, each token an answer: [sequences, tokens]."""
    generator = torch.Generator(device).manual_seed(1)

    def draw(most: int) -> torch.Tensor:
        return torch.randint(0, most, (sequences, tokens), generator=generator, device=device)

    ids, one = draw(vocabulary), torch.ones(sequences, tokens, dtype=torch.int64, device=device)
    return Batch(ids, one, ids, one, draw(domains))


def make_objective(base: Any, groups: dict[str, Any]) -> RouterObjective:
    """The trainer's objective over ``base`` with the adapters in ``groups``."""
    model = common.routed_model(base, groups)
    labels = Labels(model, list(model.stack["domain"].adapters))
    weights = {layer: torch.ones(len(rows)) for layer, rows in labels.rows.items()}
    model.requires_grad_(False)
    assert model.router is not None
    model.router.requires_grad_(True)
    return RouterObjective(model.train(), labels, LossWeights(lm=1.0, label=0.0, balance=0.0, z=0.0), weights)


class BaseObjective(torch.nn.Module):
    """The base's loss on next tokens, as RouterObjective has it."""

    def __init__(self, base: Any, batch: Batch) -> None:
        super().__init__()
        self.base = base
        self.embeds = torch.nn.Parameter(base.get_input_embeddings()(batch.input_ids).detach())

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        logits = self.base(inputs_embeds=self.embeds, attention_mask=batch.attention_mask, use_cache=False).logits
        labels = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())}


def eager(objective: torch.nn.Module, batch: Batch) -> Callable[[], torch.Tensor]:
    """Forward and backward as they are called; gives the loss."""

    def step() -> torch.Tensor:
        for parameter in trained(objective):
            parameter.grad = None
        loss: torch.Tensor = objective(batch)["loss"]
        loss.backward()
        return loss.detach()

    return step


def captured(objective: torch.nn.Module, batch: Batch) -> Callable[[], Any]:
    """Forward and backward as the trainer runs them on a GPU; on a CPU as they are called."""
    if batch.input_ids.device.type != "cuda":
        return eager(objective, batch)
    steps = CapturedSteps(objective, trained(objective), batch.input_ids.numel())
    for _ in range(2):  # the second captures
        steps(batch)
    if not steps.able:
        sys.exit("The step was not captured.")
    return partial(steps, batch)


def trained(objective: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in objective.parameters() if parameter.requires_grad]


def check(shape: str, batch: Batch, count: int, rank: int, device: torch.device, dtype: torch.dtype) -> float:
    """Stops unless the router's gradients through two layers are right; gives their relative error to float32."""
    base = common.random_base(shape, device, dtype, layers=2)
    attend_causally(base, batch.input_ids.shape[1])
    torch.manual_seed(3)
    groups = fill(base, count, rank)
    plain, exact = copy.deepcopy(base), copy.deepcopy(base).float()
    found = _gradients(make_objective(base, groups), batch, captured)
    theirs = _gradients(_in_plain_torch(plain, groups), batch, eager)
    expected = _gradients(_in_plain_torch(exact, groups), batch, eager)
    ours, peers = common.relative_error(found, expected), common.relative_error(theirs, expected)
    print(f"router's gradients, relative error to float32: ours {ours:.2e}, plain torch in {dtype} {peers:.2e}")
    if not (float(expected.norm()) > 0 and ours < max(1.2 * peers, 1e-4)):
        sys.exit("The training step is wrong. Nothing is printed.")
    return ours


def _in_plain_torch(base: Any, groups: dict[str, Any]) -> RouterObjective:
    """The same without kernels: each module holds its adapters' factors in the dtype of ``base``."""
    objective = make_objective(base, groups)
    for module in base.modules():
        if isinstance(module, MoLoRALinear):
            assert module.group is not None
            factors = module.group.pages.factors(module.piece)
            module.factors = {slot: type(f)(*(t.to(base.dtype) for t in f)) for slot, f in factors.items()}
            module.group = None
    return objective


def _gradients(objective: RouterObjective, batch: Batch, how: Callable[..., Callable[[], Any]]) -> torch.Tensor:
    """All of the router's, in one vector."""
    how(objective, batch)()
    return torch.cat([p.grad.flatten() for p in trained(objective) if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_device(parser)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of each sequence")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--profile", action="store_true", help="where the time goes, kernel by kernel, of both")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/train.json"))
    settings = parser.parse_args()
    device = common.check_device(settings)
    if settings.shape == "tiny":
        settings.sequences, settings.tokens = min(settings.sequences, 2), min(settings.tokens, 40)
    dtype, clock = common.compute_dtype(device), common.Clock(device)
    base = common.random_base(settings.shape, device, dtype)
    vocabulary = base.config.vocab_size

    def batch_of(count: int) -> Batch:
        return make_batch(settings.sequences, settings.tokens, count, vocabulary, device)

    what = {"shape": settings.shape, "sequences": settings.sequences, "tokens": settings.tokens, "rank": settings.rank}
    rows: list[dict[str, Any]] = []
    attend_causally(base, settings.tokens)
    base_ms, base_eager_ms, base_peak = measure("base", BaseObjective(base, batch_of(1)), batch_of(1), clock, settings)
    print({"base_ms": base_ms, "base_eager_ms": base_eager_ms, "base_peak_gib": base_peak}, flush=True)
    for count in settings.adapters:
        error = check(settings.shape, batch_of(count), count, settings.rank, device, dtype)
        torch.manual_seed(3)
        objective = make_objective(base, fill(base, count, settings.rank))
        ms, eager_ms, top = measure(f"{count} adapters", objective, batch_of(count), clock, settings)
        measured = {"adapters": count, "base_ms": base_ms, "routed_ms": ms, "ratio": ms / base_ms, "bar": BAR}
        called = {"base_eager_ms": base_eager_ms, "routed_eager_ms": eager_ms}
        memory = {"base_peak_gib": base_peak, "routed_peak_gib": top}
        rows.append({**what, **measured, **called, **memory, "gradient_error": error})
        common.save(settings.out, rows, device)
        common.release(objective.model)
        del objective


def measure(
    what: str, objective: torch.nn.Module, batch: Batch, clock: common.Clock, settings: argparse.Namespace
) -> tuple[float, float, float | None]:
    """Milliseconds captured and called, and the GiB that the called step holds at most."""
    called = eager(objective, batch)
    eager_ms, top = clock(called), peak(called, batch.input_ids.device)
    step = captured(objective, batch)
    ms = clock(step)
    if settings.profile:
        common.profile(f"{what}, forward and backward", step, batch.input_ids.device)
    return ms, eager_ms, top


def peak(call: Callable[[], Any], device: torch.device) -> float | None:
    """GiB that are held at most during a call: weights, adapters and activations."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) / 2**30


if __name__ == "__main__":
    main()
