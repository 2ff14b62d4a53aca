"""Questions of two domains at once: what they come to, whose split they are of, and that no model's code is run."""

import ast
import time
from fractions import Fraction

import pytest

from molora_training.data import both as module
from molora_training.data import calculate
from molora_training.data.both import check, law_and_arithmetic, math_in_code
from molora_training.data.calculate import operands_replaced, returned
from molora_training.data.items import Item, split_of

SPLITS = ("train", "validation", "test")
SHEEP = {
    "question": "Toulouse has twice as many sheep as Charleston, which has 4 times Seattle's 20. How many in all?",
    "answer": "Charleston has 4*20=<<4*20=80>>80 sheep.\nToulouse has 2 * 80 = <<2*80=160>>160.\n"
    "Together they have <<20+160+80=260>>260.\n#### 260",
}
PASSAGE = "In {number} the plaintiffs sued the county jail. The court dismissed claim {number} without prejudice."


def problems(count: int = 200) -> list[dict[str, object]]:
    return [{**SHEEP, "id": number} for number in range(count)]


def law(count: int = 300) -> list[Item]:
    return [
        Item(
            f"case-{n}-{kind}", f"case-{n}", "law", kind, {"document": PASSAGE.format(number=n)}, {"plain": "It ended."}
        )
        for n in range(count)
        for kind in ("summary", "sequel")
    ]


def terms(count: int = 300) -> list[Item]:
    return [
        Item(f"clause-{n}-1", f"clause-{n}", "law", "clause", {"question": "Why?"}, {"plain": PASSAGE.format(number=n)})
        for n in range(count)
    ]


# ---- math in code


def test_a_worked_solution_becomes_a_function_that_returns_its_result() -> None:
    made = math_in_code(problems(), "train")
    plain = next(one for one in made if "```" not in one.messages[1]["content"])
    assert plain.messages[1]["content"] == (
        "def solution():\n"
        "    # Charleston has 4*20=80 sheep.\n"
        "    v1 = 4 * 20\n"
        "    # Toulouse has 2 * 80 = 160.\n"
        "    v2 = 2 * v1\n"
        "    # Together they have 260.\n"
        "    v3 = 20 + v2 + v1\n"
        "    return v3"
    )
    assert any("```python\n" in one.messages[1]["content"] for one in made)
    for one in made:
        assert one.result == "260" and check(one.messages[1]["content"], one.result, "math in code")
        assert returned(one.messages[1]["content"]) == 260


def test_a_comment_is_mathematics_and_a_line_is_code() -> None:
    one = math_in_code(problems(), "train")[0]
    assert one.domains == ("math", "code")
    for message, turn in zip(one.messages, one.parts, strict=True):
        assert "".join(part.text for part in turn) == message["content"]
    answer = [part for part in one.parts[1] if part.answer]
    assert len(answer) == len(one.parts[1]) and not any(part.answer for part in one.parts[0])
    assert {part.pair for part in answer if "#" in part.text} == {0}
    assert {part.pair for part in answer if "#" not in part.text} == {1}


def test_a_number_of_the_question_is_not_taken_for_an_earlier_step() -> None:
    doc = {
        "id": 0,
        "question": "Ann has 2 boxes of 3, Bob has 6 more.",
        "answer": "<<2*3=6>>6\n<<6+6=12>>12\n#### 12",
    }
    assert split_of("gsm8k-0") == "train"
    (one,) = math_in_code([doc], "train")
    assert "v2 = 6 + 6" in one.messages[1]["content"]


@pytest.mark.parametrize(
    "answer",
    [
        "It is <<4*20=80>>80.\n#### 81",
        "No step.\n#### 5",
        "<<2(3)=6>>6\n#### 6",
        "<<6=6>>6\n#### 6",
        "<<9**9**9=1>>1\n#### 1",
        "<<6/0=1>>1\n#### 1",
    ],
    ids=["another result", "no annotation", "call", "no sum", "tower", "division by zero"],
)
def test_a_problem_whose_steps_do_not_come_to_its_result_is_left_out(answer: str) -> None:
    assert math_in_code([{"id": 0, "question": "How many?", "answer": answer}], "train") == []


def test_a_formula_takes_names_for_its_numbers() -> None:
    names: dict[Fraction | None, str] = {Fraction(3, 2): "v1", Fraction(10): "v2"}
    assert operands_replaced("1.5*(10-4)", names) == "v1 * (v2 - 4)"
    assert operands_replaced("x*2", names) is None


# ---- law and arithmetic


@pytest.mark.parametrize("items", [law(), terms()], ids=["cases", "terms"])
def test_a_clause_is_worked_out_in_right_sums(items: list[Item]) -> None:
    made = law_and_arithmetic(items, "train")
    assert len(made) == len({item.task for item in items if item.split == "train"})
    assert len({one.parts[1][-1].text.split(":")[0].split("$")[0] for one in made}) >= 3  # several clauses
    for one in made:
        assert one.domains == ("law", "math") and check(one.messages[1]["content"], one.result, "law and arithmetic")
        for message, turn in zip(one.messages, one.parts, strict=True):
            assert "".join(part.text for part in turn) == message["content"]
        assert one.messages[0]["content"].startswith(one.parts[0][0].text) and "sued the county" in one.parts[0][0].text
        sums = [part.text for part in one.parts[1] if part.pair == 1 and "=" in part.text]
        assert len(sums) >= 2
        for written in (each for text in sums for each in text.split(": ")[-1].split(" and ")):
            formula, value = written.split("=")
            assert calculate._value(ast.parse(formula.strip(), mode="eval").body, {}) == Fraction(value.strip())


