"""The router: for each token, from its own causal past, logits over the stack's candidates."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from molora.errors import ConfigError, RouterError
from molora.gates import REACH, Gates
from molora.memory import Averages, Memory, Rule
from molora.row_fit import Samples, fit_row
from molora.stack import NONE

if TYPE_CHECKING:
    from molora_kernels.route import RouterWeights

NEVER = -1e4
"""Bias of a row that was neither trained nor computed: "auto" does not choose it, forcing still works."""

SAMPLES = 128
"""Tokens of each row's training text whose features a router keeps."""

UNITS, DEPTH = 128, 2


@dataclass(frozen=True)
class RouterConfig:
    """What a router is made of.

    Args:
        reads: 0 (the embedding), a decoder layer m (the hidden state that enters it), or (0, m): the first router
            governs the layers below m, the second the others.
        weights: "unit" (the chosen adapters at weight 1) or "softmax" (top-k, renormalised over the chosen).
        width: dimensions to which the standardised input is projected.
        hidden: width of the MLP.
        units: of each layer of its gated memory (:mod:`molora.gates`), 0 for none; by default 128, or 0 where
            ``decays`` are given.
        depth: layers of its gated memory.
        decays: of moving averages as its memory instead; () for none.
        learn_decays: train them.
    """

    reads: int | tuple[int, ...] = 0
    weights: Literal["unit", "softmax"] = "unit"
    width: int = 128
    hidden: int = 256
    units: int | None = None
    depth: int = DEPTH
    decays: tuple[float, ...] | None = None
    learn_decays: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.reads, list | tuple):
            object.__setattr__(self, "reads", tuple(self.reads))
        if self.units is None:
            object.__setattr__(self, "units", UNITS if self.decays is None else 0)
        object.__setattr__(self, "decays", tuple(self.decays or ()))
        points = self.points
        if not points or not all(isinstance(point, int) and not isinstance(point, bool) for point in points):
            raise ConfigError(f"reads must be 0, a layer, or (0, layer), not {self.reads!r}.")
        if list(points) != sorted(set(points)) or min(points) < 0 or not (len(points) == 1 or points[0] == 0):
            raise ConfigError(f"reads must be 0, a layer, or (0, layer), not {self.reads!r}.")
        if len(points) > 2:
            raise ConfigError(f"reads takes at most two points, not {self.reads!r}.")
        if self.weights not in ("unit", "softmax"):
            raise ConfigError(f"weights must be 'unit' or 'softmax', not {self.weights!r}.")
        if not all(isinstance(decay, int | float) and 0 < decay < 1 for decay in self.decays or ()):
            raise ConfigError(f"decays must lie between 0 and 1, not {self.decays!r}.")
        if not isinstance(self.units, int) or isinstance(self.units, bool) or self.units < 0:
            raise ConfigError(f"units must be a whole number from 0, not {self.units!r}.")
        if self.units and self.decays:
            raise ConfigError(f"A router's memory has units or decays, not both: {self.units} and {self.decays!r}.")
        if self.learn_decays and not self.decays:
            raise ConfigError("learn_decays asks for decays to start from.")
        sizes = (self.width, self.hidden, self.depth)
        if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes):
            raise ConfigError(
                f"width, hidden and depth must be whole numbers from 1, not {', '.join(map(repr, sizes))}."
            )

    @property
    def points(self) -> tuple[int, ...]:
        return self.reads if isinstance(self.reads, tuple) else (self.reads,)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RouterConfig":
        known = {entry.name for entry in fields(cls)}
        if set(data) - known:
            unknown = ", ".join(sorted(set(data) - known))
            raise ConfigError(f"Unknown router setting {unknown}; known: {', '.join(sorted(known))}.")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**values)


