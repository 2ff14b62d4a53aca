"""What is learnt apart needs to be found: a new adapter's row of the router, or its key in a keyed layer.

So each edit may be an adapter of its own, frozen ever after; taking it away takes away all that it knew (the idea of
SoLA, arXiv 2603.11239; whether its key is made in this way was not checked).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel, Router
from molora.chat import render
from molora.errors import VersionError
from molora.key_file import kept
from molora.keys import LayerKeys
from molora.router import NEVER
from molora_training.continual.questions import MEAN, represented
from molora_training.continual.sketches import found
from molora_training.data import Encoded

EXAMPLES = 128  # conversations that a row is fitted to


@dataclass(frozen=True)
class NewRow:
    """router: with the row. taken: the share of the samples of the layer's other rows that are found no more."""

    router: Router
    taken: float


def new_row(
    model: Path, layer: str, name: str, adapter: Path, conversations: Sequence[Mapping[str, Any]], dtype: torch.dtype
) -> NewRow:
    """The router of a saved MoLoRA with a row for an adapter that it does not have, fitted to conversations.

    Raises:
        VersionError: as of :func:`check_samples`.
    """
    loaded = MoLoRAModel.from_pretrained(model, dtype=dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    before = check_samples(copy.deepcopy(loaded.router))
    texts = [render(loaded.tokenizer, list(row["messages"]), add_generation_prompt=False) for row in conversations]
    loaded.add_adapter(layer, name, adapter, examples=texts[:EXAMPLES])
    after = loaded.router
    assert isinstance(after, Router)
    return NewRow(after.cpu(), taken(before, after, layer))


def taken(before: Router, after: Router, layer: str) -> float:
    """The share of the samples of a layer's rows that are found no more."""
    parts = list[Any](before.parts)
    rows = [row for index, row in enumerate(before.rows) if row.partition("/")[0] == layer and _kept(parts, index)]
    shares = [(found(before, row), found(after, row)) for row in rows]
    return sum(was - now for was, now in shares) / max(1, len(shares))


def too_much_taken(taken: float, most: float) -> str:
    """Why what a new row or key takes from others may not serve; nothing if it may."""
    return f"it takes {taken:.1%} of what others are found by, which may be {most:.1%} at most" if taken > most else ""


@torch.no_grad()
def row_again(
    model: Path, layer: str, name: str, conversations: Sequence[Mapping[str, Any]], dtype: torch.dtype
) -> Router:
    """The router with an adapter's row as if it had been fitted to these conversations alone: nothing of others is left
    in it. Without any it is a row that is never chosen unless it is named."""
    loaded = MoLoRAModel.from_pretrained(model, dtype=dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    router = loaded.router
    assert isinstance(router, Router)
    own = router.rows.index(f"{layer}/{name}")
    for part in list[Any](router.parts):
        others = part.samples.rows != own
        part.samples.set(part.samples.features[others], part.samples.rows[others])
        part.output.weight[own], part.output.bias[own] = 0.0, NEVER
    texts = [render(loaded.tokenizer, list(row["messages"]), add_generation_prompt=False) for row in conversations]
    if texts:
        loaded.fit_row(layer, name, texts[:EXAMPLES])
    return router.cpu()


@dataclass(frozen=True)
class NewKey:
    """questions: [n, hidden], the key. found: the share of questions that were not learnt and find the adapter by it.
    taken: the share of the questions of the layer's other keys that find theirs no more."""

    questions: torch.Tensor
    found: float
    taken: float


def new_key(
    base: Any, others: Mapping[str, torch.Tensor], before: torch.Tensor | None, new: Sequence[Encoded],
    apart: Sequence[Encoded], batch_tokens: int,
) -> NewKey:  # fmt: skip
    """The key of an adapter that has learnt from new conversations.

    Args:
        base: without adapters.
        others: questions [n, hidden] of the layer's other adapters by name.
        before: those of the adapter itself, if it has a key.
        new: what it learnt from. apart: what it did not.
        batch_tokens: padded tokens in one forward.
    """
    asked, unseen = (represented(base, rows, 0, batch_tokens)[:, MEAN] for rows in (new, apart))
    questions = kept(asked if before is None else torch.cat([before, asked]))
    keys, own = LayerKeys(), ""  # which no adapter is called
    for name, theirs in others.items():
        keys.put(name, theirs)
    if before is not None:
        keys.put(own, before)
    was = [_own(keys, name, theirs) for name, theirs in others.items()]
    keys.put(own, questions)
    now = [_own(keys, name, theirs) for name, theirs in others.items()]
    return NewKey(questions, _own(keys, own, unseen), (sum(was) - sum(now)) / max(1, len(others)))


def _own(keys: LayerKeys, name: str, questions: torch.Tensor) -> float:
    """The share of questions that find the adapter of that name."""
    return keys.nearest(questions, list(keys.questions)).count(name) / len(questions)


def check_samples(router: Any) -> Router:
    """The router, if a row of it can be fitted.

    Raises:
        VersionError: it is not learned, or keeps no samples, against which a row is fitted: that could take over what
            belongs to others.
    """
    if not isinstance(router, Router) or not all(len(part.samples.rows) for part in list[Any](router.parts)):
        raise VersionError(
            "The router keeps no samples, so that a new row could take over others' text: `molora train router` makes "
            "one that does."
        )
    return router


def _kept(parts: Sequence[Any], index: int) -> bool:
    """Whether every part keeps samples of a row."""
    return all(bool((part.samples.rows == index).any()) for part in parts)
