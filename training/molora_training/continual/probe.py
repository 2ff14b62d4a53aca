"""Held-out text, and where a router sends its tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel, Router
from molora.selection import router_rows
from molora.stack import AUTO
from molora_training.data import Encoded, Example, Split, encode_within, mix, read_examples
from molora_training.evaluate import batches
from molora_training.router_objective import reading_inputs
from molora_training.selections import KeptSelections

NONE_OF_THEM = -2


class Probe:
    """Text of single domains, and of several that take turns.

    Args:
        tokenizer: the base's.
        data: prepared data of ``domains``.
        single, mixed: how many conversations of each domain, and of several.
        max_length: tokens that a conversation may have.
        split: which part of the data.
    """

    def __init__(
        self, tokenizer: Any, data: Path, domains: Sequence[str], *, single: int, mixed: int, max_length: int,
        split: Split = "validation", batch_tokens: int = 8192,
    ) -> None:  # fmt: skip
        self.domains, self.batch_tokens = list(domains), batch_tokens
        rows: dict[str, Sequence[Example]] = {n: read_examples(data / f"{n}.{split}.jsonl") for n in domains}
        few: list[Any] = [one for some in rows.values() for one in some[:single]]
        if len(rows) > 1:
            few += mix(rows, split, mixed)
        self.rows: list[Encoded] = []
        owner = []
        for row in few:
            for encoded in encode_within([row], tokenizer, max_length, self.domains):
                self.rows.append(encoded)
                of = self.domains.index(row.domain) if isinstance(row, Example) else -1
                owner.append(torch.full((len(encoded.domain_ids),), of))
        self.labels, self.owner = torch.cat([row.domain_ids for row in self.rows]), torch.cat(owner)

    @torch.no_grad()
    def choices(self, model: MoLoRAModel) -> torch.Tensor:
        """[tokens] int64: the place among the domains of the adapter that each token goes to, above the last layer that
        the router reads; -2 for none of them. Nothing of the model above that layer is run."""
        router: Any = model.router
        assert isinstance(router, Router)
        layers = [layer for layer in model.stack.layers if layer.default == AUTO and layer.routed]
        selection = KeptSelections(model, {one.name: AUTO if one in layers else None for one in model.stack.layers})
        found: list[torch.Tensor] = [torch.empty(0, dtype=torch.int64)] * len(self.rows)
        part: Any = router.parts[-1]
        for indices, batch in batches(model, self.rows, self.batch_tokens):
            x = reading_inputs(model, batch, selection(len(batch.input_ids)))[-1]
            logits = part(part.features(part.read(x), batch.attention_mask.bool(), None))
            chosen = torch.full_like(batch.input_ids, NONE_OF_THEM)
            for layer in layers:  # a domain's adapter is in one of them
                names = [row for row in router_rows(model.stack) if row.partition("/")[0] == layer.name]
                at = torch.tensor([router.rows.index(name) for name in names], device=logits.device)
                to = [name.partition("/")[2] for name in names]
                place = [self.domains.index(name) if name in self.domains else NONE_OF_THEM for name in to]
                best = torch.tensor(place, device=logits.device)[logits[..., at].argmax(-1)]
                chosen = torch.maximum(chosen, best)
            for index, row in zip(indices, chosen.cpu(), strict=True):
                found[index] = row[: len(self.rows[index].input_ids)]
        return torch.cat(found)

    def right(self, choices: torch.Tensor, domain: str | None) -> float:
        """The share of the tokens of a domain alone, or of mixed text (None), that go to their own domain."""
        these = self.owner == (-1 if domain is None else self.domains.index(domain))
        return float((choices == self.labels)[these].float().mean()) if bool(these.any()) else 0.0
