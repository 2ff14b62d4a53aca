"""Puzzles made by the generators of reasoning-gym: letters, words, ciphers, sequences and small logic.

The questions are worded here, since the package's long instructions, the same for every question of a kind, would make
each held-out puzzle one that shares its words with training. Its words come from one story, so a held-out puzzle may
hold words of a training one; a cipher's sentence is in one split alone.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from molora.errors import DataError

from .items import Item
from .packages import REASONING_GYM, fetch
from .text import stable_index

SEED = 2889
EACH = 450  # puzzles of a kind
_ROOT = "reasoning_gym"
_FOLDERS = ("algorithmic", "cognition", "graphs", "logic")
_RELATIONS = ("mother", "father", "sister", "brother", "daughter", "son", "wife", "husband", "grandmother",
              "grandfather", "aunt", "uncle")  # fmt: skip
_MEETING = re.compile(r"inhabited only by (\w+) and (\w+)\..*?You meet \d+ inhabitants: (.+?)\. (.+?) So who is", re.S)
_FAMILY = re.compile(r"(.+)\n\n[^\n]+", re.S)
_STATEMENT = re.compile(r"(All|No|Some) (.+?) are (not )?(.+)")


@dataclass(frozen=True)
class Puzzle:
    """One puzzle in words; a reason, where there is one, goes before an answer that is a sentence.

    source: what it is made from, where several puzzles share it; they must not cross a split. choices: all answers
    that are possible, where they are few.
    """

    question: str
    answer: str
    reason: str = ""
    source: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of puzzle: the module of its generator, what makes a :class:`Puzzle` of an entry (or None, for an entry
    that is no good), and the generator's settings."""

    module: str
    puzzle: Callable[[Mapping[str, Any], int], Puzzle | None]
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_puzzles(seed: int = SEED, each: int = EACH) -> Iterator[Item]:
    """`each` different puzzles of every kind; the same seed gives the same ones.

    Raises DataError when the package cannot be had or makes something else than is expected of it.
    """
    with generators(fetch(REASONING_GYM)) as create:
        items = [item for name in KINDS for item in _of_kind(name, create, seed, each)]
    yield from items


def puzzle_item(name: str, entry: Mapping[str, Any], number: int) -> Item | None:
    """The item of what the generator of kind `name` made. Raises DataError naming one that is not as expected."""
    where = f"{name} {number}"
    try:
        puzzle = KINDS[name].puzzle(entry, stable_index(f"puzzle:{where}", 3))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: not the puzzle expected ({error!r})") from None
    if puzzle is None:
        return None
    item_id = f"{name}-{number}"
    told = puzzle.answer if puzzle.answer.endswith(".") else f"The answer is {puzzle.answer}."
    answers = {"plain": puzzle.answer, "sentence": f"{puzzle.reason} {told}".lstrip()}
    right = puzzle.choices.index(puzzle.answer) if puzzle.choices else 0
    task = f"{name}-{puzzle.source}" if puzzle.source else item_id
    return Item(item_id, task, "puzzles", "puzzles", {"question": puzzle.question}, answers, puzzle.choices, right)


@contextmanager
def generators(wheel: Path) -> Iterator[Callable[..., Any]]:
    """The package's `create_dataset`, for the kinds here, straight from its wheel.

    The package and its folders are stood for by empty modules that only know where their files are: their own
    `__init__` would import every generator, and with them a dozen packages that these kinds do not need. They leave
    again at the end, so that an installed reasoning-gym works as ever.
    """
    installed = {name: sys.modules.pop(name) for name in _loaded()}
    try:
        for folder in ("", *_FOLDERS):
            stand_in = ModuleType(f"{_ROOT}.{folder}" if folder else _ROOT)
            stand_in.__path__ = [str(Path(wheel, _ROOT, folder))]  # Python imports from within a zip file
            sys.modules[stand_in.__name__] = stand_in
        try:
            for kind in KINDS.values():
                importlib.import_module(f"{_ROOT}.{kind.module}")
            create = importlib.import_module(f"{_ROOT}.factory").create_dataset
        except (ImportError, AttributeError) as error:
            raise DataError(f"{wheel.name} does not hold the generators expected ({error})") from None
        yield create
    finally:
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(installed)


def _loaded() -> list[str]:
    return [name for name in sys.modules if name == _ROOT or name.startswith(f"{_ROOT}.")]


