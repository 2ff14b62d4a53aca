"""The router: for each token, from its own causal past, logits over the stack's candidates."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from molora.errors import ConfigError, RouterError
from molora.memory import Memory, moving_averages

NEVER = -1e4
"""Bias of a row that was neither trained nor computed: "auto" does not choose it, forcing still works."""


@dataclass(frozen=True)
class RouterConfig:
    """What a router is made of.

    Args:
        reads: 0 (the embedding), a decoder layer m (the hidden state that enters it), or (0, m): the first router
            governs the layers below m, the second the others.
        weights: "unit" (the chosen adapters at weight 1) or "softmax" (top-k, renormalised over the chosen).
        width: dimensions to which the standardised input is projected.
        hidden: width of the MLP.
        decays: of the moving averages that are its memory; () for none.
        learn_decays: train them.
    """

    reads: int | tuple[int, ...] = 0
    weights: Literal["unit", "softmax"] = "unit"
    width: int = 128
    hidden: int = 256
    decays: tuple[float, ...] = (0.8, 0.95)
    learn_decays: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.reads, Sequence):
            object.__setattr__(self, "reads", tuple(self.reads))
        object.__setattr__(self, "decays", tuple(self.decays))
        points = self.points
        if list(points) != sorted(set(points)) or min(points) < 0 or not (len(points) == 1 or points[0] == 0):
            raise ConfigError(f"reads must be 0, a layer, or (0, layer), not {self.reads!r}.")
        if len(points) > 2:
            raise ConfigError(f"reads takes at most two points, not {self.reads!r}.")
        if self.weights not in ("unit", "softmax"):
            raise ConfigError(f"weights must be 'unit' or 'softmax', not {self.weights!r}.")
        if not all(0 < decay < 1 for decay in self.decays):
            raise ConfigError(f"decays must lie between 0 and 1, not {self.decays!r}.")
        if self.width < 1 or self.hidden < 1:
            raise ConfigError("width and hidden must be at least 1.")

    @property
    def points(self) -> tuple[int, ...]:
        return self.reads if isinstance(self.reads, tuple) else (self.reads,)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RouterConfig":
        known = {entry.name for entry in fields(cls)}
        if set(data) - known:
            unknown = ", ".join(sorted(set(data) - known))
            raise ConfigError(f"Unknown router setting {unknown}; known: {', '.join(sorted(known))}.")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


class RouterPart(nn.Module):
    """One two-layer MLP that reads at one point of the model.

    z = P (x - mean) / std;  u = [z, averages of z];  q = SiLU(W1 u + b1);  logits = W2 q + b2.
    """

    def __init__(self, config: RouterConfig, reads: int, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.reads = reads
        self.width = config.width
        self.mean = nn.Buffer(torch.zeros(hidden_size))
        self.std = nn.Buffer(torch.ones(hidden_size))
        self.project = nn.Linear(hidden_size, config.width, bias=False)
        self.decay_logits = nn.Parameter(torch.logit(torch.tensor(config.decays)), requires_grad=config.learn_decays)
        self.input = nn.Linear((1 + len(config.decays)) * config.width, config.hidden)
        self.output = nn.Linear(config.hidden, rows)
        self.table: torch.Tensor | None = None  # [vocabulary, width], folded projection of every embedding

    @property
    def decays(self) -> torch.Tensor:
        return torch.sigmoid(self.decay_logits)

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """z [batch, tokens, width] float32 of hidden states or embeddings [batch, tokens, hidden]."""
        return self.project((hidden.to(self.mean) - self.mean) / self.std)

    def read_ids(self, input_ids: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """z of token ids [batch, tokens], by the folded table outside training."""
        if self.training and torch.is_grad_enabled():
            return self.read(embedding(input_ids).detach())
        if self.table is None or self.table.device != input_ids.device:
            self.fold(embedding, input_ids.device)
        assert self.table is not None
        return nn.functional.embedding(input_ids, self.table)

    @torch.no_grad()
    def fold(self, embedding: nn.Module, device: torch.device) -> None:
        """Everything before the MLP is linear in the embedding: one row for each token id."""
        count = embedding.num_embeddings  # type: ignore[attr-defined]
        blocks = [self.read(embedding(ids)) for ids in torch.arange(count, device=device).split(8192)]
        self.table = torch.cat(blocks)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> "RouterPart":
        self.table = None  # what it folds may change
        return super().train(mode)

    def new_memory(self, batch: int) -> Memory:
        return Memory(batch, self.width, self.decays.detach())

    def features(self, z: torch.Tensor, real: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        """q [batch, tokens, hidden] of z [batch, tokens, width] and of ``memory`` (None: empty), which is advanced."""
        if memory is not None:
            averages = memory.append(z, real)
        else:
            start = z.new_zeros(z.shape[0], len(self.decay_logits), z.shape[2])
            averages = moving_averages(z, real, self.decays, start)[0]
        return nn.functional.silu(self.input(torch.cat([z.unsqueeze(2), averages], 2).flatten(2)))

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        """Logits [batch, tokens, rows] of q."""
        return self.output(q)


class Router(nn.Module):
    """The learned router of a stack: one :class:`RouterPart` for each point at which it reads.

    Args:
        config: its settings.
        rows: names of the rows of W2 (:func:`molora.selection.router_rows`).
        hidden_size: of the base.
    """

    def __init__(self, config: RouterConfig, rows: Sequence[str], hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.rows = list(rows)
        self.hidden_size = hidden_size
        self.parts = nn.ModuleList(RouterPart(config, reads, len(rows), hidden_size) for reads in config.points)

    @property
    def points(self) -> tuple[int, ...]:
        return self.config.points

    @property
    def weights(self) -> str:
        return self.config.weights

    def check(self, rows: Sequence[str], hidden_size: int, layers: int) -> None:
        """Checks that this router is one for the given candidates and base.

        Raises:
            RouterError: it is not.
        """
        if sorted(self.rows) != sorted(rows):
            raise RouterError(
                f"This router was saved for {', '.join(self.rows)}, and the stack has {', '.join(rows)}. "
                f"Use the stack it was trained for, or train a router with `molora train router`."
            )
        if self.hidden_size != hidden_size:
            raise RouterError(f"This router reads {self.hidden_size} features, and the base has {hidden_size}.")
        if max(self.points) >= layers:
            raise RouterError(f"This router reads at layer {max(self.points)}, and the base has {layers} layers.")

    @torch.no_grad()
    def add_row(self, name: str, examples: Sequence[torch.Tensor] | None = None) -> None:
        """Adds a row. Without ``examples`` "auto" never chooses it; with them it is computed without training.

        Args:
            name: the row's name.
            examples: for each part q [tokens, hidden] of the new adapter's own data. The row points along their mean,
                with the norm of the layer's other rows, and is biased to win on them by 1 on average.
        """
        layer = name.split("/")[0]
        peers = [i for i, row in enumerate(self.rows) if row.split("/")[0] == layer]
        for index, part in enumerate(self.parts):
            weight = part.output.weight.new_zeros(part.output.in_features)
            bias = part.output.bias.new_tensor(NEVER)
            if examples is not None:
                q = examples[index].to(weight)
                others = part.output(q)[:, peers].amax(1).mean() if peers else weight.new_zeros(())
                norm = part.output.weight[peers].norm(dim=1).mean() if peers else weight.new_ones(())
                weight = nn.functional.normalize(q.mean(0), dim=0) * norm
                bias = others - (q @ weight).mean() + 1
            self._set(part, torch.cat([part.output.weight, weight[None]]), torch.cat([part.output.bias, bias[None]]))
        self.rows.append(name)

    @torch.no_grad()
    def remove_row(self, name: str) -> None:
        keep = [i for i, row in enumerate(self.rows) if row != name]
        for part in self.parts:
            self._set(part, part.output.weight[keep], part.output.bias[keep])
        self.rows.remove(name)

    @staticmethod
    def _set(part: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
        part.output.out_features = len(bias)
        part.output.weight, part.output.bias = nn.Parameter(weight), nn.Parameter(bias)


class VocabularyPart(nn.Module):
    """Routes by token id alone: its z is the logits themselves."""

    reads = 0

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Buffer(table)  # [vocabulary, rows]

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        raise RouterError("A vocabulary router needs input_ids; inputs_embeds alone do not tell it the tokens.")

    def read_ids(self, input_ids: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        return nn.functional.embedding(input_ids, self.table)

    def new_memory(self, batch: int) -> Memory:
        return Memory(batch, self.table.shape[1], self.table.new_zeros(0))

    def features(self, z: torch.Tensor, real: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        if memory is not None:
            memory.append(z, real)
        return z

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return q


class VocabularyRouter(nn.Module):
    """The vocabulary routing of MoLoRA (arXiv 2603.15965): token ids or ranges of them -> adapter.

    Args:
        rules: "layer/adapter" -> list of ids and of [first, last] ranges (both included). Later rules win; tokens
            without a rule get no adapter.
        rows: as for :class:`Router`.
        vocabulary: number of token ids.
    """

    weights = "unit"
    points = (0,)

    def __init__(self, rules: Mapping[str, Iterable[Any]], rows: Sequence[str], vocabulary: int) -> None:
        super().__init__()
        self.rows = list(rows)
        self.rules = {name: list(spans) for name, spans in rules.items()}
        table = torch.zeros(vocabulary, len(self.rows))
        for name, spans in self.rules.items():
            if name not in self.rows:
                raise RouterError(f"A vocabulary rule names {name!r}; the stack has {', '.join(self.rows)}.")
            for span in spans:
                first, last = (span, span) if isinstance(span, int) else span
                if not 0 <= first <= last < vocabulary:
                    raise RouterError(f"The rule of {name!r} has {span!r}; token ids go from 0 to {vocabulary - 1}.")
                same_layer = [i for i, row in enumerate(self.rows) if row.split("/")[0] == name.split("/")[0]]
                table[first : last + 1, same_layer] = NEVER
                table[first : last + 1, self.rows.index(name)] = 0
        unruled = [i for i, row in enumerate(self.rows) if not row.endswith("/none")]
        for layer in {row.split("/")[0] for row in self.rows}:
            columns = [i for i, row in enumerate(self.rows) if row.split("/")[0] == layer]
            untouched = (table[:, columns] == 0).all(1)
            table[untouched.nonzero(), [i for i in columns if i in unruled]] = NEVER
        self.parts = nn.ModuleList([VocabularyPart(table)])

    def check(self, rows: Sequence[str], hidden_size: int, layers: int) -> None:
        if sorted(self.rows) != sorted(rows):
            raise RouterError(f"This router was made for {', '.join(self.rows)}; the stack has {', '.join(rows)}.")


def balance_loss(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Switch balance term (arXiv 2101.03961, eq. 4): C * sum_c f_c p_c, 1 when candidates share the tokens evenly.

    Args:
        logits: [batch, tokens, C] of one layer's candidates.
        real: [batch, tokens] bool, the tokens that count.
    """
    chosen = logits[real]
    share = nn.functional.one_hot(chosen.argmax(-1), chosen.shape[-1]).to(chosen.dtype).mean(0)
    return chosen.shape[-1] * (share * chosen.softmax(-1).mean(0)).sum()


def z_loss(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """ST-MoE z term (arXiv 2202.08906, eq. 5): mean of logsumexp(logits)^2 over the real tokens."""
    return logits[real].logsumexp(-1).square().mean()
