"""Loss for each answer token of held-out text, by contender: what the results page is made of."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from molora import MoLoRAModel, Router
from molora.selection import router_rows
from molora_training.batches import plan_pass
from molora_training.data import IGNORED, Batch, Encoded, collate

LAYER = "domain"
TOGETHER = "together"  # the layer of adapters that learnt all domains' data at once
INTEGRATION = "integration"  # the layer of an adapter that acts beside every choice of the router
POSITIONS = ("1-4", "5-16", "17+")
SHORT = 24  # tokens of an answer that may be compared word for word, its end among them


@dataclass(frozen=True)
class Losses:
    """Sums over the answers of N sequences, by domain, each [N, domains].

    loss: nats, float64. tokens: of answers. asked: questions with an answer of up to SHORT tokens. exact: those of them
    that greedy decoding answers word for word, since each token of the answer is the likeliest after those before it.
    """

    loss: torch.Tensor
    tokens: torch.Tensor
    asked: torch.Tensor
    exact: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Share of the questions with a short answer that are answered word for word."""
        return float(self.exact.sum() / self.asked.sum().clamp_min(1))

    @property
    def mean(self) -> float:
        """Nats a token, pooled."""
        return float(self.loss.sum() / self.tokens.sum())

    @property
    def domain_mean(self) -> float:
        """Mean over domains of nats a token."""
        present = self.tokens.sum(0) > 0
        return float((self.loss.sum(0)[present] / self.tokens.sum(0)[present]).mean())


def gap_closed(index: torch.Tensor, base: Losses, oracle: Losses, own: Losses) -> torch.Tensor:
    """[...]: of sequences ``index`` [..., N] the share of the way from the base to the oracle, by their summed loss."""
    b, o, x = (one.loss.sum(1)[index].sum(-1) for one in (base, oracle, own))
    return (b - x) / (b - o)


def best_by_sequence(many: Sequence[Losses]) -> Losses:
    """The contender with the lowest loss on each sequence, in hindsight."""
    best = torch.stack([one.loss.sum(1) for one in many]).argmin(0)
    every = torch.arange(len(best))
    loss, exact = (torch.stack([getattr(one, what) for one in many])[best, every] for what in ("loss", "exact"))
    return Losses(loss, many[0].tokens, many[0].asked, exact)


def losses(
    model: MoLoRAModel,
    rows: Sequence[Encoded],
    selection: dict[str, Any],
    domains: int,
    before: Callable[[Batch], None] | None = None,
    batch_tokens: int = 8192,
) -> Losses:
    """Runs ``rows`` under ``selection``; ``before`` is called with each batch."""

    def logits(batch: Batch) -> torch.Tensor:
        found = model(batch.input_ids, batch.attention_mask, selection=selection, use_cache=False).logits
        assert found is not None
        return found

    head: Any = model.base.get_output_embeddings()
    head = head if type(head) is nn.Linear else None  # one that is adapted is to see every token, as its plan does
    pad_id = model.tokenizer.pad_token_id or 0
    return losses_of(logits, rows, domains, pad_id, model.device, batch_tokens, head, before)


@torch.no_grad()
def losses_of(
    logits: Callable[[Batch], torch.Tensor],
    rows: Sequence[Encoded],
    domains: int,
    pad_id: int,
    device: torch.device | str,
    batch_tokens: int = 8192,
    head: nn.Module | None = None,
    before: Callable[[Batch], None] | None = None,
) -> Losses:
    """Losses of the answer tokens of ``rows`` under any ``logits`` [B, T, vocabulary] of a batch.

    head: what makes the logits of hidden states; given, it gets only those that answer tokens are predicted from.
    before: called with each batch.
    """
    total, count = torch.zeros(len(rows), domains, dtype=torch.float64), torch.zeros(len(rows), domains)
    asked, exact = torch.zeros_like(count), torch.zeros_like(count)
    for indices in plan_pass([row.input_ids.numel() for row in rows], batch_tokens):
        batch = collate([rows[index] for index in indices], pad_id).to(device)
        labels = batch.labels[:, 1:]
        answered = labels != IGNORED  # [B, T - 1]
        if before is not None:
            before(batch)
        with seeing(head, answered):
            found = logits(batch)
        found, wanted = (found if head is not None else found[:, :-1][answered]).float(), labels[answered]
        each = nn.functional.cross_entropy(found, wanted, reduction="none")  # [answer tokens]
        missed = (found.argmax(-1) != wanted).cpu()
        sequence = torch.tensor(indices, device=labels.device).unsqueeze(1).expand_as(labels)[answered].cpu()
        domain, pair = (of[:, 1:][answered].cpu() for of in (batch.domain_ids, batch.segments))
        place = sequence * domains + domain
        total.view(-1).index_add_(0, place, each.double().cpu())
        count.view(-1).index_add_(0, place, torch.ones(len(place)))
        # By question: how long its answer is, and whether a token of it is another than the likeliest.
        pairs, own = (sequence * (int(batch.segments.max()) + 1) + pair).unique(return_inverse=True)
        length, misses = torch.bincount(own), torch.bincount(own, missed.double())
        where = torch.zeros(len(pairs), dtype=torch.int64).scatter(0, own, place)
        short = length <= SHORT
        asked.view(-1).index_add_(0, where[short], torch.ones(int(short.sum())))
        exact.view(-1).index_add_(0, where[short], (misses[short] == 0).float())
    return Losses(total, count, asked, exact)


