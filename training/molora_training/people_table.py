"""What does an adapter of one's own bring, and from where had it best come? People that nothing was trained on.

- their histories tell, or are learnt; their test questions are asked
- beside each right adapter stand another person's, or a random one: what those bring too is no personalisation
- the rivals put into the prompt what a search of the history finds, or a profile
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from molora.base import DEFAULT_BASE, load_base
from molora.errors import ConfigError, DataError
from molora.factors import Factors
from molora.personalize.history import Interaction
from molora.personalize.pieces import PiecePool, weights_digest
from molora.personalize.retrieval import Encoder
from molora.personalize.text_net import TextNet
from molora_training.data import Example, data_dir, encode_within, read_examples
from molora_training.data.people import read_people
from molora_training.data.read_people import Person
from molora_training.evaluate import bootstrap
from molora_training.lamp import accuracy, mae, rouge, stars
from molora_training.parts import Part, drop_tensors, file_name, finished, mark_of
from molora_training.people_adapters import (
    ANCHORS,
    FITTED,
    MOST,
    OWN,
    PIECES,
    PROFILES,
    SMALL,
    People,
    PeopleAdapters,
    encoded,
)
from molora_training.people_lines import must
from molora_training.people_settings import PeopleSettings
from molora_training.report import heading, machine, write_report
from molora_training.speaker import Speaker

PROFILE = 1200  # characters of a profile that stands in the prompt
SHOWN = 600  # characters of an interaction that a search found

Prompt = Callable[[int, str], str]
"""Of a person's place and a question."""


@dataclass(frozen=True)
class Contender:
    """prompt: what is asked of the base. own: gives each person's adapter, the task's in it; None: the base alone."""

    name: str
    prompt: Prompt
    own: Callable[[], list[Factors]] | None = None


def run(settings: PeopleSettings, encoder: Encoder, out: Path, command: str, encoder_name: str = "") -> dict[str, Any]:
    """Measures every way that the settings give the means for, and writes ``out``.

    Args:
        settings: what is compared.
        encoder: of histories and profiles; encoder_name: as its users name it.
        out: the report; what is finished lies in a hidden folder beside it, and is not done again.
        command: to be named in it.

    Raises:
        ConfigError: the pool was not trained on top of the task's adapter. DataError: nobody is held out.
        HypernetError: the pool or the network is none, or for another base.
    """
    cuda = torch.cuda.is_available()
    pool = None if settings.pool is None else PiecePool.load(settings.pool)
    if pool is not None:
        beneath = "" if settings.task is None else weights_digest(settings.task)
        if pool.config.beneath != beneath:
            raise ConfigError("The pool has to be trained on top of the task's adapter: give both, or neither.")
    persons = [one for one in read_people(settings.people, settings.data) if one.held_out and one.interactions("test")]
    persons = persons[: settings.limit or None]
    if len(persons) < 2:
        raise DataError(f"Of the set {settings.people!r} fewer than two people are held out: nothing can be compared.")
    apart = read_examples((settings.data or data_dir()) / f"{settings.general}.test.jsonl")[:100]
    name = pool.config.base if pool is not None else DEFAULT_BASE
    base, tokenizer = load_base(name, dtype=torch.bfloat16 if cuda else torch.float32)  # which is faster on a CPU
    base.to("cuda" if cuda else "cpu").requires_grad_(False).eval()
    net = None if settings.net is None else TextNet.load(settings.net, base, name)
    people, speaker = People(persons, encoder), Speaker(base, tokenizer, settings.batch, settings.new_tokens)
    work, mark = out.parent / f".{out.stem}", _mark(settings, persons, apart, name, encoder_name)
    adapters = PeopleAdapters(settings, people, speaker, pool, net, work, mark)
    table = PeopleTable(settings, people, speaker, adapters, apart)
    contenders = table.contenders()

    def every(names: Sequence[str], make: Callable[[int], Part]) -> list[Part]:
        kept = finished(work, [file_name(one) for one in names], mark, (0, 1), lambda index: _with_peak(make, index))
        assert kept is not None  # for nobody else makes some
        return kept

    ways = list(adapters.ways)
    made = every([f"making {way}" for way in ways], lambda index: table.making(ways[index]))
    asked = every([one.name for one in contenders], lambda index: table.asking(contenders[index]))
    report = {
        **heading(command, f"{settings.people}: {len(persons)} people held out, {len(table.asked)} test questions"),
        "seed": settings.seed,
        "people": len(persons),
        "learning_rates": {way: rate for way, one in zip(ways, made, strict=True) if (rate := one["learning_rate"])},
        "rows": [one["row"] for one in asked],
        "unrelated": {one["row"]["contender"]: one["unrelated"] for one in asked if one["unrelated"] is not None},
        "cost": {way: one["cost"] for way, one in zip(ways, made, strict=True)},
        "peak_bytes": max(one["peak_bytes"] for one in (*made, *asked)) if cuda else None,
    }
    report["must"] = must(report)
    write_report(report, out)
    drop_tensors(work)
    return report


