"""A row of the router for an adapter that comes later, fitted beside the rows that are there."""

from typing import Any

import torch
from torch import nn

STEPS = 100
DECAY = 1e-3  # of the new row's squared length, over that of the others
MOST = 4096  # examples' tokens that are looked at


class Samples(nn.Module):
    """A few features of the training text of every row, kept with the router: what a new row must not take over.

    features: [N, hidden] float16. rows: [N] int64, the router's row that each belongs to.
    """

    features: torch.Tensor
    rows: torch.Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.set(torch.zeros(0, hidden), torch.zeros(0, dtype=torch.int64))

    def set(self, features: torch.Tensor, rows: torch.Tensor) -> None:
        self.features, self.rows = nn.Buffer(features.half()), nn.Buffer(rows)

    def add(self, features: torch.Tensor, row: int) -> None:
        rows = torch.full((len(features),), row, device=self.rows.device)
        self.set(torch.cat([self.features, features.to(self.features)]), torch.cat([self.rows, rows]))

    def remove(self, row: int) -> None:
        """Drops a row's; those behind it move up by one."""
        kept = self.rows != row
        rows = self.rows[kept]
        self.set(self.features[kept], rows - (rows > row).long())

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, other: Any, errors: Any
    ) -> None:
        """Of whatever number they are; a router that was saved before there were any has none."""
        features = state.setdefault(prefix + "features", torch.zeros(0, self.hidden))
        rows = state.setdefault(prefix + "rows", torch.zeros(0, dtype=torch.int64))
        if features.dim() != 2 or features.shape[1] != self.hidden or rows.shape != features.shape[:1]:
            errors.append(f"samples {list(features.shape)} of rows {list(rows.shape)} are not of width {self.hidden}")
            return
        self.set(features.to(self.features.device), rows.long().to(self.rows.device))
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, other, errors)


def fit_row(
    q: torch.Tensor,
    features: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    usual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [hidden] and bias [] of a new row, by logistic regression; the other rows stay what they are.

    Args:
        q: [T, hidden] float32, features of the new adapter's examples.
        features: [N, hidden] float32, of the other rows' text.
        rows: [N] int64 below C, whose each one is.
        weight, bias: [C, hidden] and [C], the other rows.
        usual: [N, hidden], rows that are as long as this one may be expected to be; None: the other rows.
    """
    q = q[torch.randperm(len(q), generator=torch.Generator().manual_seed(0))[:MOST].to(q.device)]
    x = torch.cat([features, q])
    target = torch.cat([rows, rows.new_full((len(q),), len(weight))])
    share = torch.ones(len(x), device=x.device)
    share[len(features) :] = len(features) / len(rows.unique()) / len(q)  # the new row counts as one of the others
    own = weight.new_zeros(weight.shape[1] + 1).requires_grad_()  # the last: the bias
    length = (usual if usual is not None else weight).norm(dim=1).mean().clamp_min(1e-6)
    with torch.no_grad():
        others = nn.functional.linear(x, weight, bias)
    optimizer = torch.optim.LBFGS([own], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = torch.cat([others, (x @ own[:-1] + own[-1]).unsqueeze(1)], 1)
        each = nn.functional.cross_entropy(logits, target, reduction="none")
        found = (each * share).sum() / share.sum() + DECAY * (own[:-1] / length).square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    return own.detach()[:-1], own.detach()[-1]
