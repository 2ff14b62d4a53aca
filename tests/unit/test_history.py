"""Histories out of small files of the formats that users, LaMP and LongLaMP have."""

import json
from pathlib import Path
from typing import Any

import pytest

from molora.errors import DataError
from molora.personalize.history import SHAPES, Interaction, Sample, read_history, read_lamp

DUCKS = [{"role": "user", "content": "How many ducks?"}, {"role": "assistant", "content": "Nine."}]
GEESE = [{"role": "user", "content": "And geese?"}, {"role": "assistant", "content": "None."}]


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# ---- conversations


def test_every_pair_of_a_conversation_is_an_interaction(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be short."}
    path = lines(
        tmp_path / "ada.jsonl",
        {"messages": [system, *DUCKS, *GEESE], "user": "ada", "time": "2024-05-01"},
        "",
        {"messages": DUCKS, "time": 1714521600},
        {"messages": GEESE},
    )
    assert read_history(path, "ada") == [
        Interaction("How many ducks?", "Nine.", "2024-05-01"),
        Interaction("And geese?", "None.", "2024-05-01"),
        Interaction("How many ducks?", "Nine.", "1714521600"),
        Interaction("And geese?", "None."),
    ]


def test_several_messages_of_one_side_are_one_turn_and_halves_are_left_out(tmp_path: Path) -> None:
    greeting = {"role": "assistant", "content": "Hello!"}
    open_end = {"role": "user", "content": "Swans?"}
    messages = [greeting, {"role": "user", "content": "Wait."}, *DUCKS, {"role": "assistant", "content": "Or ten."}]
    path = lines(tmp_path / "a.jsonl", {"messages": [*messages, open_end]}, {"messages": []})
    assert read_history(path, "ada") == [Interaction("Wait.\n\nHow many ducks?", "Nine.\n\nOr ten.")]


def test_a_line_separator_within_a_text_ends_no_line(tmp_path: Path) -> None:
    messages = [DUCKS[0], {"role": "assistant", "content": "Nine.\u2028Or ten."}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}, ensure_ascii=False), encoding="utf-8")
    assert [one.answer for one in read_history(path, "ada")] == ["Nine.\u2028Or ten."]


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_an_empty_file_is_an_empty_history(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    assert read_history(path, "ada") == []


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{not json", "line 2: not JSON"),
        ('["a"]', "line 2: not a JSON object"),
        ({"text": "no conversation"}, "line 2: not a conversation"),
        ({"messages": "none"}, "line 2: not a conversation"),
        ({"messages": ["hello"]}, "line 2: not a conversation"),
        ({"messages": [{"role": "user"}]}, "line 2: not a conversation"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "line 2: the role 'tool'"),
        ({"messages": DUCKS, "user": "bob"}, "line 2 is of user 'bob', not of 'ada'"),
        ({"messages": DUCKS, "user": ["ada"]}, "line 2 is of user"),
        ({"messages": DUCKS, "time": {"day": 1}}, "line 2: its time"),
        ('{"messages": ' + "[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_read(tmp_path: Path, row: Any, sentence: str) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": DUCKS, "user": "ada"}, row)
    with pytest.raises(DataError, match=sentence):
        read_history(path, "ada")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        read_history(tmp_path / "none.jsonl", "ada")
    with pytest.raises(DataError, match="There is no file"):
        read_history(tmp_path, "ada")
    (tmp_path / "latin").write_bytes(b'{"messages": "\xe9"}')
    with pytest.raises(DataError, match="UTF-8"):
        read_history(tmp_path / "latin", "ada")


# ---- LaMP and LongLaMP

ITEMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "LaMP_1": ({"id": "0", "title": "On ducks", "abstract": "We count them."}, "We count them.", "On ducks"),
    "LaMP_2": ({"id": "0", "description": "A duck flies.", "tag": "classic"}, "A duck flies.", "classic"),
    "LaMP_2_news": (
        {"id": "0", "text": "Duck elected.", "title": "Quack", "category": "politics"},
        "Duck elected.",
        "politics",
    ),
    "LaMP_3": ({"id": "0", "text": "It swims well.", "score": "4"}, "It swims well.", "4"),
    "LaMP_4": ({"id": "0", "text": "Ducks left.", "title": "No ducks"}, "Ducks left.", "No ducks"),
    "LaMP_5": ({"id": "0", "title": "On ducks", "abstract": "We count them."}, "We count them.", "On ducks"),
    "LaMP_6": ({"id": "0", "text": "Ducks again!", "title": "Pond"}, "Ducks again!", "Pond"),
    "LaMP_7": ({"id": "0", "text": "quack quack"}, "", "quack quack"),
    "LongLaMP_email": ({"id": "0", "text": "Ducks again!", "title": "Pond"}, "Pond", "Ducks again!"),
    "LongLaMP_abstract": (
        {"id": "0", "title": "On ducks", "abstract": "We count them.", "year": 2001},
        "On ducks",
        "We count them.",
    ),
    "LongLaMP_topic": (
        {"id": "0", "author": "ada", "summary": "ducks, in short", "content": "Ducks at length."},
        "ducks, in short",
        "Ducks at length.",
    ),
    "LongLaMP_review": (
        {"overall": 4.0, "summary": "floats", "description": "A {rubber} duck", "reviewText": "It floats."},
        "A {rubber} duck",
        "It floats.",
    ),
}
NOT_BY_KEYS = {"LaMP_1": "LaMP_5", "LaMP_6": "LaMP_4", "LongLaMP_email": "LaMP_4"}