def _mark(
    settings: PeopleSettings, persons: Sequence[Person], apart: Sequence[Example], base: str, encoder: str
) -> str:
    """Changes with anything that a part depends on."""
    given = {name: getattr(settings, name) for name in ("pool", "net", "task") if getattr(settings, name) is not None}
    plain = asdict(replace(settings, pool=None, net=None, task=None, data=None))
    texts = [asdict(one) for one in persons], [asdict(one) for one in apart]
    return mark_of([plain, list(given), texts, base, encoder, machine()], *given.values())


def _with_peak(make: Callable[[int], Part], index: int) -> Part:
    """A part, and the most memory of a GPU that making it took."""
    if not torch.cuda.is_available():
        return make(index)
    torch.cuda.reset_peak_memory_stats()
    return {**make(index), "peak_bytes": torch.cuda.max_memory_allocated()}


class PeopleTable:
    """Every way of answering the people's questions."""

    def __init__(
        self,
        settings: PeopleSettings,
        people: People,
        speaker: Speaker,
        adapters: PeopleAdapters,
        apart: Sequence[Example],
    ) -> None:
        self.settings, self.people, self.speaker, self.adapters = settings, people, speaker, adapters
        self.apart = encode_within(apart, speaker.tokenizer, MOST, [settings.general])
        self.asked = [
            (place, one)
            for place, person in enumerate(people.persons)
            for one in person.interactions("test")[: settings.questions]
        ]

    def contenders(self) -> list[Contender]:
        """Every way there is, in the order of the table."""
        found = [
            Contender("base", self._plain),
            Contender("base, profile in the prompt", self._with_profile),
            Contender("base, search in the prompt", self._with_found),
        ]
        if self.adapters.task is not None:

            def alone() -> list[Factors]:
                return self.adapters.of_the_task

            found += [
                Contender("task's adapter", self._plain, alone),
                Contender("task's adapter, search in the prompt", self._with_found, alone),
            ]
        found += [*self._pair(OWN), self._searching(OWN)]
        if PIECES in self.adapters.ways:
            found += [*self._pair(PIECES), *self._pair(FITTED), self._pair(ANCHORS)[0], *self._pair(SMALL)]
        if PROFILES in self.adapters.ways:
            anyhow = Contender(
                f"{PROFILES}, of a random direction", self._plain, lambda: self.adapters.of_random_directions
            )
            found += [*self._pair(PROFILES), anyhow, self._searching(PROFILES)]
        return found

    def making(self, way: str) -> Part:
        """What its adapters cost."""
        made = self.adapters[way]
        print(f"{way}: {made.cost['seconds']:.2f} s a person", file=sys.stderr, flush=True)
        return {"cost": made.cost, "learning_rate": made.learning_rate}

    def asking(self, one: Contender) -> Part:
        """Its row, and nats of an answer's token about other things, if there is no prompt but the question."""
        own = None if one.own is None else one.own()
        row = self.row(one, own)
        print(f"{one.name}: {row['loss']:.4f} nats", file=sys.stderr, flush=True)
        return {"row": row, "unrelated": self.unrelated(own) if one.prompt == self._plain else None}

    def row(self, one: Contender, adapters: list[Factors] | None) -> dict[str, Any]:
        """Nats of an answer's token, and what its answers are worth; intervals are over people."""
        own = None if adapters is None else [adapters[place] for place, _ in self.asked]
        prompts = [one.prompt(place, asked.question) for place, asked in self.asked]
        answers = [asked.answer for _, asked in self.asked]
        rows = encoded([Interaction(*pair) for pair in zip(prompts, answers, strict=True)], self.speaker.tokenizer)
        owner = torch.tensor([place for place, _ in self.asked])
        people = len(self.people.persons)
        sums = torch.zeros(people, 2, dtype=torch.float64).index_add(0, owner, self.speaker.losses(rows, own))
        found: dict[str, Any] = {"contender": one.name}

        def loss(index: torch.Tensor) -> torch.Tensor:
            both = sums[index].sum(-2)
            return both[..., 0] / both[..., 1]

        found["loss"] = float(loss(torch.arange(people)))
        found["loss_interval"] = list(bootstrap(loss, people))
        said = self.speaker.answers(prompts, own)
        for name, each in _worth(said, answers).items():
            values = torch.tensor(each, dtype=torch.float64)
            by_person = torch.zeros(people, dtype=torch.float64).index_add(0, owner, values) / torch.bincount(owner)
            found[name] = float(by_person.mean())
            found[f"{name}_interval"] = list(bootstrap(lambda index, b=by_person: b[index].mean(-1), people))  # type: ignore[misc]
        return found

    def unrelated(self, own: list[Factors] | None) -> float:
        some = None if own is None else [own[place % len(own)] for place in range(len(self.apart))]
        total, count = self.speaker.losses(self.apart, some).sum(0).tolist()
        return float(total / count)

    def _pair(self, way: str) -> list[Contender]:
        """The right adapters, and everybody under the next one's."""

        def turned() -> list[Factors]:
            own = self.adapters[way].adapters
            return [*own[1:], own[0]]

        right = Contender(way, self._plain, lambda: self.adapters[way].adapters)
        return [right, Contender(f"{way}, another's", self._plain, turned)]

    def _searching(self, way: str) -> Contender:
        return Contender(f"{way}, search in the prompt", self._with_found, lambda: self.adapters[way].adapters)

    def _plain(self, _: int, question: str) -> str:
        return question

    def _with_profile(self, place: int, question: str) -> str:
        return f"Of the one who asks: {self.people.profiles[place][:PROFILE]}\n\n{question}"

    def _with_found(self, place: int, question: str) -> str:
        shown = [
            f"Asked: {one.question[:SHOWN]}\nAnswered: {one.answer[:SHOWN]}"
            for one in self.people.search(place).top(question, self.settings.found)
            if isinstance(one, Interaction)
        ]
        return "\n\n".join([*shown, question])


def _worth(said: Sequence[str], right: Sequence[str]) -> dict[str, list[float]]:
    """Of each answer: where all right ones are numbers, whether it is it and how far from it; else ROUGE."""
    try:
        numbers = [float(one) for one in right]
    except ValueError:
        pairs = [rouge([one], [gold]) for one, gold in zip(said, right, strict=True)]
        return {name: [one[key] for one in pairs] for name, key in (("rouge_1", "rouge-1"), ("rouge_l", "rouge-l"))}
    given = [stars(text, gold) for text, gold in zip(said, numbers, strict=True)]
    both = list(zip(given, numbers, strict=True))
    return {
        "accuracy": [accuracy([str(one)], [str(gold)]) for one, gold in both],
        "mae": [mae([one], [gold]) for one, gold in both],
    }
