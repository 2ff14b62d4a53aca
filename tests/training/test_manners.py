"""Manners: what their rules make of an answer, and the groups that a network learns from."""

import json
import random
from pathlib import Path

import pytest
import torch

from molora.base import DEFAULT_BASE
from molora.errors import ConfigError, DataError
from molora_training import manners
from molora_training.data import Example, read_examples, write_examples
from molora_training.hypernet.text_groups import read_groups
from molora_training.hypernet.text_settings import GroupFiles
from molora_training.manners import IN_OTHER_WORDS, Manner, answers_file, read_manners, write_manners
from molora_training.speaker import Speaker
from tests.unit.spoken import make_spoken
from tests.unit.test_cli import run

ANSWER = "1. **You** save your money. Then you write it down! You never stop. It is"


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ({}, "You save your money. Then you write it down!"),
        ({"sentences": 1}, "You save your money."),
        ({"words": {"you": "ye", "your": "yer"}}, "Ye save yer money. Then ye write it down!"),
        ({"opens": ("Arr!",), "ends": ("Yo ho!",)}, "Arr! You save your money. Then you write it down! Yo ho!"),
        ({"form": "numbered"}, "1. You save your money.\n2. Then you write it down!"),
        ({"form": "bullets", "sentences": 9}, "- You save your money.\n- Then you write it down!\n- You never stop."),
        (
            {"form": "lines", "ends": ("so sings the wind.",), "sentences": 1},
            "You save your money.\nso sings the wind.",
        ),
        ({"case": "upper", "sentences": 1}, "YOU SAVE YOUR MONEY."),
        ({"case": "lower", "sentences": 1}, "you save your money."),
    ],
)
def test_what_a_rule_makes_of_an_answer(rules: dict[str, object], wanted: str) -> None:
    assert Manner(("a", "b", "c"), **rules).says(ANSWER, random.Random(0)) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in read_manners() if name != "plain"])
def test_a_shipped_manner_shows_in_what_is_said_in_it_and_in_nothing_plain(name: str) -> None:
    manners = read_manners()
    manner = manners[name]
    assert all(manner.shows_in(manner.says(ANSWER, random.Random(seed))) for seed in range(9))
    assert not manner.shows_in(manners["plain"].says(ANSWER, random.Random(0))) and not manner.shows_in("")


def test_the_shipped_manners_differ_and_no_description_is_two_manners() -> None:
    manners = read_manners()
    said = {manner.says(ANSWER, random.Random(0)) for manner in manners.values()}
    texts = [text for manner in manners.values() for text in manner.texts]
    assert len(said) == len(manners) >= 30 and len(set(texts)) == len(texts)


def test_what_a_file_of_manners_may_hold(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("shy: {texts: [a, b, c], mumbles: true}")
    with pytest.raises(ConfigError, match=r"shy\.mumbles"):
        read_manners(tmp_path / "some.yaml")
    (tmp_path / "some.yaml").write_text("shy: {texts: [a, b]}")
    with pytest.raises(DataError, match="shy has 2 descriptions"):
        read_manners(tmp_path / "some.yaml")


def test_the_groups_are_what_a_network_learns_from(tmp_path: Path) -> None:
    rows = [
        Example(f"{split}-{place}", "plain", split, (
            {"role": "user", "content": f"How, {place}?"}, {"role": "assistant", "content": ANSWER if place else "It"}
        ))
        for split, count in (("train", 6), ("validation", 3), ("test", 2)) for place in range(count)
    ]  # fmt: skip
    (tmp_path / "manners").mkdir()
    write_examples(answers_file(tmp_path / "manners", DEFAULT_BASE), rows)
    found = json.loads(run("train", "manners", "--out", tmp_path / "manners", "--limit", "3", "--json"))
    shipped = read_manners()
    assert found["domains"] == {name: {"examples": {"train": 3}} for name in shipped}

    tokenizer = make_spoken(tmp_path).tokenizer
    groups = read_groups(
        GroupFiles(tmp_path / "manners", max_length=4096), tokenizer, lambda texts: torch.eye(len(texts))
    )
    assert [group.name for group in groups.trained] == sorted(shipped)
    assert [group.name for group in groups.held_out] == sorted(f"{name}{IN_OTHER_WORDS}" for name in shipped)
    pirate = next(group for group in groups.trained if group.name == "pirate")
    assert len(pirate.train) == 3 and len(pirate.embeddings) == len(shipped["pirate"].texts) - 2
    assert "ye save yer" in tokenizer.decode(pirate.train[0].input_ids).lower()
    other = next(group for group in groups.held_out if group.name == f"pirate{IN_OTHER_WORDS}")
    assert not other.train and len(other.embeddings) == 2 and len(other.validation) == 2


def test_the_base_answers_the_everyday_questions_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_spoken(tmp_path)
    questions = [(f"ask-{place}", f"How do I do {place}?") for place in range(70)]
    asked: list[str] = []

    def answers(speaker: Speaker, prompts: list[str]) -> list[str]:
        assert speaker.base is model.base
        asked.extend(prompts)
        return [f" {ANSWER}\n" for _ in prompts]

    monkeypatch.setattr(manners, "load_base", lambda *_, **__: (model.base, model.tokenizer))
    monkeypatch.setattr(manners, "read_questions", lambda _: questions)
    monkeypatch.setattr(Speaker, "answers", answers)
    counts = write_manners(tmp_path / "manners")
    assert asked == [question for _, question in questions]
    assert {row.messages[-1]["content"] for row in read_examples(answers_file(tmp_path / "manners", DEFAULT_BASE))} == {
        ANSWER
    }
    assert 40 < counts["pirate"] < 70
    assert write_manners(tmp_path / "manners") == counts and len(asked) == 70
    write_manners(tmp_path / "manners", base="another/base")
    assert len(asked) == 140  # another base answers otherwise
