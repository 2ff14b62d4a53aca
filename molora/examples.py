"""What an adapter that comes to a live stack is found by, computed from a few examples: its row of the router, or its
key in a keyed layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from molora.errors import SelectionError
from molora.keys import asked
from molora.router import Router
from molora.routing import decoder_layers, no_further
from molora.selection import Selection

if TYPE_CHECKING:
    from molora.model import MoLoRAModel


def encode_examples(model: "MoLoRAModel", texts: Sequence[str], questions: bool) -> list[dict[str, torch.Tensor]]:
    """Texts as they stand, for a row, or ``questions`` as people ask them, for a key.

    Raises:
        SelectionError: they are no texts, or there is no router to have a row.
    """
    if not questions and not isinstance(model.router, Router):
        raise SelectionError("examples need a learned router.")
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise SelectionError("examples must be a list of texts, at least one and none of them empty.")
    return [model.encode([{"role": "user", "content": text}] if questions else text) for text in texts]


def questions_of(model: "MoLoRAModel", encoded: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """[questions, hidden] float32, within the model's turn."""
    with model.routing.off():
        return torch.stack([asked(model.base, one["input_ids"][0]) for one in encoded])


def fit_row(model: "MoLoRAModel", row: str, encoded: Sequence[dict[str, torch.Tensor]]) -> None:
    """Fits a row of the router, within the model's turn."""
    router = model.router
    assert isinstance(router, Router)
    # Part after part: what a deeper one reads depends on what the first one chooses.
    for part in range(len(router.parts)):
        router.set_row(row, part, features_of(model, encoded, part))


@torch.no_grad()
def features_of(
    model: "MoLoRAModel", encoded: Sequence[dict[str, torch.Tensor]], part: int, choices: Selection | None = None
) -> torch.Tensor:
    """A part's features q [tokens, hidden] over texts, routed among ``choices`` (None: all adapters of routed layers)
    by the parts before it; the base is run no further than where the part reads."""
    if choices is None:
        routed: Any = {layer.name: list(layer.adapters) for layer in model.stack.layers if layer.routed}
        choices = routed | {layer.name: None for layer in model.stack.layers if layer.keyed}
    own: Any = model.router.parts[part]  # type: ignore[union-attr]
    found = []
    for inputs in encoded:
        if own.reads == 0:  # nothing of the base is run for it
            z = own.read_ids(inputs["input_ids"], model.base.get_input_embeddings())
            found.append(own.features(z, inputs["attention_mask"].bool(), None)[0])
            continue
        with model.routing.active(lambda: model._resolve(choices)):
            with no_further(decoder_layers(model.base)[1][own.reads]):
                model.base(**inputs, use_cache=False)
            q = model.routing.features[part]
            assert q is not None
            found.append(q[0])
    return torch.cat(found)
