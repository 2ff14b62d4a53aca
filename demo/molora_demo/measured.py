"""What each token of a text costs the routed model and its base alone, and which adapters acted. No page code."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from molora.commands.common import room_for
from molora.errors import DataError, MoLoRAError
from molora.selection import Choice, resolve
from molora.streaming import TextDecoder
from molora_demo.render import Route

LIMIT = 1024  # tokens
CHARACTERS = 32 * LIMIT  # of a text before it is cut into tokens, so that a book costs no more than its beginning
GUESSES = 3
AT_ONCE = 64  # positions whose logits over the vocabulary are in float32 at one time
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n")

Odds = Mapping[str, Sequence[tuple[str | None, float]]]
"""Layer that the router decides -> probability of each of its candidates, None for "the base alone"."""


@dataclass(frozen=True)
class Guess:
    """A token that the model held for likely."""

    text: str
    probability: float


@dataclass(frozen=True)
class Measured:
    """One token. All but ``text`` and ``after`` is of the position before it, from which it was predicted; the first
    token of a text has none of that.

    routed, base: its loss in nats under the route, and of the base alone.
    guesses, base_guesses: what was likeliest in its place. after: what is likeliest after it, under the route.
    """

    text: str
    route: Route = ()
    odds: Odds = field(default_factory=dict)
    routed: float | None = None
    base: float | None = None
    guesses: Sequence[Guess] = ()
    base_guesses: Sequence[Guess] = ()
    after: Sequence[Guess] = ()

    @property
    def gain(self) -> float | None:
        """By how many nats the route is better than the base."""
        return None if self.routed is None or self.base is None else self.base - self.routed


@dataclass(frozen=True)
class Reading:
    """A text as the model read it. layers: names of the stack's. notes: sentences for the person who asked."""

    tokens: list[Measured]
    layers: list[str]
    notes: list[str]

    @property
    def predicted(self) -> list[Measured]:
        """The tokens that have a route and a loss: all but the first."""
        return self.tokens[1:]


