"""A router learns new rows and keeps the old, without the old ones' text: what it was is distilled on its samples.

A router keeps features of a few tokens of each row's training text (:data:`molora.router.SAMPLES`): 16-bit vectors of
isolated tokens, no text. They say nothing of how text goes on, so the memory and the MLP stay as they are, and so do
the rows of what has no text here; new rows learn not to take over what the samples say is others'.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from molora import Router
from molora.router import NEVER

EVERY = 4  # samples of a row, of which the last is kept from the training, to judge by


class Sketches:
    """Holds a router back while it is trained on the text of some of its rows.

    To the loss the Kullback-Leibler divergence from what the router said before is added, over the samples, so that a
    row that is held weighs as much as one that learns.

    Args:
        old: names of rows that have no text in the training.
        new: how many rows have.
        previous: the router as it was before rows were added; it is not changed.
    """

    def __init__(self, old: Sequence[str], new: int, previous: Router) -> None:
        self.old, self.previous = list(old), previous
        self.strength = len(self.old) / new

    def lacking(self, router: Router) -> list[str]:
        """Rows of ``old`` that some part keeps no samples of."""
        parts: list[Any] = list(router.parts)
        return [row for row in self.old if any(router.rows.index(row) not in part.samples.rows for part in parts)]

    def prepare(self, router: Router) -> None:
        """Before the first step: what stays is frozen, and what the previous router says is noted."""
        self._kept: list[tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        places = [router.rows.index(row) for row in self.old]
        layers = {row.partition("/")[0] for row in self.old}
        parts: list[Any] = list(router.parts)
        earlier: list[Any] = list(self.previous.to(parts[0].output.bias.device).parts)
        for part, previous in zip(parts, earlier, strict=True):
            for name, parameter in part.named_parameters():
                parameter.requires_grad_(name.startswith("output."))
            learns = torch.ones_like(part.output.bias)
            learns[places] = 0
            part.output.weight.register_hook(partial(torch.mul, learns[:, None]))
            part.output.bias.register_hook(partial(torch.mul, learns))
            features = _some(part, places, judged=False)
            peers = [index for index, row in enumerate(router.rows) if row.partition("/")[0] in layers]
            rows = torch.tensor(peers, device=features.device)
            said = torch.full((len(features), len(peers)), NEVER, device=features.device)
            with torch.no_grad():
                logits = previous.output(features)
            for place, index in enumerate(peers):
                if router.rows[index] in self.previous.rows:
                    said[:, place] = logits[:, self.previous.rows.index(router.rows[index])]
            self._kept.append((part, features, rows, said.log_softmax(-1)))

    def penalty(self) -> torch.Tensor:
        """KL(before || now) of the samples, a scalar: the mean over samples, summed over parts."""
        total = []
        for part, features, rows, before in self._kept:
            now = part.output(features)[:, rows].log_softmax(-1)
            total.append(nn.functional.kl_div(now, before, reduction="batchmean", log_target=True))
        return self.strength * torch.stack(total).sum()


@torch.no_grad()
def found(router: Router, row: str) -> float:
    """The share of a row's samples, of those that no training sees, that go to it rather than to another row of its
    layer; the mean over parts."""
    own = router.rows.index(row)
    peers = [index for index, name in enumerate(router.rows) if name.partition("/")[0] == row.partition("/")[0]]
    shares, parts = [], list[Any](router.parts)
    for part in parts:
        features = _some(part, [own], judged=True)
        logits = part.output(features)[:, peers]
        shares.append(float((logits.argmax(-1) == peers.index(own)).float().mean()))
    return sum(shares) / len(shares)


def _some(part: Any, rows: Sequence[int], judged: bool) -> torch.Tensor:
    """Features [n, hidden] float32 of the samples of ``rows``: those to judge by, or the others."""
    at = []
    for row in rows:
        mine = (part.samples.rows == row).nonzero()[:, 0]
        last = torch.arange(len(mine), device=mine.device) % EVERY == EVERY - 1
        at.append(mine[last if judged and len(mine) >= EVERY else ~last])
    features: torch.Tensor = part.samples.features[torch.cat(at)]
    return features.float()
