"""The simplest rivals of a router by token: one adapter for a whole conversation, or for each of its turns.

They read the base's hidden states of a question, without adapters, and averaged over its tokens: so the base runs once
more over each prompt than a router by token needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from molora import MoLoRAModel
from molora_training.data import IGNORED, Batch, Encoded
from molora_training.evaluate import batches

Scope = Literal["sequence", "turn"]


@torch.no_grad()
def questions(model: MoLoRAModel, batch: Batch) -> torch.Tensor:
    """[B, pairs, D] float32: of each pair's question the mean of the base's last hidden states; zeros where there is no
    such pair."""
    hidden = model.base(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False,
        logits_to_keep=1,
    ).hidden_states[-1].float()  # fmt: skip
    asked = batch.labels == IGNORED
    pairs = torch.arange(int(batch.segments.max()) + 1, device=hidden.device)
    own = ((batch.segments.unsqueeze(1) == pairs[:, None]) & asked.unsqueeze(1)).float()  # [B, pairs, T]
    return own @ hidden / own.sum(-1, keepdim=True).clamp(min=1)


class Rival(ABC):
    """Chooses one of ``domains`` for each question; :meth:`labels` says so for every token."""

    def __init__(self, model: MoLoRAModel, domains: Sequence[str], scope: Scope) -> None:
        self.model, self.domains, self.scope = model, list(domains), scope

    @abstractmethod
    def choose(self, features: torch.Tensor) -> torch.Tensor:
        """[..., D] to [...] int64, an index into the domains."""

    def labels(self, batch: Batch) -> Batch:
        """``batch`` with the choices in place of its domains: the first question's for the whole sequence, or each
        question's for its own pair."""
        chosen = self.choose(questions(self.model, batch))  # [B, pairs]
        if self.scope == "sequence":
            chosen = chosen[:, :1].expand_as(chosen)
        there = batch.segments >= 0
        return replace(batch, domain_ids=torch.where(there, chosen.gather(1, batch.segments.clamp(min=0)), -1))


class Centroids(Rival):
    """The domain whose questions' mean is nearest (cosine), of standardised features."""

    def __init__(self, model: MoLoRAModel, domains: Sequence[str], scope: Scope, train: "Features") -> None:
        super().__init__(model, domains, scope)
        self.mean, self.std = train.x.mean(0), train.x.std(0).clamp(min=1e-6)
        x = (train.x - self.mean) / self.std
        means = torch.stack([x[train.y == index].mean(0) for index in range(len(self.domains))])
        self.centroids = nn.functional.normalize(means, dim=-1)

    def choose(self, features: torch.Tensor) -> torch.Tensor:
        x = (features - self.mean) / self.std
        return (nn.functional.normalize(x, dim=-1) @ self.centroids.T).argmax(-1)


class Classifier(Rival):
    """Multinomial logistic regression on standardised features."""

    def __init__(
        self, model: MoLoRAModel, domains: Sequence[str], scope: Scope, train: "Features", steps: int = 300
    ) -> None:
        super().__init__(model, domains, scope)
        self.mean, self.std = train.x.mean(0), train.x.std(0).clamp(min=1e-6)
        x = (train.x - self.mean) / self.std
        self.weight = torch.zeros(len(self.domains), x.shape[1], device=x.device, requires_grad=True)
        self.bias = torch.zeros(len(self.domains), device=x.device, requires_grad=True)
        counts = torch.bincount(train.y, minlength=len(self.domains)).float()
        balance = counts.sum() / (len(self.domains) * counts.clamp(min=1))
        optimizer = torch.optim.AdamW([self.weight, self.bias], lr=1e-2, weight_decay=1e-2)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                nn.functional.cross_entropy(x @ self.weight.T + self.bias, train.y, balance).backward()
                optimizer.step()
        self.weight, self.bias = self.weight.detach(), self.bias.detach()

    def choose(self, features: torch.Tensor) -> torch.Tensor:
        return ((features - self.mean) / self.std @ self.weight.T + self.bias).argmax(-1)


class Features:
    """Questions of training examples: x [questions, D] float32 and y [questions] int64, their domains."""

    def __init__(self, model: MoLoRAModel, rows: Sequence[Encoded], batch_tokens: int = 8192) -> None:
        found: list[tuple[torch.Tensor, Any]] = []
        for _, batch in batches(model, rows, batch_tokens):
            features = questions(model, batch)
            for pair in range(features.shape[1]):
                own = batch.segments == pair
                here = own.any(1)
                first = own.int().argmax(1, keepdim=True)
                found.append((features[here, pair], batch.domain_ids.gather(1, first)[here, 0]))
        self.x, self.y = torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])