def test_every_task_has_an_example_here() -> None:
    assert set(ITEMS) == set(SHAPES)


@pytest.mark.parametrize("task", ITEMS)
def test_the_items_of_every_task_become_interactions(task: str, tmp_path: Path) -> None:
    item, question, answer = ITEMS[task]
    questions = written(tmp_path / "q.json", [{"id": "110", "input": "Which?", "profile": [item, item]}])
    golds = written(tmp_path / "g.json", {"task": task, "golds": [{"id": "110", "output": " this "}]})
    name, samples = read_lamp(questions, golds)
    assert name == task
    (sample,) = samples
    assert (sample.id, sample.input, sample.output) == ("110", "Which?", "this")
    assert len(sample.history) == 2
    assert question in sample.history[0].question and sample.history[0].answer == answer
    told, without = read_lamp(questions)
    assert told == NOT_BY_KEYS.get(task, task) and without[0].output is None


def test_dates_are_kept(tmp_path: Path) -> None:
    profile = [{"text": "Good.", "score": 5, "date": "2012-03-04"}, {"text": "Bad.", "score": 1}]
    questions = written(tmp_path / "q.json", [{"id": "1", "input": "?", "profile": profile}])
    history = read_lamp(questions)[1][0].history
    assert [(one.answer, one.time) for one in history] == [("5", "2012-03-04"), ("1", None)]


def test_rows_of_the_hub_bring_answers_and_name_the_user(tmp_path: Path) -> None:
    item = ITEMS["LongLaMP_review"][0]
    rows = [
        {"reviewerId": "A1", "input": "first", "output": "one", "profile": [item]},
        {"reviewerId": "A1", "input": "second", "output": "two", "profile": [item]},
    ]
    questions = written(tmp_path / "test.json", rows)
    name, samples = read_lamp(questions)
    assert name == "LongLaMP_review"
    assert [(sample.id, sample.output) for sample in samples] == [("A1", "one"), ("A1-1", "two")]
    assert read_history(questions, "A1") == list(samples[0].history)


def test_the_history_of_a_question_is_its_profile(tmp_path: Path) -> None:
    rows = [
        {"id": str(number), "input": "?", "profile": [{"text": f"post {number}"}] * number} for number in range(1, 4)
    ]
    questions = written(tmp_path / "q.json", rows)
    assert [one.answer for one in read_history(questions, "2")] == ["post 2", "post 2"]
    with pytest.raises(DataError, match="no question of 'ada'"):
        read_history(questions, "ada")


def test_a_sample_without_a_history_is_one(tmp_path: Path) -> None:
    questions = written(tmp_path / "q.json", [{"id": "1", "input": "?", "profile": []}])
    assert read_lamp(questions) == ("", [Sample("1", "?", (), None)])


ROW = {"id": "1", "input": "?", "profile": [{"text": "t"}]}
GOLDS = {"task": "LaMP_7", "golds": [{"id": "1", "output": "a"}]}


@pytest.mark.parametrize(
    ("questions", "golds", "sentence"),
    [
        ({"id": 1}, GOLDS, "not a list"),
        (["a"], GOLDS, "question 1: it needs"),
        ([{"id": "1", "input": "?"}], GOLDS, "question 1: it needs"),
        (
            [ROW, {"id": "2", "profile": []}],
            {**GOLDS, "golds": [*GOLDS["golds"], {"id": "2", "output": "b"}]},
            "'input'",
        ),
        ([{**ROW, "profile": ["t"]}], GOLDS, "question 1, item 1 of its profile: not a JSON object"),
        ([{**ROW, "profile": [{"words": "t"}]}], GOLDS, "the keys words are those of no task"),
        ([{**ROW, "profile": [{"text": None}]}], GOLDS, "item 1 of its profile: no text under 'text'"),
        ([ROW, ROW], GOLDS, "question 2: the id '1' stands there twice"),
        ([ROW, {**ROW, "id": "2"}], GOLDS, "question 2: g.json has no answer for '2'"),
        ([], GOLDS, "no question '1'"),
        ([ROW], [], "not a JSON object"),
        ([ROW], {"task": "LaMP_7"}, "no gold answers"),
        ([ROW], {**GOLDS, "golds": [{"id": "1"}]}, "gold 1: it needs"),
        ([ROW], {**GOLDS, "golds": GOLDS["golds"] * 2}, "gold 2: the id '1' stands there twice"),
    ],
)
def test_a_bad_benchmark_file_is_told_by_its_row(tmp_path: Path, questions: Any, golds: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_lamp(written(tmp_path / "q.json", questions), written(tmp_path / "g.json", golds))
