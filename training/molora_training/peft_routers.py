"""The two ways of PEFT to choose among adapters by token, as contenders of a router that learns which domain it reads.

Arrow (arXiv 2405.11157) needs no training: in each module a token goes to the adapters whose strongest input direction
it has most of. X-LoRA (arXiv 2402.07148) runs the base twice: a classifier on its last hidden states, trained by
next-token loss, gives every adapter a weight in every module.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, XLoraConfig, create_arrow_model, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from molora.adapter import Adapter
from molora.checks import check_fits
from molora.errors import ConfigError
from molora_training.data import Batch, Encoded
from molora_training.soup import as_before, learn


class Logits:
    """Logits [B, T, vocabulary] of a batch by a PEFT model."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    def __call__(self, batch: Batch) -> Tensor:
        return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


@contextmanager
def arrow(base: Any, adapters: Mapping[str, Path], top_k: int = 2, seed: int = 0) -> Iterator[Logits]:
    """PEFT's Arrow over ``adapters``; ``base`` is as before afterwards.

    PEFT finds a direction by 15 power iterations from a random start (``seed``): where the two largest singular values
    are close, it is a mix of theirs.

    Raises:
        ConfigError: top_k out of range, or adapters that differ in ranks or modules. AdapterError: one does not fit.
    """
    loaded = _load(base, adapters)
    if not 1 <= top_k <= len(loaded):
        raise ConfigError(f"Arrow chooses 1 to {len(loaded)} of {len(loaded)} adapters, not {top_k}.")
    ranks = [{name: weights.rank for name, weights in adapter.modules.items()} for adapter in loaded.values()]
    for name, own in zip(loaded, ranks, strict=True):
        if own != ranks[0]:
            raise ConfigError(f"Arrow needs adapters of one rank on the same modules; {name} differs from the first.")
    # PEFT 0.21 puts Arrow on all modules that share the last part of their names with an adapted one, and its forward
    # fails in those that no adapter has ("stack expects a non-empty TensorList"): better said here.
    ends = {name.rpartition(".")[2] for name in ranks[0]}
    there = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in ends}
    if there != set(ranks[0]):
        raise ConfigError(f"Arrow needs adapters on all modules of a name; none is on {min(there - set(ranks[0]))}.")
    with as_before(base), _unloaded(base):
        config = ArrowConfig(top_k=top_k, rng_seed=seed)
        yield Logits(create_arrow_model(base, [str(folder) for folder in adapters.values()], config))


@contextmanager
def train_xlora(
    base: Any,
    adapters: Mapping[str, Path],
    rows: Sequence[Encoded],
    pad_id: int,
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    batch_tokens: int = 8192,
    seed: int = 0,
    depth: int = 1,
) -> Iterator[Logits]:
    """PEFT's X-LoRA over ``adapters`` with a classifier trained on ``rows``; ``base`` is as before afterwards.

    Args:
        base: the loaded base.
        adapters: name -> PEFT folder; ranks and modules may differ.
        rows: what the classifier is trained on.
        pad_id: token that fills up batches.
        steps: of training.
        learning_rate: the highest one.
        batch_tokens: padded tokens in one step.
        seed: of the classifier's start and of the order of ``rows``.
        depth: linear layers of the classifier.

    Raises:
        DataError: no rows. AdapterError: an adapter that does not fit. NonFiniteError: the loss is not finite.
    """
    _load(base, adapters)
    torch.manual_seed(seed)
    cached = base.config.use_cache
    try:
        base.config.use_cache = False  # X-LoRA refuses a base with a cache: it runs whole sequences
        with as_before(base), _unloaded(base):
            config = XLoraConfig(
                task_type="CAUSAL_LM", hidden_size=base.config.get_text_config().hidden_size, xlora_depth=depth,
                # PEFT 0.21 loads them as "0", "1" ... whatever their keys, and its forward has a KeyError for others.
                adapters={str(index): str(folder) for index, folder in enumerate(adapters.values())},
                layerwise_scalings=True,
            )  # fmt: skip
            logits = Logits(get_peft_model(base, config))
            classifier = logits.model.base_model.internal_xlora_classifier
            # PEFT gives it the base's dtype, and in bfloat16 small steps of training are rounded away. It calls
            # layers.forward, so that only hooks on what is in it run.
            classifier.float().layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            learn(
                logits, list(classifier.train().parameters()), rows, pad_id, base.device, steps=steps,
                learning_rate=learning_rate, batch_tokens=batch_tokens, seed=seed, name="X-LoRA",
            )  # fmt: skip
            classifier.eval()
            yield logits
    finally:
        base.config.use_cache = cached


def _load(base: Any, adapters: Mapping[str, Path]) -> dict[str, Adapter]:
    if not adapters:
        raise ConfigError("There is no adapter to choose: give one at least.")
    loaded = {name: Adapter.load(folder) for name, folder in adapters.items()}
    for name, adapter in loaded.items():
        check_fits(adapter, base, name, backend="torch")  # no kernel runs here
    return loaded


@contextmanager
def _unloaded(base: Any) -> Iterator[None]:
    """Afterwards ``base`` has no part of PEFT, also where PEFT failed before there was a model to be unloaded."""
    try:
        yield
    finally:
        for name, module in list(base.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(base.get_submodule(parent), child, module.get_base_layer())
        if hasattr(base, "peft_config"):
            del base.peft_config
