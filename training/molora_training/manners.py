"""What a network learns from that makes adapters of descriptions: manners of speaking, and how people would name them.

A manner is a rule by which a plain answer of the base is said differently, so that what is learnt is known exactly.
Each is a group of :mod:`molora_training.hypernet.text_groups`; descriptions that no step sees make groups of their own,
which are held out.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml

from molora.atomic import write_text
from molora.base import DEFAULT_BASE, load_base
from molora.errors import DataError
from molora_training.data import Example, data_dir, read_examples, write_examples
from molora_training.data.items import split_of
from molora_training.data.read_general import read_questions
from molora_training.hypernet.text_groups import HELD_OUT_FILE, TEXTS, TRAIN, VALIDATION
from molora_training.settings import from_mapping
from molora_training.speaker import Speaker

CONFIG = Path(__file__).parent / "configs" / "manners.yaml"
IN_OTHER_WORDS = "-in-other-words"
HELD_OUT = 2  # descriptions of a manner
_MOST_WORDS = 60
_TOKENS = 96  # of an answer
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_MARKUP = re.compile(r"^\s*(?:[-*#>]+|\d+[.)])\s*|\*\*|`")


@dataclass(frozen=True)
class Manner:
    """One manner, as in configs/manners.yaml."""

    texts: tuple[str, ...]
    sentences: int = 2
    words: dict[str, str] = field(default_factory=dict)
    opens: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    form: Literal["numbered", "bullets", "lines"] | None = None
    case: Literal["upper", "lower"] | None = None

    def says(self, answer: str, chance: random.Random) -> str:
        """A plain answer in this manner."""
        kept = [self._worded(sentence) for sentence in _sentences(answer)[: self.sentences]]
        if self.form == "numbered":
            kept = [f"{place}. {sentence}" for place, sentence in enumerate(kept, 1)]
        elif self.form == "bullets":
            kept = [f"- {sentence}" for sentence in kept]
        whole = [*([chance.choice(self.opens)] if self.opens else []), *kept]
        whole += [chance.choice(self.ends)] if self.ends else []
        said = (" " if self.form is None else "\n").join(whole)
        return said.upper() if self.case == "upper" else said.lower() if self.case == "lower" else said

    def shows_in(self, answer: str) -> bool:
        """Whether all that can be seen of it is there: case, form, length, and how it begins or ends."""
        cased = {"upper": answer.upper(), "lower": answer.lower(), None: answer}[self.case] == answer
        begins = {"numbered": "1. ", "bullets": "- "}.get(str(self.form), "")
        formed = (begins in answer and "\n" in answer) if self.form else True
        short = self.sentences > 1 or len(_SENTENCE.split(answer.strip())) == 1
        phrases = [*self.opens, *self.ends]
        said = not phrases or any(phrase.lower() in answer.lower() for phrase in phrases)
        return bool(answer.strip()) and cased and formed and short and said

    def _worded(self, sentence: str) -> str:
        if not self.words:
            return sentence
        pattern = rf"\b({'|'.join(map(re.escape, self.words))})\b"

        def other(found: re.Match[str]) -> str:
            word = self.words[found[0].lower()]
            return word[0].upper() + word[1:] if found[0][0].isupper() else word

        return re.sub(pattern, other, sentence, flags=re.IGNORECASE)


def read_manners(file: Path = CONFIG) -> dict[str, Manner]:
    """The manners of a YAML file. Raises ConfigError for an unknown or missing key, DataError for too few texts."""
    manners = {
        name: from_mapping(Manner, entry, f"{name}.")
        for name, entry in yaml.safe_load(file.read_text(encoding="utf-8")).items()
    }
    for name, manner in manners.items():
        if len(manner.texts) <= HELD_OUT:
            raise DataError(f"{name} has {len(manner.texts)} descriptions; {HELD_OUT} are held out, so it needs more.")
    return manners


def write_manners(out: Path, limit: int = 1000, base: str = DEFAULT_BASE, file: Path = CONFIG) -> dict[str, int]:
    """Writes the groups of all manners, for :func:`molora_training.hypernet.text.train`.

    Args:
        out: folder of the groups, and of the base's answers without a manner, which are kept if they are there.
        limit: conversations of a manner to learn from, at most; each manner has others.
        base: the model that answers.
        file: the manners.

    Returns:
        Conversations to learn from, by manner.
    """
    manners = read_manners(file)
    out.mkdir(parents=True, exist_ok=True)
    answers = answers_file(out, base)
    if not answers.is_file():
        write_examples(answers, _answered(base))
    rows = [row for row in read_examples(answers) if _sentences(row.messages[-1]["content"])]
    counts, held_out = {}, []
    for name, manner in manners.items():
        said = {
            split: _said(name, manner, [row for row in rows if row.split == split], limit)
            for split in ("train", "validation")
        }
        known, unknown = manner.texts[:-HELD_OUT], manner.texts[-HELD_OUT:]
        for group, texts in ((name, known), (f"{name}{IN_OTHER_WORDS}", unknown)):
            write_text(out / f"{group}{TEXTS}", json.dumps(texts, ensure_ascii=False, indent=1) + "\n")
            write_examples(out / f"{group}{VALIDATION}", said["validation"])
        write_examples(out / f"{name}{TRAIN}", said["train"])
        held_out.append(f"{name}{IN_OTHER_WORDS}")
        counts[name] = len(said["train"])
    write_text(out / HELD_OUT_FILE, json.dumps(held_out, indent=1) + "\n")
    return counts


def answers_file(folder: Path, base: str) -> Path:
    """Where a base's answers without a manner lie."""
    return folder / f"answers-{base.strip('/').replace('/', '--')}.jsonl"


def _answered(base: str) -> list[Example]:
    """The base's likeliest answers to everyday questions, also those that it did not bring to an end. What it would
    have said anyway has not to be learnt, so that the manner is: of sampled ones a network learnt the words."""
    from tqdm.auto import tqdm

    cuda = torch.cuda.is_available()
    model, tokenizer = load_base(base, device_map="cuda" if cuda else None)
    questions, size = read_questions(data_dir()), 512 if cuda else 64
    speaker = Speaker(model, tokenizer, size, _TOKENS)
    found = []
    for start in tqdm(range(0, len(questions), size), desc="plain answers"):
        some = questions[start : start + size]
        for (id_, question), said in zip(some, speaker.answers([question for _, question in some]), strict=True):
            turns = ({"role": "user", "content": question}, {"role": "assistant", "content": said.strip()})
            found.append(Example(id_, "plain", split_of(id_), turns))
    return found


def _said(name: str, manner: Manner, rows: Sequence[Example], limit: int) -> list[Example]:
    chance = random.Random(name)
    found = []
    for row in chance.sample(rows, min(limit, len(rows))):
        *before, last = row.messages
        turns = (*before, {**last, "content": manner.says(last["content"], chance)})
        found.append(Example(f"{name}-{row.id}", name, row.split, turns))
    return found


def _sentences(answer: str) -> list[str]:
    """Its whole sentences without markup, until there are enough words."""
    found: list[str] = []
    for text in _SENTENCE.split(" ".join(_MARKUP.sub("", line) for line in answer.splitlines())):
        sentence = " ".join(text.split())
        if sentence and sentence[-1] in ".!?" and len(sentence.split()) > 2:
            found.append(sentence)
        if sum(len(one.split()) for one in found) >= _MOST_WORDS:
            break
    return found