def test_some_answers_begin_with_the_sentence_before_the_clause() -> None:
    answers = [(one, one.messages[1]["content"]) for one in law_and_arithmetic(law(), "train")]
    quoting = [one for one, answer in answers if answer.startswith('"The court dismissed claim')]
    assert 0.3 < len(quoting) / len(answers) < 0.7
    assert all(one.parts[1][0].pair == 0 and "entence" in one.messages[0]["content"] for one in quoting)


# ---- both


@pytest.mark.parametrize("split", SPLITS)
def test_examples_are_of_items_of_their_split_and_the_same_each_time(split: str) -> None:
    for make, source in ((math_in_code, problems()), (law_and_arithmetic, law())):
        made = make(source, split)  # type: ignore[operator]
        assert made and made == make(source, split)  # type: ignore[operator]
        for one in made:
            _, _, start, number = one.id.split("-")[:4]
            assert one.split == split == split_of(f"{start}-{number}")


def test_splits_share_no_example_and_the_test_split_asks_otherwise() -> None:
    for make, source in ((math_in_code, problems()), (law_and_arithmetic, law())):
        made = {split: make(source, split) for split in SPLITS}  # type: ignore[operator]
        sources = {split: {one.id for one in rows} for split, rows in made.items()}
        assert not sources["train"] & sources["test"] and not sources["train"] & sources["validation"]
        asked = {
            split: {one.parts[0][1].text.split("? ")[-1].split(". ")[-1] for one in rows}
            for split, rows in made.items()
        }
        assert asked["test"] and not asked["train"] & asked["test"]


def test_both_leaves_out_what_overlaps_training(monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(f"word{n}" for n in range(20))
    docs = [{**SHEEP, "id": n, "question": f"{words}?" if n % 2 else f"Only {n}?"} for n in range(200)]
    made = [module.word_problem(doc, "row") for doc in docs]
    made = [Item(one.id, one.task, "math", "math", one.body, {"plain": "Few."}) for one in made]
    monkeypatch.setattr(module, "fetch", lambda package: None)
    monkeypatch.setattr(module, "read_jsonl", lambda archive, member: [("row", {"doc": doc}) for doc in docs])
    monkeypatch.setattr(module, "read_math", lambda: made)
    monkeypatch.setattr(module, "read_law", lambda: terms(40))
    held_out = module.both("test")["math in code"]
    assert held_out and all("Only" in one.messages[0]["content"] for one in held_out)
    assert {kind: len(rows) for kind, rows in module.both("train", 2).items()} == dict.fromkeys(module.KINDS, 2)


# ---- answers of models


@pytest.mark.parametrize(
    "answer",
    [
        "def solution():\n    return 4 * 5",
        "Sure!\n```python\ndef solution():\n    # twenty\n    a = 4\n    return a * 5\n\nprint(solution())\n```\nDone.",
        'def solution():\n    """Says it."""\n    x = -(2 ** 3)\n    return x * -5 / 2\n',
        "def solution():\n    return 61 // 3\n\nThat is 7.",
    ],
    ids=["bare", "fence", "docstring", "prose after"],
)
def test_a_right_function_is_accepted(answer: str) -> None:
    assert check(answer, "20", "math in code")


@pytest.mark.parametrize(
    "body",
    [
        "return 21",
        "return 'twenty'",
        "return None",
        "x = 20",
        "return y",
        "return True * 20",
        "import os\n    return 20",
        "return __import__('os').system('true') + 20",
        "return (20).real",
        "while True:\n        pass\n    return 20",
        "return 9**9**9**9",
        "x = 10**16\n    x = x**16\n    x = x**16\n    return 20",
        "return 1 / 0",
        "return 20 if True else 20",
        "return [20][0]",
        "return " + "(" * 1500 + "20" + ")" * 1500,
        "return " + "-" * 3000 + "20",
        "return 20" + "0" * 5000,
    ],
)
def test_a_wrong_or_hostile_function_is_refused_at_once(body: str) -> None:
    begun = time.monotonic()
    assert not check(f"def solution():\n    {body}\n", "20", "math in code")
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("answer", ["20", "", "def other():\n    return 20", "def solution(x=20):\n    return 20"])
def test_a_number_is_no_function(answer: str) -> None:
    assert not check(answer, "20", "math in code")


def test_the_last_number_counts_for_a_clause() -> None:
    assert check("12 * 100 = 1,200. In total: $4,968.", "4968", "law and arithmetic")
    assert check("The rule gives 4968.00", "4968", "law and arithmetic")
    assert not check("4968 dollars, that is 5000", "4968", "law and arithmetic")
    assert not check("A great deal.", "4968", "law and arithmetic")
    assert not check("9" * 5000, "4968", "law and arithmetic")
