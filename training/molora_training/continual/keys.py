"""Which adapter a question belongs to, by keys that are not trained: a new one leaves the others' as they were.

The key of an adapter is the mean of its questions' representations; they are compared under the covariance within all
of them (linear discriminant analysis), of which sums are kept: tasks in any order come to the same, and no text is
kept. (One frozen adapter for each edit and a semantic key to it is the idea of SoLA, arXiv 2603.11239; how its key is
made was not checked. Class means under a shared covariance, added up over a stream, are streaming LDA, arXiv
1909.01520, not opened either.)
"""

from collections.abc import Sequence
from typing import Any

import torch

from molora_training.batches import plan_pass
from molora_training.data import IGNORED, Encoded, collate

READS = 4  # the decoder layer whose input stands for a question, as of the default router
MEAN, LAST = 0, 1  # the two that stand for it: what it is about, and what it asks for in the end
SHRINKS = 0.1  # of the covariance, towards a multiple of the identity


class Keys:
    """Keys to adapters, by name."""

    def __init__(self) -> None:
        self.means: dict[str, torch.Tensor] = {}
        self.scatter: torch.Tensor | None = None  # [d, d] float64, summed over questions
        self.count = 0

    def add(self, name: str, questions: torch.Tensor) -> None:
        """Of ``questions`` [n, d], their MEAN of :func:`represented`."""
        questions = questions.double().cpu()
        mean = questions.mean(0)
        apart = questions - mean
        self.means[name] = mean
        self.scatter = apart.T @ apart + (0 if self.scatter is None else self.scatter)
        self.count += len(questions)

    def remove(self, name: str) -> None:
        """Its questions go to others from now on."""
        del self.means[name]

    def nearest(self, questions: torch.Tensor) -> list[str]:
        """The adapter of each question [n, d]."""
        assert self.scatter is not None
        names, means = list(self.means), torch.stack(list(self.means.values()))
        covariance = self.scatter / self.count
        spread = covariance.diagonal().mean().clamp_min(1e-12)
        weights = torch.linalg.solve(covariance + SHRINKS * spread * torch.eye(len(covariance)), means.T).T
        scores = questions.double().cpu() @ weights.T - (weights * means).sum(1) / 2
        return [names[index] for index in scores.argmax(1).tolist()]

    @property
    def bytes(self) -> int:
        """What has to be kept, in float32."""
        scatter = 0 if self.scatter is None else self.scatter.numel()
        return 4 * (scatter + sum(mean.numel() for mean in self.means.values()))


@torch.no_grad()
def represented(base: Any, rows: Sequence[Encoded], pad_id: int, batch_tokens: int) -> torch.Tensor:
    """[rows, 2, hidden] float32: of what enters layer READS of ``base``, without adapters, the MEAN over the tokens
    before each conversation's first answer, and the LAST of them."""
    found = torch.empty(len(rows), 2, base.config.hidden_size)
    for indices in plan_pass([len(row.input_ids) for row in rows], batch_tokens):
        batch = collate([rows[index] for index in indices], pad_id).to(base.device)
        states = base(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, output_hidden_states=True,
            logits_to_keep=1,
        ).hidden_states  # fmt: skip
        states = states[min(READS, len(states) - 1)].float()
        asked = ((batch.labels != IGNORED).cumsum(1) == 0) & batch.attention_mask.bool()
        counts = asked.sum(1)
        found[indices, MEAN] = ((states * asked.unsqueeze(2)).sum(1) / counts.unsqueeze(1)).cpu()
        found[indices, LAST] = states[torch.arange(len(indices), device=states.device), counts - 1].cpu()
    return found