@contextmanager
def seeing(head: nn.Module | None, answered: torch.Tensor) -> Iterator[None]:
    """``head`` sees hidden states where ``answered`` [B, T - 1] alone: a vocabulary's logits of all are what fills a
    device."""
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][:, :-1][answered],))
    try:
        yield
    finally:
        hook.remove()


def batches(model: MoLoRAModel, rows: Sequence[Encoded], batch_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of similar length, on the model's device, with the indices of their rows."""
    for indices in plan_pass([row.input_ids.numel() for row in rows], batch_tokens):
        yield indices, collate([rows[i] for i in indices], model.tokenizer.pad_token_id or 0).to(model.device)


class LabelRouter(nn.Module):
    """Routes by labels that are known: the oracle. With ``share`` every adapter acts at an equal weight."""

    points = (0,)

    def __init__(self, model: MoLoRAModel, domains: Sequence[str], share: bool = False) -> None:
        super().__init__()
        self.rows = router_rows(model.stack)
        self.weights = "softmax" if share else "unit"
        self.parts = nn.ModuleList([_LabelPart(self.rows, domains, share)])

    def check(self, *_: Any) -> None:
        """It fits by construction."""

    def see(self, batch: Batch) -> None:
        """The labels of the next forward."""
        self.parts[0].labels = batch.domain_ids


class _LabelPart(nn.Module):
    reads = 0
    labels: torch.Tensor

    def __init__(self, rows: Sequence[str], domains: Sequence[str], share: bool) -> None:
        super().__init__()
        table = torch.zeros(len(domains) + 1, len(rows))  # the last: padding
        for index, domain in enumerate(domains):
            right = [f"{LAYER}/{name}" for name in (domains if share else [domain])]
            table[index] = torch.tensor([0.0 if row in right else -1e4 for row in rows])
        self.table = nn.Buffer(table)

    def read_ids(self, input_ids: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        return self.table[self.labels]

    def signature(self) -> object:
        return "labels"

    def features(self, z: torch.Tensor, real: torch.Tensor, memory: None) -> torch.Tensor:
        return z

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return q


class Holding(nn.Module):
    """A router that leaves the adapter it is at only for one that it holds for better by ``margin`` nats.

    For measuring what that is worth: it goes from token to token, which no prompt is fast with.
    """

    def __init__(self, router: Router, layers: Sequence[Sequence[int]], margin: float) -> None:
        """layers: the router's rows of each stack layer."""
        super().__init__()
        self.rows, self.points, self.weights, self.check = router.rows, router.points, router.weights, router.check
        self.parts = nn.ModuleList(_HoldingPart(part, layers, margin) for part in router.parts)


class _HoldingPart(nn.Module):
    def __init__(self, part: Any, layers: Sequence[Sequence[int]], margin: float) -> None:
        super().__init__()
        self.part, self.layers, self.margin = part, layers, margin
        self.reads, self.signature, self.new_memory = part.reads, part.signature, part.new_memory
        self.read, self.read_ids, self.features = part.read, part.read_ids, part.features

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        logits = self.part(q)  # [B, T, rows]
        for rows in self.layers:
            own = logits[..., rows]
            logits[..., rows] = nn.functional.one_hot(held(own, self.margin), len(rows)).to(own) * 1e4
        return logits


class Deciding(nn.Module):
    """A router that decides once for an answer: where its question ends. It is told where answers are."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.rows, self.points, self.weights, self.check = router.rows, router.points, router.weights, router.check
        self.parts = nn.ModuleList(_DecidingPart(part) for part in router.parts)

    def see(self, batch: Batch) -> None:
        """The answers of the next forward."""
        for part in self.parts:
            part.answers = batch.labels != IGNORED


class _DecidingPart(nn.Module):
    answers: torch.Tensor  # [B, T] bool

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part
        self.reads, self.signature, self.new_memory = part.reads, part.signature, part.new_memory
        self.read, self.read_ids, self.features = part.read, part.read_ids, part.features

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        logits = self.part(q)  # [B, T, rows]
        asked = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2]).masked_fill(self.answers, 0)
        return logits.gather(1, asked.cummax(1).values.unsqueeze(2).expand_as(logits))


def held(logits: torch.Tensor, margin: float) -> torch.Tensor:
    """[B, T] int64: of logits [B, T, C] the best at the first token, and then only one that is better by ``margin``."""
    now = logits[:, 0].argmax(-1)
    chosen = [now]
    for here in logits.unbind(1)[1:]:
        best = here.argmax(-1)
        lead = (here.gather(1, best[:, None]) - here.gather(1, now[:, None]))[:, 0]
        now = torch.where(lead > margin, best, now)
        chosen.append(now)
    return torch.stack(chosen, 1)


@contextmanager
def routed_by(model: MoLoRAModel, router: Any, top_k: int = 1, weights: str | None = None) -> Iterator[None]:
    """``model`` with another router, top-k and weights in the domain layer, for a while."""
    before, layer = (model.router, model.stack[LAYER].top_k), model.stack[LAYER]
    if weights is not None and isinstance(router, Router):
        router = copy.deepcopy(router)
        router.config = replace(router.config, weights=weights)
    layer.top_k = top_k
    model.set_router(router)
    try:
        yield
    finally:
        layer.top_k = before[1]
        model.set_router(before[0])


@torch.no_grad()
def chosen_domains(model: MoLoRAModel, batch: Batch, selection: dict[str, Any], domains: Sequence[str]) -> torch.Tensor:
    """[B, T] int64: the place in ``domains`` of the adapter that each token was given, -2 for none of them."""
    options: dict[str, Any] = {"output_routes": True, "use_cache": False, "logits_to_keep": 1}
    routes = model(batch.input_ids, batch.attention_mask, selection=selection, **options).routes
    assert routes is not None
    place = {f"{LAYER}/{domain}": index for index, domain in enumerate(domains)}
    to_domain = torch.tensor([place.get(name, -2) for name in routes.names] + [-2], device=batch.labels.device)
    return to_domain[routes.slots[..., routes.columns.index(LAYER)]]


@torch.no_grad()
def right_by_position(
    model: MoLoRAModel, rows: Sequence[Encoded], domains: Sequence[str], batch_tokens: int = 8192
) -> dict[str, float]:
    """Share of tokens that go to their own domain, by position in the question and in the answer."""
    hits: dict[str, list[float]] = {f"{part} {span}": [0, 0] for part in ("question", "answer") for span in POSITIONS}
    for _, batch in batches(model, rows, batch_tokens):
        right = chosen_domains(model, batch, {LAYER: "auto"}, domains) == batch.domain_ids
        answer = batch.labels != IGNORED
        position = _position(batch, answer)
        for part, where in (("question", ~answer), ("answer", answer)):
            for span, (first, last) in zip(POSITIONS, ((1, 4), (5, 16), (17, 10**9)), strict=True):
                these = where & batch.attention_mask.bool() & (position >= first) & (position <= last)
                hits[f"{part} {span}"][0] += float(right[these].sum())
                hits[f"{part} {span}"][1] += float(these.sum())
    return {name: right / max(1.0, count) for name, (right, count) in hits.items()}


def _position(batch: Batch, answer: torch.Tensor) -> torch.Tensor:
    """[B, T] 1-based position of each token in its run of question or answer tokens."""
    key = batch.segments * 2 + answer.long()
    starts = torch.ones_like(key, dtype=torch.bool)
    starts[:, 1:] = key[:, 1:] != key[:, :-1]
    at = torch.arange(key.shape[1], device=key.device).expand_as(key)
    return at - torch.where(starts, at, 0).cummax(1).values + 1


def bootstrap(
    statistic: Callable[[torch.Tensor], torch.Tensor], count: int, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of ``statistic(indices)`` over resampled sequences, indices [draws, count]."""
    generator = torch.Generator().manual_seed(seed)
    values = statistic(torch.randint(count, (draws, count), generator=generator))
    low, high = torch.quantile(values.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
