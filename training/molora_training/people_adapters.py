"""Adapters of people: trained on each one's history, put together from pieces or anchors, or made of profiles.

What takes long to make is kept, and is there again when an interrupted study goes on.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from molora.adapter import Adapter
from molora.factors import Factors, concatenated, of_adapter, write_factors
from molora.personalize.from_text import factors_from_texts
from molora.personalize.generated import generated, stacked
from molora.personalize.history import Interaction
from molora.personalize.pieces import Assembled, PiecePool
from molora.personalize.profile import profile_text
from molora.personalize.retrieval import Encoder, Retriever, text_of
from molora.personalize.text_net import TextNet
from molora_training.data import Encoded, Example, encode_within
from molora_training.data.read_people import Person
from molora_training.fitting import FIT, drawn, fit_weights
from molora_training.parts import Part, keep_tensors, kept_tensors
from molora_training.people_settings import PeopleSettings
from molora_training.pieces import history_rows, messages
from molora_training.side_by_side import ON_TOP, Schedule, module_names, train_adapters
from molora_training.speaker import Speaker

MOST = 1536  # tokens of a conversation
BATCH = 64  # people whose adapters are made in one forward, where that is timed
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
OWN, PIECES, ANCHORS, SMALL = "own adapter", "pieces", "anchors", "anchors and rank 4"
FITTED = "pieces, weights fitted"
PROFILES = "profile's adapter"
Learnt = TypeVar("Learnt", Factors, Assembled)


class People:
    """Those who are asked, with what is known of each from their history."""

    def __init__(self, persons: Sequence[Person], encoder: Encoder) -> None:
        self.persons, self.encoder = persons, encoder
        self.histories = [one.interactions() for one in persons]
        self.embedded = [encoder.encode([text_of(one) for one in some]) for some in self.histories]
        pairs = zip(self.histories, self.embedded, strict=True)
        self.profiles = [profile_text(some, embeddings=own) for some, own in pairs]
        self._searches: dict[int, Retriever] = {}

    def search(self, place: int) -> Retriever:
        """Over the history of one."""
        if place not in self._searches:
            self._searches[place] = Retriever(self.histories[place], self.encoder, self.embedded[place])
        return self._searches[place]


class Made(NamedTuple):
    """An adapter for each person, as it acts, and what one costs: seconds, bytes of its folder, and bytes that are kept
    of a person where that is something else. learning_rate: of their training."""

    adapters: list[Factors]
    cost: dict[str, float]
    learning_rate: float | None = None


class PeopleAdapters:
    """By the way in which they are made; each way is gone once, when it is first asked for.

    Args:
        settings: what is compared. people: whose they are.
        speaker: with the base.
        pool, net: what there is to make them with.
        work, mark: where what takes long is kept, and what changes with anything that it depends on.
    """

    def __init__(
        self,
        settings: PeopleSettings,
        people: People,
        speaker: Speaker,
        pool: PiecePool | None,
        net: TextNet | None,
        work: Path,
        mark: str,
    ) -> None:
        self.settings, self.people, self.speaker = settings, people, speaker
        self.base, self.tokenizer = speaker.base, speaker.tokenizer
        self.work, self.mark = work, mark
        self.task = None if settings.task is None else of_adapter(Adapter.load(settings.task))
        self.ways: dict[str, Callable[[], Made]] = {OWN: self._own}
        if pool is not None:
            self.ways[PIECES] = partial(self._pieces, pool)
            self.ways[FITTED] = partial(self._fitted, pool)
            self.ways[ANCHORS] = partial(self._anchors, pool)
            self.ways[SMALL] = partial(self._on_top, pool)
        if net is not None:
            self.net = net.to(self.base.device)
            self.ways[PROFILES] = self._of_profiles
        self._made: dict[str, Made] = {}

    def __getitem__(self, way: str) -> Made:
        if way not in self._made:
            self._made[way] = self.ways[way]()
        return self._made[way]

    @cached_property
    def of_the_task(self) -> list[Factors]:
        """The task's adapter alone, for each person."""
        return self._above([{}]) * len(self.people.persons)

    @cached_property
    def of_random_directions(self) -> list[Factors]:
        """What the network makes of embeddings that are nobody's, of the length that profiles' have."""
        chance = torch.Generator().manual_seed(self.settings.seed)
        embeddings = self.people.encoder.encode(self.people.profiles)
        noise = torch.randn(embeddings.shape, generator=chance)
        random = torch.nn.functional.normalize(noise, dim=1) * embeddings.norm(dim=1).mean()
        return factors_from_texts(self.net, lambda texts: random[: len(texts)], self.people.profiles)

    def _own(self) -> Made:
        """Trained on each person's history alone, at the learning rate that is best on validation."""
        settings = self.settings

        def learn(rate: float) -> tuple[dict[str, Tensor], list[Factors]]:
            made = self._trained(Schedule(rate, settings.epochs, settings.batch_tokens, weight_decay=1e-2))
            return _tensors(made), made

        kept, rate, seconds = self._best("own", settings.learning_rates, learn)
        alone = _factors(kept)
        return Made(self._above(alone), self._cost(alone, seconds), rate)

    def _best(
        self, name: str, rates: Sequence[float], learn: Callable[[float], tuple[dict[str, Tensor], list[Factors]]]
    ) -> tuple[dict[str, Tensor], float, float]:
        """What is learnt at the rate that is best on validation, over all people; that rate; seconds of all rates."""

        def make(rate: float) -> tuple[dict[str, Tensor], Part]:
            tensors, alone = learn(rate)
            return tensors, {"loss": self._judged(alone)}

        tried = {rate: self._kept(f"{name}-{rate:g}", partial(make, rate)) for rate in rates}
        best = min(tried, key=lambda rate: float(tried[rate][1]["loss"]))
        return tried[best][0], best, sum(about["seconds"] for _, about in tried.values())

    def _judged(self, alone: Sequence[Factors]) -> float:
        """Nats of an answer's token on what people said that is for validation; 0.0 if that is nothing."""
        above = self._above(alone)
        judged = [
            (place, one) for place, who in enumerate(self.people.persons) for one in who.interactions("validation")
        ]
        rows = encoded([one for _, one in judged], self.tokenizer)
        sums = self.speaker.losses(rows, [above[place] for place, _ in judged]).sum(0)
        return float(sums[0] / sums[1]) if rows else 0.0

    def _pieces(self, pool: PiecePool) -> Made:
        """Chosen and weighed by gates, in one reading of a history."""

        def choose() -> list[Assembled]:
            with generated(self.base, stacked([] if self.task is None else [self.task], self.base.device)):
                return [
                    pool.assemble(self.base, self.tokenizer, [messages(one) for one in some])
                    for some in self.people.histories
                ]

        kept, about = self._kept("pieces", lambda: (_kept_of(choose()), {}))
        return self._put_together(pool, _assembled(kept), about["seconds"])

    def _fitted(self, pool: PiecePool) -> Made:
        """Drawn by chance, and weighed by learning from a history, at the learning rate that is best on validation."""

        def learn(rate: float) -> tuple[dict[str, Tensor], list[Factors]]:
            how = replace(FIT, learning_rate=rate)

            def fit(_: Sequence[int], rows: list[list[Encoded]]) -> list[Assembled]:
                begun = [drawn(pool)] * len(rows)
                return fit_weights(self.base, pool, begun, rows, self.speaker.pad, how, self.task)

            chosen = self._side_by_side(fit, how.batch_tokens, "weights of pieces")
            return _kept_of(chosen), [pool.factors(one) for one in chosen]

        kept, rate, seconds = self._best("fitted", self.settings.fit_learning_rates, learn)
        return self._put_together(pool, _assembled(kept), seconds, rate)

    def _anchors(self, pool: PiecePool) -> Made:
        started = self._now()
        chosen = [pool.nearest(embedded.mean(0)) for embedded in self.people.embedded]
        return self._put_together(pool, chosen, self._now() - started)

    def _put_together(
        self, pool: PiecePool, chosen: Sequence[Assembled], seconds: float, rate: float | None = None
    ) -> Made:
        alone = [pool.factors(one) for one in chosen]
        kept = {"kept_bytes": float(max(len(one.to_bytes()) for one in chosen))}
        return Made(self._above(alone), self._cost(alone, seconds) | kept, rate)

    def _on_top(self, pool: PiecePool) -> Made:
        """With an adapter of rank 4, trained on the history, beside the anchors."""
        below = [pool.factors(pool.nearest(embedded.mean(0))) for embedded in self.people.embedded]
        kept, about = self._kept("on-top", lambda: (_tensors(self._trained(ON_TOP, below, rank=4)), {}))
        alone = [concatenated(pair) for pair in zip(below, _factors(kept), strict=True)]
        return Made(self._above(alone), self._cost(alone, about["seconds"]))

    def _of_profiles(self) -> Made:
        """They act on the base alone, for which the network was trained."""
        encode, profiles = self.people.encoder.encode, self.people.profiles
        started = self._now()
        made = factors_from_texts(self.net, encode, profiles)
        cost = self._cost(made, self._now() - started)
        for name, count in (("one", 1), ("batch", BATCH)):
            texts = [profiles[place % len(profiles)] for place in range(count)]
            times = []
            for _ in range(5):
                started = self._now()
                factors_from_texts(self.net, encode, texts)
                times.append(self._now() - started)
            cost[f"seconds_of_{name}"] = statistics.median(times)
        return Made(made, cost)

    def _trained(self, how: Schedule, below: Sequence[Factors] = (), rank: int = 8) -> list[Factors]:
        """Of each person on their own history, above the task's adapter and what else is below."""
        modules = module_names(self.base, TARGETS)

        def train(some: Sequence[int], rows: list[list[Encoded]]) -> list[Factors]:
            under = self._above([below[place] for place in some]) if below else [] if self.task is None else [self.task]
            return train_adapters(self.base, rows, self.speaker.pad, how, modules, rank, below=under)

        return self._side_by_side(train, how.batch_tokens, "own adapters")

    def _side_by_side(
        self, learn: Callable[[Sequence[int], list[list[Encoded]]], list[Learnt]], batch_tokens: int, shown: str
    ) -> list[Learnt]:
        """What people learn from their histories, each in batches of so many tokens, in their order: some at once,
        those with as long a history."""
        rows = [history_rows(one, self.tokenizer, MOST) for one in self.people.persons]
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        at_once = max(1, self.settings.at_once * self.settings.batch_tokens // batch_tokens)  # as many tokens in a step
        found: dict[int, Learnt] = {}
        for first in tqdm(range(0, len(order), at_once), desc=shown):
            some = order[first : first + at_once]
            found |= dict(zip(some, learn(some, [rows[place] for place in some]), strict=True))
        return [found[place] for place in range(len(rows))]

    def _kept(self, name: str, make: Callable[[], tuple[dict[str, Tensor], Part]]) -> tuple[dict[str, Tensor], Part]:
        """What was made before, or is made now, with the seconds that it took."""
        file = self.work / f"{name}.safetensors"
        kept = kept_tensors(file, self.mark)
        if kept is None:
            started = self._now()
            tensors, about = make()
            kept = tensors, {**about, "seconds": self._now() - started}
            keep_tensors(file, self.mark, *kept)
        return kept

    def _above(self, own: Sequence[Factors]) -> list[Factors]:
        device = self.base.device  # where they are needed again and again
        return [
            {name: (A.to(device), B.to(device)) for name, (A, B) in concatenated(parts).items()}
            for parts in ([one] if self.task is None else [self.task, one] for one in own)
        ]

    def _cost(self, alone: Sequence[Factors], seconds: float) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as place:
            write_factors(Path(place) / "one", alone[0], "")
            size = sum(file.stat().st_size for file in (Path(place) / "one").iterdir())
        return {"seconds": seconds / len(alone), "adapter_bytes": float(size)}

    def _now(self) -> float:
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def encoded(asked: Sequence[Interaction], tokenizer: object) -> list[Encoded]:
    """Questions with the answers that are to be given, whatever their length."""
    examples = [Example(str(number), "person", "test", messages(one)) for number, one in enumerate(asked)]
    return encode_within(examples, tokenizer, 1 << 30, ["person"])


def _tensors(adapters: Sequence[Factors]) -> dict[str, Tensor]:
    return {
        f"{place}/{part}/{name}": tensor
        for place, one in enumerate(adapters)
        for name, pair in one.items()
        for part, tensor in zip("AB", pair, strict=True)
    }


def _kept_of(chosen: Sequence[Assembled]) -> dict[str, Tensor]:
    parts = [(place, asdict(one)) for place, one in enumerate(chosen)]
    return {f"{place}/{part}": tensor for place, one in parts for part, tensor in one.items()}


def _assembled(tensors: dict[str, Tensor]) -> list[Assembled]:
    """What :func:`_kept_of` made of them."""
    return [Assembled(tensors[f"{one}/places"], tensors[f"{one}/weights"]) for one in range(len(tensors) // 2)]


def _factors(tensors: dict[str, Tensor]) -> list[Factors]:
    """What :func:`_tensors` made of them."""
    found: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    for key in tensors:
        place, part, name = key.split("/", 2)
        if part == "A":
            found.setdefault(int(place), {})[name] = (tensors[key], tensors[f"{place}/B/{name}"])
    return [found[place] for place in range(len(found))]
