"""LoRA Soups, the CAT merge (arXiv 2410.13025): adapters side by side, each weighed anew in every module, by learning.

Module l gets sum_i alpha_i^l scale_i B_i A_i. Only the alphas are trained, by next-token loss on the answers of a small
mixed set; what comes out is an ordinary PEFT adapter of the sum of the ranks.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora.adapter import Adapter
from molora.checks import check_fits
from molora.errors import ConfigError, DataError, NonFiniteError
from molora.factors import write_factors
from molora_training.attention import attend_causally
from molora_training.batches import plan_steps, rounded
from molora_training.captured import CapturedSteps
from molora_training.checkpoint import place_folder
from molora_training.data import IGNORED, Batch, Encoded, collate
from molora_training.schedule import warm_cosine

_WARMUP = 0.05


def train_soup(
    base: Any,
    adapters: Mapping[str, Path],
    rows: Sequence[Encoded],
    out: Path,
    pad_id: int,
    *,
    steps: int = 100,
    learning_rate: float = 1e-2,
    batch_tokens: int = 8192,
    seed: int = 0,
) -> Path:
    """Learns the alphas from 1/N on and writes the soup, a PEFT folder, to ``out``, whole or not at all; returns it.

    Args:
        base: the loaded base; it is as before afterwards.
        adapters: name -> PEFT folder; their ranks and modules may differ.
        rows: what the alphas are trained on.
        out: the folder; one that is there is replaced.
        pad_id: token that fills up batches.
        steps: 0 writes the plain mean of the adapters.
        learning_rate: the highest one; an alpha moves by about as much in a step.
        batch_tokens: padded tokens in one step.
        seed: of the order of ``rows``.

    Raises:
        ConfigError: fewer than two adapters. DataError: no rows. AdapterError: an adapter that does not fit the base.
        NonFiniteError: weights of an adapter or the loss are not finite.
    """
    if len(adapters) < 2:
        raise ConfigError(f"A soup needs two adapters or more, not {len(adapters)}.")
    loaded = [Adapter.load(folder) for folder in adapters.values()]
    for name, adapter in zip(adapters, loaded, strict=True):
        check_fits(adapter, base, name, backend="torch")  # no kernel runs here
    modules = list(dict.fromkeys(module for adapter in loaded for module in adapter.modules))
    alphas = nn.Parameter(torch.full((len(modules), len(loaded)), 1 / len(loaded), device=base.device))
    with as_before(base), _added(base, loaded, modules, alphas):
        longest = max((row.input_ids.numel() for row in rows), default=1)
        unmasked = attend_causally(base, rounded(longest))
        learn(
            lambda batch: base(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits,
            [alphas], rows, pad_id, base.device, steps=steps, learning_rate=learning_rate, batch_tokens=batch_tokens,
            seed=seed, captured=unmasked and base.device.type == "cuda", name="soup",
        )  # fmt: skip
    _write(loaded, modules, alphas.detach().double().cpu(), out)
    return out


def learn(
    logits: Callable[[Batch], Tensor],
    parameters: Sequence[nn.Parameter],
    rows: Sequence[Encoded],
    pad_id: int,
    device: torch.device,
    *,
    steps: int,
    learning_rate: float,
    batch_tokens: int,
    seed: int,
    captured: bool = False,
    name: str = "",
) -> None:
    """Trains what has few parameters by next-token loss on answers; ``captured``: by :class:`CapturedSteps`.

    Raises:
        DataError: steps without rows. NonFiniteError: the loss or its gradient is not finite.
    """
    if steps and not rows:
        raise DataError("There is nothing to learn from: give at least one conversation.")
    plan: list[list[int]] = []
    epochs = 1
    while len(plan) < steps:
        plan = plan_steps([row.input_ids.numel() for row in rows], batch_tokens, epochs, seed)
        epochs *= 2
    objective = _NextToken(logits)
    graphs = CapturedSteps(objective, parameters, batch_tokens) if captured else None
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    from tqdm.auto import tqdm

    for step in tqdm(range(steps), desc=name):
        batch = collate([rows[index] for index in plan[step]], pad_id).to(device)
        if graphs is not None:
            loss = graphs(batch)["loss"]
        else:
            optimizer.zero_grad(set_to_none=True)
            loss = objective(batch)["loss"]
            loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        found, size = torch.stack([loss.detach(), norm]).tolist()  # the one wait of a step for the device
        if not (math.isfinite(found) and math.isfinite(size)):
            raise NonFiniteError(
                f"The loss became {found} at step {step + 1} of {name}, its gradient {size}; nothing was written. "
                f"Take a lower learning_rate, and look for conversations without an answer."
            )
        for group in optimizer.param_groups:
            group["lr"] = warm_cosine(step, steps, _WARMUP, learning_rate)
        optimizer.step()


class _NextToken(nn.Module):
    """The mean next-token loss over the answers of a batch; without waiting for the device."""

    def __init__(self, logits: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        logits = self.logits(batch).flatten(0, 1).float()  # [B T, vocabulary]
        return {"loss": nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)}


@contextmanager
def as_before(base: Any) -> Iterator[None]:
    """Frozen and without dropout for a while; then what is trainable, modes and attention are as they were."""
    parameters = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    modes = [(module, module.training) for module in base.modules()]
    config = base.config.get_text_config()
    attention = config._attn_implementation
    base.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter, trainable in parameters:
            parameter.requires_grad_(trainable)
        for module, training in modes:
            module.training = training
        if config._attn_implementation != attention:
            base.set_attn_implementation(attention)


@contextmanager
def _added(base: Any, adapters: Sequence[Adapter], modules: Sequence[str], alphas: Tensor) -> Iterator[None]:
    """``base`` with the weighed adapters. By hooks: its modules stay where and what they are."""
    handles = []
    try:
        for index, name in enumerate(modules):
            A, B, owners = _factors(adapters, name)
            # A product, as the gradient of an indexing waits for the device or sums in no order.
            spread = nn.functional.one_hot(owners, len(adapters)).T.to(alphas)  # [N, R]
            own = partial(_add, A.to(base.device, base.dtype), B.to(base.device, base.dtype), alphas, index, spread)
            handles.append(base.get_submodule(name).register_forward_hook(own))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    A: Tensor, B: Tensor, alphas: Tensor, index: int, spread: Tensor, _: nn.Module, inputs: tuple[Tensor], y: Tensor
) -> Tensor:
    """y + B (alpha * A x), alpha being each rank's own adapter's."""
    z = nn.functional.linear(inputs[0], A) * (alphas[index] @ spread)  # [B, T, R] float32: alphas are not rounded
    return y + nn.functional.linear(z.to(B.dtype), B)


def _factors(adapters: Sequence[Adapter], module: str) -> tuple[Tensor, Tensor, Tensor]:
    """A [R, in] and B [out, R], scales in it, of all adapters of a module, float64; and each rank's adapter [R]."""
    own = [(index, adapter.modules[module]) for index, adapter in enumerate(adapters) if module in adapter.modules]
    A = torch.cat([weights.A.double() for _, weights in own])
    B = torch.cat([weights.B.double() * weights.scale for _, weights in own], 1)
    return A, B, torch.tensor([index for index, weights in own for _ in range(weights.rank)])


def _write(adapters: Sequence[Adapter], modules: Sequence[str], alphas: Tensor, out: Path) -> None:
    """Writes the PEFT folder; alphas [modules, N] float64."""
    factors = {}
    for name, alpha in zip(modules, alphas, strict=True):
        A, B, owners = _factors(adapters, name)
        factors[name] = A, B * alpha[owners]
    base_name = str(adapters[0].config.get("base_model_name_or_path") or "")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as draft:
        write_factors(Path(draft) / "soup", factors, base_name, dtype=torch.float32)
        place_folder(Path(draft) / "soup", out)
