"""Which adapter of a keyed layer a question belongs to, told by keys that are not trained: a new one leaves the others
as they were.

The key of an adapter is what the base alone makes of questions that are the adapter's own: of each the mean, over its
tokens, of what enters decoder layer READS. A question goes to the adapter whose questions' mean is nearest under the
covariance within all of them (linear discriminant analysis), as a whole: of the layer this adapter acts, in all
modules and at all tokens, until the next question. (One frozen adapter for each edit and a semantic key to it is the
idea of SoLA, arXiv 2603.11239; how its key is made was not checked.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from molora.errors import CacheError, SelectionError
from molora.key_file import kept
from molora.routing import decoder_layers, no_further
from molora.selection import Choice, Selection
from molora.stack import AUTO, Stack

READS = 4
SHRINKS = 0.1  # of the covariance, towards a multiple of the identity
IGNORED = -100  # a label that is none


@torch.no_grad()
def entering(base: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """[batch, tokens, hidden] of what enters decoder layer READS (the last one's input in a base that has fewer), which
    is as far as the base runs: without adapters, outside of a routed forward. inputs: of the base."""
    layers = decoder_layers(base)[1]
    layer = layers[min(READS, len(layers) - 1)]
    found: list[torch.Tensor] = []

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handle = layer.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with no_further(layer):
            base(**inputs, use_cache=False)
    finally:
        handle.remove()
    return found[0].float()


def asked(base: PreTrainedModel, question: torch.Tensor) -> torch.Tensor:
    """[hidden] float32 on the CPU: what a question is told by; of token ids [tokens] or embeddings [tokens, hidden]."""
    name = "inputs_embeds" if question.is_floating_point() else "input_ids"
    return entering(base, **{name: question.unsqueeze(0)})[0].mean(0).cpu()


class LayerKeys:
    """The keys of one layer's adapters. Which came first, and what was there and went, makes no difference."""

    def __init__(self) -> None:
        self.questions: dict[str, torch.Tensor] = {}
        self._made: tuple[list[str], torch.Tensor, torch.Tensor] | None = None

    def put(self, name: str, questions: torch.Tensor) -> None:
        """Of an adapter its questions [n, hidden]."""
        self.questions[name] = kept(questions)
        self._made = None

    def drop(self, name: str) -> None:
        self.questions.pop(name, None)
        self._made = None

    def nearest(self, asked: torch.Tensor, among: Sequence[str]) -> list[str]:
        """The adapter of each question [n, hidden] among those named, which have keys."""
        names, weights, bias = self._made = self._made or self._make()
        places = sorted(map(names.index, among))
        scores = asked.double().cpu() @ weights[places].T - bias[places]
        return [names[places[place]] for place in scores.argmax(1).tolist()]

    def _make(self) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """Names, and for each [hidden] weights and a bias, float64."""
        names = sorted(self.questions)
        own = [self.questions[name].double() for name in names]
        means = torch.stack([one.mean(0) for one in own])
        apart = torch.cat([one - mean for one, mean in zip(own, means, strict=True)])
        covariance = apart.T @ apart / len(apart)
        spread = covariance.diagonal().mean().clamp_min(1e-12)
        covariance.diagonal().add_(SHRINKS * spread)
        weights = torch.linalg.solve(covariance, means.T).T
        return names, weights, (weights * means).sum(1) / 2


class StackKeys:
    """The keys of a stack's keyed layers, and the choice by them."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.layers: dict[str, LayerKeys] = {}

    def put(self, layer: str, name: str, questions: torch.Tensor | None) -> None:
        if questions is not None:
            self.layers.setdefault(layer, LayerKeys()).put(name, questions)

    def drop(self, layer: str, name: str) -> None:
        if layer in self.layers:
            self.layers[layer].drop(name)

    def of(self, layer: str, name: str) -> torch.Tensor | None:
        """[n, hidden], an adapter's questions."""
        return self.layers[layer].questions.get(name) if layer in self.layers else None

    def choose(
        self, selection: Selection | Sequence[Selection] | None, stack: Stack, inputs: Mapping[str, Any]
    ) -> Selection | Sequence[Selection] | None:
        """``selection`` with an adapter's name wherever a keyed layer is left to its keys.

        Args:
            selection: as of a forward; what is no selection is left to :func:`molora.selection.resolve`.
            stack: whose layers these are.
            inputs: of the forward: input_ids or inputs_embeds, attention_mask [batch, tokens], labels. A question is
                what comes before the first label, and all of it where there are none.

        Raises:
            SelectionError: an adapter that is named has no key, or the selections do not fit the batch.
            CacheError: there is a cache already, so the question is not there.
        """
        layers = [layer for layer in stack.layers if layer.keyed]
        if not layers:
            return selection
        many: list[Any] = [selection] if selection is None or isinstance(selection, Mapping) else list(selection)
        many = [{} if one is None else one for one in many]
        if not many or not all(isinstance(one, Mapping) for one in many):
            return selection
        left: dict[tuple[int, str], list[str]] = {}
        for number, one in enumerate(many):
            for layer in layers:
                names = self._left(one.get(layer.name, layer.default), layer.name, layer.adapters)
                if names is not None:
                    left[number, layer.name] = names
        if not left:
            return selection
        source = inputs.get("input_ids")
        source = inputs.get("inputs_embeds") if source is None else source
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise CacheError(
                f"Layer {next(iter(left))[1]!r} is told by the whole question, of which a part is in the cache: name "
                f"the adapter that model.find(question) gives."
            )
        if source is None:
            return selection
        if len(source) % len(many):
            raise SelectionError(f"{len(many)} selections were given for a batch of {len(source)} sequences.")
        every = len(source) // len(many)
        chosen: list[dict[str, Choice]] = [dict(one) for one in many for _ in range(every)]
        told: dict[int, torch.Tensor] = {}
        for (number, name), names in left.items():
            for place in range(number * every, (number + 1) * every):
                if len(names) > 1 and place not in told:
                    told[place] = asked(self.base, _question(source[place], place, inputs))
                if len(names) > 1:
                    chosen[place][name] = self.layers[name].nearest(told[place].unsqueeze(0), names)[0]
                else:
                    chosen[place][name] = names[0] if names else None
        return chosen

    def _left(self, choice: Any, layer: str, adapters: Mapping[str, Any]) -> list[str] | None:
        """Among which adapters the keys are to choose; None: the choice says itself what acts."""
        keys = self.layers[layer].questions if layer in self.layers else {}
        if choice == AUTO:
            return [name for name in adapters if name in keys]
        if choice is None or isinstance(choice, str | Mapping) or not isinstance(choice, Sequence):
            return None
        for name in choice:
            if name in adapters and name not in keys:
                raise SelectionError(
                    f"Layer {layer!r}: {name!r} has no key, so no question can be told to be its own: name it alone."
                )
        return list(dict.fromkeys(choice)) if all(name in adapters for name in choice) else None


def _question(source: torch.Tensor, place: int, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The tokens [tokens] (or embeddings [tokens, hidden]) of a sequence of its question, without padding."""
    real = torch.ones(len(source), dtype=torch.bool, device=source.device)
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        real = mask[place, -len(source) :].bool().to(source.device)
    if labels is not None:
        before = ((labels[place] != IGNORED).cumsum(0) == 0).to(source.device) & real
        real = before if bool(before.any()) else real
    if not bool(real.any()):
        raise SelectionError("There is a sequence without any token: nothing tells which adapter it belongs to.")
    return source[real]