def mean(values: Sequence[float | None]) -> float:
    """Of those that are numbers; 0 where there are none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else 0.0


def measure(model: Any, text: str, selection: Mapping[str, Choice], limit: int = LIMIT) -> Reading:
    """Reads ``text`` twice: under ``selection``, and by the base alone.

    Raises:
        DataError: there is no text. MoLoRAError: the selection does not fit, or there is too little memory.
    """
    if not text.strip():
        raise DataError("There is no text yet: write or paste one, or take an example.")
    inputs = model.encode(text[:CHARACTERS])
    whole = inputs["input_ids"].shape[1]
    limit = min(limit, room_for(model, 0))
    inputs = {name: tensor[:, :limit] for name, tensor in inputs.items()}
    notes = []
    if whole > limit or len(text) > CHARACTERS:
        notes.append(f"The text is too long for this view: only its first {min(whole, limit):,} tokens are shown.")
    try:
        with model.routing.lock, torch.no_grad():  # the stack must not change between the two readings
            return _read(model, inputs, selection, notes)
    except torch.OutOfMemoryError as error:
        raise MoLoRAError("There is too little memory for a text of this length: shorten it.") from error


def _read(model: Any, inputs: dict[str, torch.Tensor], selection: Mapping[str, Choice], notes: list[str]) -> Reading:
    ids = inputs["input_ids"]
    texts = _texts(ids[0].tolist(), model.tokenizer)
    said = _Said(ids[0].tolist(), texts, model.tokenizer)
    found = model.find(ids, selection)  # of a keyed layer the adapter that the whole text belongs to
    chosen = resolve(found, model.stack, model.routing.layers, model.router is not None)
    out = model(**inputs, selection=found, output_routes=True, use_cache=False)
    losses, guesses = _scores(out.logits[0], ids[0], said)
    routes = out.routes
    del out
    alone = model(**inputs, selection={layer.name: None for layer in model.stack.layers}, use_cache=False)
    base_losses, base_guesses = _scores(alone.logits[0], ids[0], said)
    odds = _odds(routes, [model.routing.layers[index] for index in chosen.routed_layers], chosen.allowed[0])
    tokens = [Measured(texts[0], after=guesses[0])]
    for place in range(1, len(texts)):
        before = place - 1
        tokens.append(
            Measured(
                texts[place],
                routes.at(0, before),
                {layer: own[before] for layer, own in odds.items()},
                losses[before],
                base_losses[before],
                guesses[before],
                base_guesses[before],
                guesses[place],
            )
        )
    return Reading(tokens, [layer.name for layer in model.stack.layers], [*notes, *_notes(model, selection, found)])


def _notes(model: Any, selection: Mapping[str, Choice], found: Mapping[str, Choice]) -> list[str]:
    """What differs in this stack from a router that decides every token once."""
    notes = []
    for layer in model.stack.layers:
        choice = selection.get(layer.name, layer.default)
        if layer.keyed and choice is not None and isinstance(found.get(layer.name), str):
            notes.append(
                f"Layer {layer.name} is told by keys and not by the router: the text as a whole belongs to "
                f"{found[layer.name]}, so it has no probabilities."
            )
    if model.router is None:
        notes.append("This stack has no router: an adapter acts where it is named or told by keys, on the whole text.")
    elif len(model.router.points) > 1:
        notes.append(
            f"This router decides twice. Shown is its second choice, which holds from decoder layer "
            f"{model.router.points[-1]} on."
        )
    return notes


class _Said:
    """What a token would say at a place: some tokens are parts of a character, some decoders drop a first space."""

    def __init__(self, ids: Sequence[int], texts: Sequence[str], tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[tuple[list[int], int]] = []  # by place, the tokens to decode with, and the length of theirs
        start = 0
        for place, text in enumerate(texts):
            start = place if text else start
            own = list(ids[start : place + 1])
            self._before.append((own, len(tokenizer.decode(own).rstrip("\ufffd"))))

    def at(self, place: int, token: int) -> str:
        """The text of ``token`` after the one at ``place``; "" where it is a part of a character."""
        own, length = self._before[place]
        return self._tokenizer.decode([*own, token])[length:].replace("\ufffd", "")


def _scores(logits: torch.Tensor, ids: torch.Tensor, said: _Said) -> tuple[list[float], list[tuple[Guess, ...]]]:
    """Of logits [tokens, vocabulary]: the loss of each token but the first, and the likeliest after each."""
    losses: list[float] = []
    guesses: list[tuple[Guess, ...]] = []
    wanted = torch.cat([ids[1:], ids[:1]]).to(logits.device)  # the last one has no successor; its loss is dropped
    for some, next_ids in zip(logits.split(AT_ONCE), wanted.split(AT_ONCE), strict=True):
        log = some.float().log_softmax(-1)
        losses += (-log.gather(1, next_ids[:, None])[:, 0]).clamp_min(0).tolist()
        top = log.topk(min(GUESSES, log.shape[1]))
        for row, numbers in zip(top.values.exp().tolist(), top.indices.tolist(), strict=True):
            place = len(guesses)
            guesses.append(tuple(Guess(said.at(place, id), p) for id, p in zip(numbers, row, strict=True)))
    return losses[:-1], guesses


def _odds(routes: Any, layers: Sequence[Any], allowed: torch.Tensor) -> dict[str, list[list[tuple[str | None, float]]]]:
    """By layer, by position, the probability of each allowed candidate: as `molora.plan.route` has it."""
    if not layers:
        return {}
    logits: torch.Tensor = routes.logits[-1]
    found: dict[str, list[list[tuple[str | None, float]]]] = {}
    for layer in layers:
        own = [place for place, free in enumerate(allowed[layer.all].tolist()) if free]
        rows = [routes.rows.index(layer.rows[place]) for place in own]
        names = [[*layer.names, None][place] for place in own]
        chances = logits[0][:, rows].float().softmax(-1).tolist()
        found[layer.name] = [list(zip(names, row, strict=True)) for row in chances]
    return found


def _texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token; "" where a character is not complete yet."""
    decoder, special = TextDecoder(tokenizer), set(tokenizer.all_special_ids)
    return [tokenizer.convert_ids_to_tokens(id) if id in special else decoder.push(id) for id in ids]


def guarded(text: str) -> str:
    """``text`` such that a spreadsheet takes it for text: with a ' before what it would take for a formula."""
    return f"'{text}" if text.lstrip(" '").startswith(FORMULA) else text


def unguarded(text: str) -> str:
    """The text of which :func:`guarded` made this."""
    return text[1:] if text.startswith("'") and guarded(text[1:]) == text else text


def table(reading: Reading) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a token a row, two columns a layer (several adapters of it parted by ";")."""
    header = ["index", "token"]
    for layer in reading.layers:
        header += [f"{layer} adapter", f"{layer} weight"]
    header += ["loss routed", "loss base"]
    rows = []
    for number, token in enumerate(reading.tokens, 1):
        row = [str(number), token.text]
        for layer in reading.layers:
            acted = [(name, weight) for own, name, weight in token.route if own == layer and name is not None]
            row += ["; ".join(name for name, _ in acted), "; ".join(f"{weight:.4f}" for _, weight in acted)]
        rows.append([*row, _number(token.routed), _number(token.base)])
    return header, rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def csv_text(reading: Reading) -> str:
    """The table as CSV. Everything that a person or a model wrote is guarded; numbers are plain."""
    header, rows = table(reading)
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(header)
    writer.writerows([row[0], guarded(row[1]), *row[2:]] for row in rows)
    return out.getvalue()
