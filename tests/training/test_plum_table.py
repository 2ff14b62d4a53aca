"""The table of what an adapter knows of many conversations, on a tiny base with a few of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from molora.errors import ConfigError, DataError
from molora.personalize.history import Interaction
from molora.personalize.retrieval import Retriever
from molora_training import plum_table
from molora_training.data.lessons import Lesson
from molora_training.plum.bank import BANK
from molora_training.plum.conversations import Conversation, about_texts, read_conversations
from molora_training.plum.learner import Learner, Learning
from molora_training.plum.pairs import Pair
from molora_training.plum.topics import exchanges
from molora_training.plum_table import Asked, _answers, by_age, must, open_row, prompt_of, questions, row, run
from tests.unit.spoken import make_spoken, save_spoken

INSTRUMENTS = ("zither", "lyre", "bassoon", "ocarina", "theremin")
LAST = INSTRUMENTS[3:]  # which are not learnt


def chat(name: str) -> dict[str, Any]:
    asked, said = f"Is the {name} loud?", f"A {name} is quiet."
    if name in LAST:
        asked, said = f"Who invented the {name}?", f"A loud inventor, whom the {name} made famous."
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"user": "ada", "messages": turns}


def conversations(names: tuple[str, ...]) -> list[Conversation]:
    return [Conversation(name, tuple(chat(name)["messages"])) for name in names]


def asked(discussed: bool, of: int, unseen: bool = False) -> Asked:
    return Asked(Pair("?", "", "", True, discussed), of, unseen)


def test_questions_are_about_all_in_wordings_that_are_not_taught() -> None:
    taught, found, open_ = questions(conversations(INSTRUMENTS[:3]), conversations(LAST), Learning(wordings=1))
    assert len(taught) == 3 and {one.of for one in found} == {0, 1, 2} and all(one.pair.closed for one in found)
    assert open_ and not any(one.pair.closed for one in open_) and {one.of for one in open_} == {0, 1, 2}
    assert {one.pair.discussed for one in open_} == {True, False}
    seen = {pair.question.replace(pair.topic, "...") for pairs in taught for pair in pairs}
    assert seen.isdisjoint(one.pair.question.replace(one.pair.topic, "...") for one in found)
    unseen = [one for one in found if one.unseen]
    assert len(unseen) == sum(one.pair.discussed for one in found) > 0 and not any(one.pair.discussed for one in unseen)
    topics = {one.pair.topic for one in unseen}
    assert any("theremin" in topic for topic in topics) and not any("loud" in topic for topic in topics)
    assert {one.pair.answer for one in unseen} == {f"No, we have not talked about {topic}." for topic in topics}
    assert not any(one.unseen for one in questions(conversations(INSTRUMENTS), [], Learning())[1])


def test_where_everything_was_talked_about_nothing_is_asked() -> None:
    """Before anything is learnt: what other conversations were about makes closed negatives, but no open ones."""
    every = ". ".join(one.near for one in BANK)
    turns = ({"role": "user", "content": f"Is the zither loud? {every}"}, {"role": "assistant", "content": "Quiet."})
    with pytest.raises(DataError, match="or everything was"):
        questions([Conversation("all", turns)], conversations(LAST), Learning(wordings=1))


def test_open_questions_are_judged_by_what_was_said() -> None:
    asked = [Asked(Pair("q", "the cat sat", "cat", False, True), 0), Asked(Pair("q", "", "dog", False, False), 0)] * 2
    found = open_row(["the cat", "We have not talked about it.", "no", "A dog!"], asked)
    assert found == {"open_positives": pytest.approx(0.4), "open_negatives": 0.5}


def test_texts_become_conversations() -> None:
    lessons = [Lesson("A text.", tuple((f"q{n}", f"a{n}") for n in range(6))), Lesson("Short.", (("q", "a"),))]
    (found,) = about_texts(lessons)
    assert [one["content"] for one in found.messages] == [
        "A text.\n\nq0", "a0", "q1", "a1", "q2", "a2", "q3", "a3"
    ]  # fmt: skip
    assert [one["role"] for one in found.messages] == ["user", "assistant"] * 4


def test_shares_by_hand() -> None:
    some = [asked(True, 0), asked(True, 0), asked(True, 1), asked(False, 0), asked(False, 1), asked(False, 1, True)]
    found = row("x", [True, False, True, False, True, False], some)
    assert found["positives"] == pytest.approx(2 / 3) and found["negatives"] == pytest.approx(2 / 3)
    assert found["negatives_unseen"] == 1.0 and found["accuracy"] == pytest.approx(2 / 3)
    low, high = found["accuracy_interval"]
    assert 0 <= low <= found["accuracy"] <= high <= 1
    assert row("x", [True, True], [asked(True, 0), asked(False, 0)])["negatives_unseen"] is None
    told = [Asked(Pair("q", "the cat sat", "cat", False, positive), of) for of in (0, 1) for positive in (True, False)]
    said = {"says_yes": [True, False, True, True, False, True], "told": ["the cat sat", "", "the dog sat", "the cat"]}
    assert by_age(said, some, told, 2) == [
        {"group": 0, "positives": 0.5, "open_positives": 1.0},
        {"group": 1, "positives": 1.0, "open_positives": pytest.approx(2 / 3)},
    ]


def test_both_kinds_count_as_much_and_intervals_are_over_conversations() -> None:
    """Of two conversations the one with many questions has them all wrong."""
    some = [asked(True, 0), asked(False, 0), *[asked(True, 1)] * 6, asked(False, 1)]
    found = row("x", [True, False, *[False] * 6, True], some)
    assert (found["positives"], found["negatives"]) == (pytest.approx(1 / 7), 0.5)
    assert found["accuracy"] == pytest.approx((1 / 7 + 0.5) / 2)
    assert found["accuracy_interval"] == [0.0, 1.0]  # of two that are drawn both may be the same


def test_the_lines_by_hand() -> None:
    shares = {
        "base": (0.5, 0.1, 0.0),
        "adapter": (0.8, 0.3, 0.6),
        "search": (0.9, 0.5, 0.2),
        "adapter and search": (0.95, 0.6, 0.0),
    }
    keys = ("accuracy", "open_positives", "open_negatives")
    rows = [{"contender": name, **dict(zip(keys, some, strict=True))} for name, some in shares.items()]
    found = must({"rows": rows})
    assert [one["value"] for one in found] == pytest.approx([0.8, 0.1, 0.05, 0.1, -0.2])
    assert [one["holds"] for one in found] == [False, False, True, True, False]


def test_each_way_has_what_it_is_called_by(monkeypatch: pytest.MonkeyPatch) -> None:
    past, acts = conversations(INSTRUMENTS), [True]
    search = Retriever([one for each in past for one in exchanges(each.messages)])
    question = "Is the zither loud?"
    pairs = [Asked(Pair(question, "Yes", "zither", closed, True), 0) for closed in (True, False)]
    heard: list[tuple[bool, str]] = []

    @contextmanager
    def off() -> Iterator[None]:
        acts[0] = False
        yield
        acts[0] = True

    def hear(prompts: list[str]) -> list[Any]:
        heard.extend((acts[0], prompt) for prompt in prompts)
        return prompts

    learner: Any = SimpleNamespace(model=None, tokenizer=None, off=off, says_yes=hear)
    monkeypatch.setattr(plum_table, "Speaker", lambda *_: SimpleNamespace(answers=hear))
    shown = "Of our earlier conversations:\n\nIs the zither loud?\nA zither is quiet.\n\nIs the zither loud?"
    for way, wanted in (
        ("base", (False, question)), ("adapter", (True, question)), ("search", (False, shown)),
        ("adapter and search", (True, shown)),
    ):  # fmt: skip
        heard.clear()
        _answers(learner, way, search, 1, pairs[:1], pairs[1:])
        assert heard == [wanted] * 2


def test_what_is_found_stands_before_the_question() -> None:
    assert prompt_of("Did we?", []) == "Did we?"
    found = prompt_of("Did we?", [Interaction("a" * 999, "b"), Interaction("c", "d")])
    assert found == f"Of our earlier conversations:\n\n{'a' * 600}\n\nc\nd\n\nDid we?"


def test_the_report(tmp_path: Path) -> None:
    model = make_spoken(tmp_path / "adapters")
    with torch.no_grad():  # or no hidden state could make it sure of anything
        model.base.get_output_embeddings().weight.mul_(20)
    save_spoken(model, tmp_path)
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(chat(name)) + "\n" for name in INSTRUMENTS))
    learning = Learning(learning_rate=5e-3, epochs=2, wordings=1, rank=4)
    options: dict[str, Any] = {"base": str(tmp_path / "base"), "count": 3, "top": 1, "learning": learning}
    every = read_conversations(file, "ada")
    report = run(every, tmp_path / "results/conversations.json", "molora eval conversations", **options)
    written = json.loads((tmp_path / "results/conversations.json").read_text())
    assert written == report
    assert [one["contender"] for one in written["rows"]] == ["base", "adapter", "search", "adapter and search"]
    assert set(written) >= {"command", "commit", "date", "machine", "seed", "data", "rows", "must"}
    assert all(0 <= one["positives"] <= 1 and 0 <= one["negatives"] <= 1 for one in written["rows"])
    assert all(0 <= one["open_positives"] <= 1 and 0 <= one["open_negatives"] <= 1 for one in written["rows"])
    assert len(written["must"]) == 5 and written["must"][0]["bar"] == plum_table.PAPER
    assert [one["group"] for one in written["by_age"]] == [0, 1, 2]


def test_an_interrupted_table_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_spoken(tmp_path / "adapters")
    with torch.no_grad():
        model.base.get_output_embeddings().weight.mul_(20)
    save_spoken(model, tmp_path)
    every = conversations(INSTRUMENTS)
    learn, ask = Learner.learn, Learner.says_yes
    calls: list[str] = []
    held: dict[str, dict[str, torch.Tensor]] = {}  # the weights that were asked last, by report

    def go(out: str, stops: str = "", at: int = 0, **changed: Any) -> dict[str, Any] | None:
        """The report; None where a call, one of learning or of asking, was interrupted."""
        calls.clear()

        def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                calls.append(name)
                if name == "ask":
                    held[out] = {key: value.detach().clone() for key, value in given[0].parameters.items()}
                if name == stops and calls.count(name) == at:
                    raise KeyboardInterrupt
                return function(*given, **named)

            return call

        monkeypatch.setattr(Learner, "learn", counting("learn", learn))
        monkeypatch.setattr(Learner, "says_yes", counting("ask", ask))
        learning = Learning(learning_rate=5e-3, epochs=2, wordings=1, rank=4)
        options = {"base": str(tmp_path / "base"), "count": 3, "top": 1, "learning": learning, **changed}
        try:
            return run(options.pop("every", every), tmp_path / out, "x", **options)
        except KeyboardInterrupt:
            return None

    whole = go("whole.json")
    assert whole is not None and calls == ["learn"] * 3 + ["ask"] * 4
    assert list(tmp_path.glob(".whole/*.safetensors*")) == []
    assert go("o.json", "learn", 3) is None
    assert go("o.json", "ask", 3) is None and calls == ["learn"] + ["ask"] * 3
    assert not (tmp_path / "o.json").is_file()
    report = go("o.json")
    assert report is not None and calls == ["ask"] * 2
    assert {**report, "seconds": 0} == {**whole, "seconds": 0}
    # On so small a base every adapter may say the same: the weights that were asked are those of the whole run.
    assert held["o.json"].keys() == held["whole.json"].keys()
    assert all(torch.equal(value, held["whole.json"][name]) for name, value in held["o.json"].items())
    assert any(value.any() for name, value in held["o.json"].items() if "lora_B" in name)
    assert all(torch.equal(value, value.bfloat16().float()) for value in held["o.json"].values())  # as it is kept
    assert report == json.loads((tmp_path / "o.json").read_text())
    assert go("o.json") == report and calls == []
    # Nothing is used of other settings, or of other conversations.
    assert go("o.json", top=2) is not None and calls == ["learn"] * 3 + ["ask"] * 4
    assert go("o.json", top=2, every=[every[1], every[0], *every[2:]]) is not None and calls[:3] == ["learn"] * 3


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]})
    )
    with pytest.raises(DataError, match="nothing was talked about"):
        run(read_conversations(file, "ada"), tmp_path / "out.json", "x")
    with pytest.raises(ConfigError, match="count and top"):
        run(read_conversations(file, "ada"), tmp_path / "out.json", "x", count=0)
