"""What does an adapter of one's own bring, and from where had it best come? People that nothing was trained on.

- their histories tell, or are learnt; their test questions are asked
- beside each right adapter stand another person's, or a random one: what those bring too is no personalisation
- the rivals put into the prompt what a search of the history finds, or a profile
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from molora.adapter import Adapter
from molora.base import load_base
from molora.errors import ConfigError, DataError
from molora.factors import Factors, concatenated, of_adapter, write_factors
from molora.personalize.from_text import factors_from_texts
from molora.personalize.generated import generated, stacked
from molora.personalize.history import Interaction
from molora.personalize.pieces import PiecePool, weights_digest
from molora.personalize.profile import profile_text
from molora.personalize.retrieval import Encoder, Retriever, text_of
from molora.personalize.text_net import TextNet
from molora_training.data import Encoded, Example, data_dir, encode_within, read_examples
from molora_training.data.people import read_people
from molora_training.data.read_people import Person
from molora_training.evaluate import bootstrap
from molora_training.lamp import accuracy, mae, rouge, stars
from molora_training.people_lines import must
from molora_training.pieces import history_rows, messages
from molora_training.report import heading, write_report
from molora_training.side_by_side import ON_TOP, Schedule, module_names, train_adapters
from molora_training.speaker import Own, Speaker

PROFILE = 1200  # characters of a profile that stands in the prompt
SHOWN = 600  # characters of an interaction that a search found
MOST = 1536  # tokens of a conversation
BATCH = 64  # people whose adapters are made in one forward, where that is timed
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

Prompt = Callable[[int, str], str]
"""Of a person's place and a question."""


@dataclass(frozen=True)
class PeopleSettings:
    """What is compared.

    Args:
        people: a set of `molora train people`; those held out are asked.
        pool: of pieces, on top of ``task`` if that is given.
        net: makes adapters of profiles, for the base alone.
        task: an adapter of what the task is for everybody, trained on others.
        data: prepared data, with the set and what is called ``general``.
        general: a domain that has nothing to do with the set.
        limit: people; 0: all. questions: of each, at most.
        found: interactions that a search puts into the prompt.
        learning_rates: of a person's own adapter; the best on validation is taken.
        epochs, batch_tokens, at_once: of those trainings.
        new_tokens: of an answer. batch: prompts at once.
    """

    people: str
    pool: Path | None = None
    net: Path | None = None
    task: Path | None = None
    data: Path | None = None
    general: str = "science"
    limit: int = 0
    questions: int = 25
    found: int = 3
    learning_rates: tuple[float, ...] = (1e-4, 1e-3)
    epochs: int = 2
    batch_tokens: int = 512
    at_once: int = 8
    new_tokens: int = 64
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("questions", "found", "epochs", "batch_tokens", "at_once", "new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number from 1, not {getattr(self, name)}.")
        if not self.learning_rates:
            raise ConfigError("learning_rates names none.")


@dataclass(frozen=True)
class Contender:
    """prompt: what is asked of the base. own: each person's adapter, the task's in it; None: the base alone."""

    name: str
    prompt: Prompt
    own: Own = None


