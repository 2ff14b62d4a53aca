"""Groups for a network that makes adapters of profiles (arXiv 2510.16282): what came first tells, what came later is
learnt."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from molora.atomic import write_text
from molora.personalize.history import Interaction
from molora.personalize.profile import profile_text
from molora.personalize.retrieval import Encoder, text_of
from molora_training.data import Example, write_examples
from molora_training.data.people import read_people
from molora_training.data.read_people import Person
from molora_training.hypernet.text_groups import HELD_OUT_FILE, TEXTS, TRAIN, VALIDATION

PREPARED_FILE = "prepared.json"
PROFILES = 4  # of a person, each from another part of the first half
_VERSION = 2  # count this up when other groups are made of the same people


def prepared_groups(name: str, data: Path | None, folder: Path, encoder: str) -> None:
    """Writes the groups of a prepared set of people, unless they are there, of the same people and encoder.

    Raises:
        DataError: the set is not prepared. EncoderError: the encoder cannot be had.
    """
    from tqdm.auto import tqdm

    from molora.personalize.embeddings import SentenceEncoder

    persons = read_people(name, data)
    digest = hashlib.sha256(repr([_VERSION, encoder, persons]).encode()).hexdigest()
    note = folder / PREPARED_FILE
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == digest:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tqdm(total=len(persons), desc="profiles") as bar:
        write_groups(persons, folder, SentenceEncoder(encoder), lambda done: bar.update(done - bar.n))
    write_text(note, json.dumps(digest) + "\n")


def write_groups(
    persons: Sequence[Person], folder: Path, encoder: Encoder, on_person: Callable[[int], None] | None = None
) -> dict[str, int]:
    """Writes each person's files for :func:`molora_training.hypernet.text.train`, and who is held out.

    Profiles are of the first half of a history: one of all of it, and some of every other interaction of it, so that
    the network sees more texts than persons. What is learnt is the second half. Persons with fewer than four
    interactions are left out, and of those held out whoever has none for validation: their test questions are asked
    when the network is there, and must not choose its best step.

    Args:
        persons: a set of people. folder: where the files go; files that are there are written anew.
        encoder: of the central interactions.
        on_person: called with how many are done.

    Returns:
        How many groups are learnt from, and how many are held out.
    """
    held_out = []
    count = 0
    for number, person in enumerate(persons, 1):
        history = person.interactions()
        judged = person.interactions("validation") or ([] if person.held_out else person.interactions("test"))
        if len(history) >= 4 and judged:
            half = len(history) // 2
            first, embeddings = history[:half], encoder.encode([text_of(one) for one in history[:half]])
            write_text(
                folder / f"{person.id}{TEXTS}",
                json.dumps(_profiles(first, embeddings), ensure_ascii=False, indent=1) + "\n",
            )
            _write(folder / f"{person.id}{TRAIN}", person.id, history[half:])
            _write(folder / f"{person.id}{VALIDATION}", person.id, judged)
            count += 1
            held_out += [person.id] if person.held_out else []
        if on_person is not None:
            on_person(number)
    write_text(folder / HELD_OUT_FILE, json.dumps(held_out) + "\n")
    return {"trained": count - len(held_out), "held out": len(held_out)}


def _profiles(first: Sequence[Interaction], embeddings: torch.Tensor) -> list[str]:
    parts = [slice(None), *(slice(start, None, 2) for start in range(min(PROFILES - 1, len(first) // 2)))]
    return list(dict.fromkeys(profile_text(first[part], embeddings=embeddings[part]) for part in parts))


def _write(path: Path, person: str, some: Sequence[Interaction]) -> None:
    rows = [
        Example(
            f"{person}-{number}", person, "train",
            ({"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer}),
        )
        for number, one in enumerate(some)
    ]  # fmt: skip
    write_examples(path, rows)