class Float32(nn.Module):
    """Stays in float32 when the model around it is cast: a route is a comparison of near numbers."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for tensor in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            tensor.data = tensor.data.float()
        return self


class _Linear32(nn.Linear, Float32):
    """A linear module that stays in float32."""


class RouterPart(Float32):
    """One two-layer MLP that reads at one point of the model.

    z = P (x - mean) / std;  u = [z, memory of z];  q = SiLU(W1 u + b1);  logits = W2 q + b2.
    """

    def __init__(self, config: RouterConfig, reads: int, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.reads = reads
        self.width = config.width
        self.mean = nn.Buffer(torch.zeros(hidden_size))
        self.std = nn.Buffer(torch.ones(hidden_size))
        self.project = _Linear32(hidden_size, config.width, bias=False)
        units, decays = config.units or 0, config.decays or ()
        self.decay_logits = nn.Parameter(torch.logit(torch.tensor(decays)), requires_grad=config.learn_decays)
        layers = range(config.depth if units else 0)
        self.gates = nn.ModuleList(_Linear32(REACH * config.width + units * bool(n), 2 * units) for n in layers)
        for layer in self.gates:  # from gates that forget half within 3 tokens to such that keep half over 70
            layer.bias.data[:units] = torch.linspace(-1.4, -4.6, units)  # type: ignore[operator]
        self.input = _Linear32((1 + len(decays)) * config.width + units * len(layers), config.hidden)
        self.output = _Linear32(config.hidden, rows)
        self.samples = Samples(config.hidden)
        self.table: torch.Tensor | None = None  # [vocabulary, width], folded projection of every embedding
        self._kept_decays: torch.Tensor | None = None  # [decays], as they are outside training
        self.register_load_state_dict_post_hook(lambda part, _: part._forget())

    @property
    def decays(self) -> torch.Tensor:
        return torch.sigmoid(self.decay_logits)

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """z [batch, tokens, width] float32 of hidden states or embeddings [batch, tokens, hidden]."""
        return self.project((hidden.to(self.mean) - self.mean) / self.std)

    def read_ids(self, input_ids: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """z of token ids [batch, tokens], by the folded table outside training."""
        if self.training:
            return self.read(embedding(input_ids).detach())
        return nn.functional.embedding(input_ids, self.folded(embedding, input_ids.device))

    def folded(self, embedding: nn.Module, device: torch.device) -> torch.Tensor:
        """The table, made where it is missing; not in training."""
        if self.table is None or self.table.device != device:
            self.fold(embedding, device)
        assert self.table is not None
        return self.table

    @torch.no_grad()
    def fold(self, embedding: nn.Module, device: torch.device) -> None:
        """Everything before the MLP is linear in the embedding: one row for each token id."""
        count = int(embedding.num_embeddings)  # type: ignore[arg-type]
        self.table = torch.cat([self.read(embedding(ids)) for ids in torch.arange(count, device=device).split(8192)])

    def train(self, mode: bool = True) -> "RouterPart":
        self._forget()
        return super().train(mode)

    def _forget(self) -> None:
        """What was computed from the weights is of no use: they may change."""
        self.table = self._kept_decays = None

    def signature(self) -> object:
        """What a memory must have been filled by to be gone on with."""
        gates = tuple(tuple(bias.tolist()) for _, bias in self._gates)
        return self.reads, self.width, tuple(self.decays.tolist()), gates

    @torch.no_grad()
    def fixed_decays(self) -> torch.Tensor:
        """[decays] without a gradient; outside training computed once."""
        if self.training:
            return self.decays
        if self._kept_decays is None or self._kept_decays.device != self.decay_logits.device:
            self._kept_decays = self.decays
        return self._kept_decays

    def for_kernels(self, table: torch.Tensor) -> "RouterWeights":
        """The part as the routing kernels read it, with z of token ids, or of tokens, in ``table``."""
        from molora_kernels.route import RouterWeights  # needs Triton

        mlp = (self.input.weight, self.input.bias, self.output.weight, self.output.bias)
        return RouterWeights(table, self.fixed_decays(), *mlp, self._gates)

    @property
    def _gates(self) -> tuple[tuple[Any, Any], ...]:
        return tuple((layer.weight, layer.bias) for layer in self.gates)

    def _rule(self, decays: torch.Tensor) -> Rule:
        return Gates(self._gates, self.width) if len(self.gates) else Averages(decays, self.width)

    def new_memory(self, batch: int, owner: object) -> Memory:
        return Memory(batch, self.width, self._rule(self.fixed_decays()), owner)

    def features(self, z: torch.Tensor, real: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        """q [batch, tokens, hidden] of z [batch, tokens, width] and of ``memory`` (None: empty), which is advanced."""
        if memory is not None:
            remembered = memory.append(z, real)
        else:
            rule = self._rule(self.decays)
            remembered = rule(z, real, rule.empty(len(z)))[0]
        return nn.functional.silu(self.input(torch.cat([z, remembered], 2)))

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

    @property
    def _parts(self) -> list[Any]:
        return list(self.parts)

    def check(self, rows: Sequence[str], hidden_size: int, layers: int, vocabulary: int) -> None:
        """Checks that this router is one for the given candidates and base.

        Raises:
            RouterError: it is not.
        """
        if sorted(self.rows) != sorted(rows):
            raise RouterError(
                f"This router was saved for {', '.join(self.rows)}, and the stack has {', '.join(rows)}. "
                f"Use the stack it was trained for, or train a router with `molora train router`."
            )
        places = torch.cat([part.samples.rows for part in self._parts])
        if bool(((places < 0) | (places >= len(self.rows))).any()):
            raise RouterError(f"This router keeps samples of rows that it does not have; it has {len(self.rows)}.")
        if self.hidden_size != hidden_size:
            raise RouterError(f"This router reads {self.hidden_size} features, and the base has {hidden_size}.")
        if max(self.points) >= layers:
            raise RouterError(f"This router reads at layer {max(self.points)}, and the base has {layers} layers.")

    @torch.no_grad()
    def add_row(self, name: str) -> None:
        """Adds a row that "auto" never chooses, until it is trained or :meth:`set_row` gives it weights."""
        for part in self._parts:
            weight, bias = part.output.weight, part.output.bias
            self._set(
                part,
                torch.cat([weight, weight.new_zeros(1, weight.shape[1])]),
                nn.functional.pad(bias, (0, 1), value=NEVER),
            )
        self.rows.append(name)

    def add_missing(self, rows: Sequence[str]) -> None:
        """Adds those of ``rows`` that it does not have, as :meth:`add_row` does."""
        for row in rows:
            if row not in self.rows:
                self.add_row(row)

    @torch.no_grad()
    def set_row(self, name: str, index: int, q: torch.Tensor) -> None:
        """Computes a row of one part from examples, without training the others.

        Where the router keeps samples of its training text, the row is fitted against them (:func:`fit_row`). Where it
        keeps none, it points along the mean of the examples' features, with the mean norm of the layer's other rows,
        and is biased to win on them by 1 on average: then it may well win on what belongs to others.

        Args:
            name: the row.
            index: of the part.
            q: [tokens, hidden], the part's features on the new adapter's own data.
        """
        layer, own = name.split("/")[0], self.rows.index(name)
        part = self._parts[index]
        weight, bias = part.output.weight, part.output.bias
        q = q.to(weight)
        if (null := f"{layer}/{NONE}") in self.rows:
            self._begin_null(part, self.rows.index(null))
        peers = [i for i, row in enumerate(self.rows) if row.split("/")[0] == layer and i != own]
        known = [i for i in peers if float(bias[i]) > NEVER / 2]
        place = torch.full((len(self.rows),), -1, device=weight.device)
        place[known] = torch.arange(len(known), device=weight.device)
        rows = place[part.samples.rows]
        if bool((rows >= 0).any()):
            features = part.samples.features[rows >= 0].to(weight)
            trained = weight[weight.norm(dim=1) > 0]  # a null that has only begun has no length
            usual = None if weight[known].any() or not len(trained) else trained
            weight[own], bias[own] = fit_row(q, features, rows[rows >= 0], weight[known], bias[known], usual)
            part.samples.add(q[torch.randperm(len(q), device=q.device)[:SAMPLES]], own)
            return
        norm = weight[known].norm(dim=1).mean() if known else weight.new_ones(())
        row = nn.functional.normalize(q.mean(0), dim=0) * norm.clamp_min(1e-3)
        others = part.output(q)[:, known].amax(1).mean() if known else weight.new_zeros(())
        weight[own] = row
        bias[own] = others - (q @ row).mean() + 1

    @staticmethod
    def _begin_null(part: Any, null: int) -> None:
        """Of a layer that came after the training: all that the router was trained on is its null's."""
        if float(part.output.bias[null]) > NEVER / 2:
            return
        part.output.weight[null], part.output.bias[null] = 0.0, 0.0
        chance = torch.Generator().manual_seed(0)
        some = torch.randperm(len(part.samples.features), generator=chance)[:SAMPLES]
        part.samples.add(part.samples.features[some.to(part.samples.features.device)], null)

    @torch.no_grad()
    def remove_row(self, name: str) -> None:
        own = self.rows.index(name)
        keep = [i for i in range(len(self.rows)) if i != own]
        for part in self._parts:
            self._set(part, part.output.weight[keep], part.output.bias[keep])
            part.samples.remove(own)
        self.rows.remove(name)

    @contextmanager
    def or_as_before(self) -> Iterator[None]:
        """What is done to rows within is undone after an error."""
        rows, parts = list(self.rows), self._parts
        outputs = [(part.output.weight.detach().clone(), part.output.bias.detach().clone()) for part in parts]
        samples = [(part.samples.features, part.samples.rows) for part in parts]  # these never change in place
        try:
            yield
        except BaseException:
            self.rows = rows
            for part, output, kept in zip(parts, outputs, samples, strict=True):
                self._set(part, *output)
                part.samples.set(*kept)
            raise

    @staticmethod
    def _set(part: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
        part.output.out_features = len(bias)
        part.output.weight, part.output.bias = nn.Parameter(weight), nn.Parameter(bias)


def balance_loss(logits: torch.Tensor, real: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """Switch balance term (arXiv 2101.03961, eq. 4): C * sum_c f_c p_c, 1 when candidates share the tokens evenly.

    Args:
        logits: [batch, tokens, C] of one layer's candidates.
        real: [batch, tokens] bool, the tokens that count.
        chosen: [C], f where these tokens are not all: :func:`chosen_share` of all.
    """
    share = chosen_share(logits, real) if chosen is None else chosen
    return logits.shape[-1] * (share * _mean(logits.softmax(-1), real)).sum()


def chosen_share(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[C]: the share of the real tokens at which each candidate is the likeliest."""
    return _mean(nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype), real)


def z_loss(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """ST-MoE z term (arXiv 2202.08906, eq. 5): mean of logsumexp(logits)^2 over the real tokens."""
    return _mean(logits.logsumexp(-1).square(), real)


def entropy(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean entropy, in nats, of the candidates' probabilities at the real tokens: 0 where the router is certain."""
    log = logits.log_softmax(-1)
    return _mean(-(log.exp() * log).sum(-1), real)


def _mean(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[...] of values [batch, tokens, ...] over the real tokens, whose number is not asked of the device."""
    kept = values.masked_fill(~real.view(*real.shape, *[1] * (values.dim() - 2)), 0)
    return kept.sum((0, 1)) / real.sum()