def _of_kind(name: str, create: Callable[..., Any], seed: int, each: int) -> list[Item]:
    found: dict[str, Item] = {}
    entries = create(name, seed=seed, size=20 * each, **KINDS[name].settings)
    for number in range(20 * each):
        if len(found) == each:
            break
        item = puzzle_item(name, entries[number], number)
        if item is not None:
            found.setdefault(item.body["question"], item)
    return list(found.values())


def _letter_counting(entry: Mapping[str, Any], way: int) -> Puzzle:
    letter, words = entry["metadata"]["target_letter"], entry["metadata"]["span"]
    text = " ".join(words)
    question = (
        f'How many times does the letter "{letter}" appear in "{text}"?',
        f"Count every {letter} (small or capital): {text}",
        f'"{text}" - how often do you find the letter {letter} there?',
    )[way]
    counted = [(word, word.lower().count(letter)) for word in words if letter in word.lower()]
    return Puzzle(question, entry["answer"], ", ".join(f"{word} {count}" for word, count in counted) + ".")


def _spell_backward(entry: Mapping[str, Any], way: int) -> Puzzle:
    word = entry["metadata"]["word"]
    question = (f"Spell {word} backward.", f"What is {word} from its last letter to its first?", f"Turn round: {word}")
    return Puzzle(question[way], entry["answer"], "-".join(entry["answer"]) + ".")


def _caesar_cipher(entry: Mapping[str, Any], way: int) -> Puzzle:
    data = entry["metadata"]
    question = (
        f"Decrypt this Caesar cipher: {data['cipher_text']}",
        f"Every letter was moved on by the same number of places. What was it before? {data['cipher_text']}",
        f"{data['cipher_text']}\nThis is a shift cipher. Find the plain text.",
    )[way]
    return Puzzle(question, entry["answer"], f"Each letter goes back by {data['rotation']}.", entry["answer"])


def _word_sorting(entry: Mapping[str, Any], way: int) -> Puzzle | None:
    # The package sorts by code point, capitals first, which is no sorting to a reader: small letters only.
    chosen = {word.lower() for word in entry["metadata"]["original_words"] if word.isascii() and word.isalpha()}
    if len(chosen) < 3:
        return None
    ascending = entry["metadata"]["direction"] == "ascending"
    words = ", ".join(sorted(chosen, key=lambda word: stable_index(f"order:{word}", 1 << 20)))
    question = (
        f"Sort from {'A to Z' if ascending else 'Z to A'}: {words}",
        f"Put these words into {'' if ascending else 'reverse '}alphabetical order: {words}",
        f"{words}\nList them alphabetically{'' if ascending else ', the last one first'}.",
    )[way]
    return Puzzle(question, ", ".join(sorted(chosen, reverse=not ascending)))


def _word_reversal(entry: Mapping[str, Any], way: int) -> Puzzle:
    words = ", ".join(entry["metadata"]["words"])
    question = (f"Reverse this list: {words}", f"{words}\nNow the other way round.", f"Last word first: {words}")
    return Puzzle(question[way], entry["answer"])


def _letter_jumble(entry: Mapping[str, Any], way: int) -> Puzzle:
    words = " ".join(entry["metadata"]["scrambled_words"])
    question = (
        f"Unscramble each of these words: {words}",
        f"The letters inside the words got mixed up. {words}",
        f"{words}\nWhich words are these? Each is an anagram, and they stay in their order.",
    )[way]
    return Puzzle(question, entry["answer"])


def _number_sequence(entry: Mapping[str, Any], way: int) -> Puzzle | None:
    if len(set(entry["metadata"]["sequence"])) < 3:  # it stands still, or nearly
        return None
    terms = ", ".join(str(term) for term in entry["metadata"]["sequence"][:-1])
    question = (f"{terms}, ?", f"Which number comes next: {terms}", f"Continue the sequence {terms} by one.")
    return Puzzle(question[way], entry["answer"], f"The rule: {entry['metadata']['rule']}.")


def _syllogism(entry: Mapping[str, Any], way: int) -> Puzzle | None:
    data = entry["metadata"]
    premises = [data[key] for key in ("premise1", "premise2")]
    # An inversion follows from one premise, and the other one stands there to distract.
    if follows(premises, data["conclusion"]) != (entry["answer"] == "Yes"):
        return None
    first, second = premises
    claim = data["conclusion"]
    question = (
        f"{first}. {second}. Does it follow that {claim[0].lower()}{claim[1:]}?",
        f"1. {first}\n2. {second}\nConclusion: {claim}\nIs that valid, yes or no?",
        f"Suppose: {first[0].lower()}{first[1:]}, and {second[0].lower()}{second[1:]}. Must it be so that "
        f"{claim[0].lower()}{claim[1:]}?",
    )[way]
    return Puzzle(question, entry["answer"], choices=("Yes", "No"))