def run(settings: PeopleSettings, encoder: Encoder, out: Path, command: str) -> dict[str, Any]:
    """Measures every way that the settings give the means for, and writes ``out``.

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
    name = pool.config.base if pool is not None else None
    dtype = torch.bfloat16 if cuda else torch.float32  # which is faster on a CPU
    base, tokenizer = load_base(name, dtype=dtype) if name else load_base(dtype=dtype)
    base.to("cuda" if cuda else "cpu").requires_grad_(False).eval()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    table = PeopleTable(settings, base, tokenizer, persons, encoder)
    contenders = table.contenders(pool)
    rows = [table.row(one) for one in tqdm(contenders, desc="asking")]
    report = {
        **heading(command, f"{settings.people}: {len(persons)} people held out, {len(table.asked)} test questions"),
        "seed": settings.seed,
        "people": len(persons),
        "learning_rate": table.learning_rate,
        "rows": rows,
        "unrelated": table.unrelated(contenders),
        "cost": table.cost,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }
    report["must"] = must(report)
    write_report(report, out)
    return report


class PeopleTable:
    """The people, and what is made of each."""

    def __init__(
        self, settings: PeopleSettings, base: Any, tokenizer: Any, persons: Sequence[Person], encoder: Encoder
    ) -> None:
        self.settings, self.base, self.tokenizer = settings, base, tokenizer
        self.persons, self.encoder = persons, encoder
        self.speaker = Speaker(base, tokenizer, settings.batch, settings.new_tokens)
        self.histories = [one.interactions() for one in persons]
        self.embedded = [encoder.encode([text_of(one) for one in some]) for some in self.histories]
        pairs = zip(self.histories, self.embedded, strict=True)
        self.profiles = [profile_text(some, embeddings=own) for some, own in pairs]
        self.asked = [
            (place, one)
            for place, person in enumerate(persons)
            for one in person.interactions("test")[: settings.questions]
        ]
        self.task = None if settings.task is None else of_adapter(Adapter.load(settings.task))
        self.searches: dict[int, Retriever] = {}
        self.cost: dict[str, dict[str, float]] = {}
        self.learning_rate = settings.learning_rates[0]

    def contenders(self, pool: PiecePool | None) -> list[Contender]:
        """Every way there is, in the order of the table."""
        alone = None if self.task is None else self._above([{}]) * len(self.persons)
        found = [
            Contender("base", self._plain),
            Contender("base, profile in the prompt", self._with_profile),
            Contender("base, search in the prompt", self._with_found),
        ]
        if alone is not None:
            found += [
                Contender("task's adapter", self._plain, alone),
                Contender("task's adapter, search in the prompt", self._with_found, alone),
            ]
        own = self._timed("own adapter", self.own_adapters)
        found += [
            *self._pair("own adapter", self._above(own)),
            Contender("own adapter, search in the prompt", self._with_found, self._above(own)),
        ]
        if pool is not None:
            pieces = self._timed("pieces", lambda: self.pieces(pool))
            anchors = self._timed("anchors", lambda: self.anchors(pool))
            small = self._timed("anchors and rank 4", lambda: self.on_top(anchors))
            found += self._pair("pieces", self._above(pieces))
            found += [Contender("anchors", self._plain, self._above(anchors))]
            found += self._pair("anchors and rank 4", self._above(small))
        if self.settings.net is not None:
            found += self._of_profiles(TextNet.load(self.settings.net, self.base))
        return found

    def own_adapters(self) -> list[Factors]:
        """Trained on each person's history alone, at the learning rate that is best on validation."""
        best: tuple[float, list[Factors]] | None = None
        judged = [one.interactions("validation") for one in self.persons]
        asked = [(place, one) for place, some in enumerate(judged) for one in some]
        rows = self._rows(asked, self._plain)
        for rate in self.settings.learning_rates:
            made = self._trained(Schedule(rate, self.settings.epochs, self.settings.batch_tokens, weight_decay=1e-2))
            above = self._above(made)
            sums = self.speaker.losses(rows, [above[place] for place, _ in asked]).sum(0)
            loss = float(sums[0] / sums[1]) if len(rows) else 0.0
            if best is None or loss < best[0]:
                best, self.learning_rate = (loss, made), rate
        assert best is not None
        return best[1]

    def pieces(self, pool: PiecePool) -> list[Factors]:
        found = []
        with generated(self.base, stacked([] if self.task is None else [self.task], self.base.device)):
            for some in self.histories:
                chosen = pool.assemble(self.base, self.tokenizer, [messages(one) for one in some])
                self._keeps("pieces", len(chosen.to_bytes()))
                found.append(pool.factors(chosen))
        return found

    def anchors(self, pool: PiecePool) -> list[Factors]:
        found = []
        for embedded in self.embedded:
            chosen = pool.nearest(embedded.mean(0))
            self._keeps("anchors", len(chosen.to_bytes()))
            found.append(pool.factors(chosen))
        return found

    def on_top(self, below: Sequence[Factors], rank: int = 4) -> list[Factors]:
        """With an adapter of so small a rank, trained on the history, beside what was put together."""
        made = self._trained(ON_TOP, below, rank)
        return [concatenated(pair) for pair in zip(below, made, strict=True)]

    def row(self, one: Contender) -> dict[str, Any]:
        """Nats of an answer's token, and what its answers are worth; intervals are over people."""
        own = None if one.own is None else [one.own[place] for place, _ in self.asked]
        rows = self._rows(self.asked, one.prompt)
        owner = torch.tensor([place for place, _ in self.asked])
        people = len(self.persons)
        sums = torch.zeros(people, 2, dtype=torch.float64).index_add(0, owner, self.speaker.losses(rows, own))
        found: dict[str, Any] = {"contender": one.name}

        def loss(index: torch.Tensor) -> torch.Tensor:
            both = sums[index].sum(-2)
            return both[..., 0] / both[..., 1]

        found["loss"] = float(loss(torch.arange(people)))
        found["loss_interval"] = list(bootstrap(loss, people))
        said = self.speaker.answers([one.prompt(place, asked.question) for place, asked in self.asked], own)
        for name, each in _worth(said, [asked.answer for _, asked in self.asked]).items():
            values = torch.tensor(each, dtype=torch.float64)
            by_person = torch.zeros(people, dtype=torch.float64).index_add(0, owner, values) / torch.bincount(owner)
            found[name] = float(by_person.mean())
            found[f"{name}_interval"] = list(bootstrap(lambda index, b=by_person: b[index].mean(-1), people))  # type: ignore[misc]
        return found

    def unrelated(self, contenders: Sequence[Contender]) -> dict[str, float]:
        """Nats of an answer's token about other things, with no prompt but the question."""
        folder = self.settings.data or data_dir()
        examples = read_examples(folder / f"{self.settings.general}.test.jsonl")[:100]
        rows = encode_within(examples, self.tokenizer, MOST, [self.settings.general])
        found = {}
        for one in contenders:
            if one.prompt == self._plain:
                own = None if one.own is None else [one.own[place % len(one.own)] for place in range(len(rows))]
                total, count = self.speaker.losses(rows, own).sum(0).tolist()
                found[one.name] = total / count
        return found

    def _of_profiles(self, net: TextNet) -> list[Contender]:
        net = net.to(self.base.device)

        def made() -> list[Factors]:
            return factors_from_texts(net, self.encoder.encode, self.profiles)

        right = self._timed("profile's adapter", made)
        self._speed(net)
        chance = torch.Generator().manual_seed(self.settings.seed)
        embeddings = self.encoder.encode(self.profiles)
        noise = torch.randn(embeddings.shape, generator=chance)
        random = torch.nn.functional.normalize(noise, dim=1) * embeddings.norm(dim=1).mean()
        anyhow = factors_from_texts(net, lambda texts: random[: len(texts)], self.profiles)
        return [
            *self._pair("profile's adapter", right),
            Contender("profile's adapter, of a random direction", self._plain, anyhow),
            Contender("profile's adapter, search in the prompt", self._with_found, right),
        ]

    @torch.no_grad()
    def _speed(self, net: TextNet) -> None:
        """Seconds of one adapter and of a batch, from the profile's text to the factors on the device."""
        for name, count in (("one", 1), ("batch", BATCH)):
            texts = [self.profiles[place % len(self.profiles)] for place in range(count)]
            times = []
            for _ in range(5):
                started = self._now()
                factors_from_texts(net, self.encoder.encode, texts)
                times.append(self._now() - started)
            self.cost["profile's adapter"][f"seconds_of_{name}"] = statistics.median(times)

    def _trained(self, how: Schedule, below: Sequence[Factors] = (), rank: int = 8) -> list[Factors]:
        """Of each person on their own history, above the task's adapter and what else is below."""
        settings = self.settings
        modules = module_names(self.base, TARGETS)
        rows = [history_rows(one, self.tokenizer, MOST) for one in self.persons]
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        found: dict[int, Factors] = {}
        for first in tqdm(range(0, len(order), settings.at_once), desc="own adapters"):
            some = order[first : first + settings.at_once]
            under = self._above([below[place] for place in some]) if below else [] if self.task is None else [self.task]
            made = train_adapters(
                self.base, [rows[place] for place in some], self.speaker.pad, how, modules, rank, below=under
            )
            found |= dict(zip(some, made, strict=True))
        return [found[place] for place in range(len(rows))]

    def _pair(self, name: str, own: Sequence[Factors]) -> list[Contender]:
        """The right ones, and everybody under the next one's."""
        turned = [own[(place + 1) % len(own)] for place in range(len(own))]
        return [Contender(name, self._plain, own), Contender(f"{name}, another's", self._plain, turned)]

    def _above(self, own: Sequence[Factors]) -> list[Factors]:
        device = self.base.device  # where they are needed again and again
        return [
            {name: (A.to(device), B.to(device)) for name, (A, B) in concatenated(parts).items()}
            for parts in ([one] if self.task is None else [self.task, one] for one in own)
        ]

    def _timed(self, name: str, make: Callable[[], list[Factors]]) -> list[Factors]:
        """Notes seconds for a person, and the bytes of an adapter's folder."""
        kept = self.cost.setdefault(name, {})
        started = self._now()
        made = make()
        kept["seconds"] = (self._now() - started) / len(made)
        with tempfile.TemporaryDirectory() as place:
            write_factors(Path(place) / "one", made[0], "")
            kept["adapter_bytes"] = float(sum(file.stat().st_size for file in (Path(place) / "one").iterdir()))
        return made

    def _keeps(self, name: str, size: int) -> None:
        kept = self.cost.setdefault(name, {})
        kept["kept_bytes"] = float(max(size, int(kept.get("kept_bytes", 0))))

    def _rows(self, asked: Sequence[tuple[int, Interaction]], prompt: Prompt) -> list[Encoded]:
        examples = [
            Example(str(number), "person", "test", messages(Interaction(prompt(place, one.question), one.answer)))
            for number, (place, one) in enumerate(asked)
        ]
        return encode_within(examples, self.tokenizer, 1 << 30, ["person"])

    def _plain(self, _: int, question: str) -> str:
        return question

    def _with_profile(self, place: int, question: str) -> str:
        return f"Of the one who asks: {self.profiles[place][:PROFILE]}\n\n{question}"

    def _with_found(self, place: int, question: str) -> str:
        if place not in self.searches:
            self.searches[place] = Retriever(self.histories[place], self.encoder, self.embedded[place])
        shown = [
            f"Asked: {one.question[:SHOWN]}\nAnswered: {one.answer[:SHOWN]}"
            for one in self.searches[place].top(question, self.settings.found)
            if isinstance(one, Interaction)
        ]
        return "\n\n".join([*shown, question])

    def _now(self) -> float:
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


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