def _knights_knaves(entry: Mapping[str, Any], way: int) -> Puzzle:
    found = _MEETING.search(entry["question"])
    if found is None:
        raise ValueError("no inhabitants")
    truthful, lying, names, statements = found.groups()
    names = names.replace(", and ", " and ")
    question = (
        f"{truthful.capitalize()} never lie, {lying} always do. {names} talk to you. {statements} Who is what?",
        f"{statements} What are {names}, if {truthful} tell the truth and {lying} lie?",
        f"You meet {names}: {truthful} always say true things, {lying} false ones. {statements} Tell them apart.",
    )[way]
    data = entry["metadata"]
    terms = [str(data["knight_knave_terms"][key]) for key in ("a_knight", "a_knave")]
    people = [str(name) for name in data["names"]]
    choices = tuple(
        ", and ".join(f"{name} is {terms[lies]}" for name, lies in zip(people, lies_of, strict=True)) + "."
        for lies_of in product((False, True), repeat=len(people))
    )
    return Puzzle(question, entry["answer"], choices=choices)


def _family(entry: Mapping[str, Any], way: int) -> Puzzle | None:
    relation = entry["answer"]
    # Of nieces, nephews and parents-in-law the package names the other person's part.
    if relation not in _RELATIONS:
        return None
    found = _FAMILY.fullmatch(entry["question"])
    if found is None:
        raise ValueError("no story")
    one, other = entry["metadata"]["person1"], entry["metadata"]["person2"]
    question = (
        f"{found[1]}\nWhat is {one} to {other}?",
        f"{found[1]} How is {one} related to {other}?",
        f"Who is {one}, seen from {other}? {found[1]}",
    )[way]
    return Puzzle(question, relation, choices=_RELATIONS)


def follows(premises: list[str], conclusion: str) -> bool:
    """Whether the conclusion holds in every world where the premises do and there is at least one thing of each name.

    The package's own verdict goes by rules of thumb; this tries all worlds. Raises ValueError for a statement of
    another form.
    """
    parsed = [_parsed(statement) for statement in (*premises, conclusion)]
    names = sorted({name for _, one, other, _ in parsed for name in (one, other)})
    things = range(1 << len(names))  # what a thing can be: a bit a name
    bits = {name: 1 << place for place, name in enumerate(names)}
    for number in range(1 << len(things)):
        world = [thing for thing in things if number >> thing & 1]
        if all(any(thing & bit for thing in world) for bit in bits.values()):
            held = [_holds(statement, world, bits) for statement in parsed]
            if all(held[:-1]) and not held[-1]:
                return False
    return True


def _parsed(statement: str) -> tuple[str, str, str, bool]:
    found = _STATEMENT.fullmatch(statement)
    if found is None:
        raise ValueError(f"'{statement}' is no statement")
    return found[1], found[2], found[4], bool(found[3])


def _holds(statement: tuple[str, str, str, bool], world: list[int], bits: Mapping[str, int]) -> bool:
    quantity, one, other, negated = statement
    held = [bool(thing & bits[other]) != negated for thing in world if thing & bits[one]]
    if quantity == "Some":
        return any(held)
    return all(held) if quantity == "All" else not any(held)


# The sizes keep a puzzle's own words below the run of 13 that counts as an overlap.
KINDS: dict[str, Kind] = {
    "letter_counting": Kind("algorithmic.letter_counting", _letter_counting, {"min_words": 3, "max_words": 9}),
    "spell_backward": Kind("algorithmic.spell_backward", _spell_backward),
    "caesar_cipher": Kind("algorithmic.caesar_cipher", _caesar_cipher, {"min_words": 2, "max_words": 12}),
    "word_sorting": Kind("algorithmic.word_sorting", _word_sorting, {"max_words": 8}),
    "word_sequence_reversal": Kind("algorithmic.word_sequence_reversal", _word_reversal),
    "letter_jumble": Kind(
        "algorithmic.letter_jumble",
        _letter_jumble,
        {"min_word_len": 4, "max_word_len": 9, "max_words": 6, "consecutive_words": False},
    ),
    "number_sequence": Kind("cognition.number_sequences", _number_sequence),
    "syllogism": Kind("logic.syllogisms", _syllogism, {"invalid_ratio": 0.5}),
    "knights_knaves": Kind("logic.knights_knaves", _knights_knaves),
    "family_relationships": Kind("graphs.family_relationships", _family, {"max_family_size": 12}),
}
