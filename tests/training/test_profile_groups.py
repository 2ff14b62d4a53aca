"""Profiles of people as groups: what tells is not what is learnt, and who is held out."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from molora.personalize import embeddings
from molora_training.data.read_people import Person
from molora_training.hypernet import profile_groups
from molora_training.hypernet.profile_groups import prepared_groups, write_groups
from molora_training.hypernet.text_groups import HELD_OUT_FILE, read_groups
from molora_training.hypernet.text_settings import GroupFiles
from tests.training.test_pieces_trainer import person
from tests.unit.spoken import make_tokenizer


def encode(texts: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor([[float(len(text)), float(text.count("b"))] for text in texts]))


def test_they_are_written_once_for_the_same_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people = [person("ada", "blue", 16), person("eve", "grey", 12, held_out=True)]
    monkeypatch.setattr(profile_groups, "read_people", lambda name, data: people)
    monkeypatch.setattr(embeddings, "SentenceEncoder", lambda name: SimpleNamespace(encode=encode))
    folder, stale = tmp_path / "groups", tmp_path / "groups" / "old.texts.json"
    prepared_groups("any", None, folder, "words")
    stale.write_text("[]")
    prepared_groups("any", None, folder, "words")
    assert stale.is_file()
    people[0] = person("ada", "red", 16)
    prepared_groups("any", None, folder, "words")
    assert not stale.exists() and "red" in (folder / "ada.train.jsonl").read_text()


def test_no_test_question_of_those_held_out_chooses_the_best_step(tmp_path: Path) -> None:
    def of_test(name: str, held_out: bool) -> Person:
        asked = [
            replace(one, split="test") if one.split == "validation" else one for one in person(name, "blue", 12).asked
        ]
        return Person(name, held_out, tuple(asked))

    people = [of_test("ada", False), of_test("eve", True), person("fay", "grey", 12, held_out=True)]
    assert write_groups(people, tmp_path, SimpleNamespace(encode=encode)) == {"trained": 1, "held out": 1}
    assert json.loads((tmp_path / HELD_OUT_FILE).read_text()) == ["fay"] and not list(tmp_path.glob("eve*"))


def test_the_first_half_tells_and_the_second_is_learnt(tmp_path: Path) -> None:
    people: list[Person] = [
        person("ada", "blue", 16), person("bob", "red", 12), person("eve", "grey", 12, held_out=True),
        person("new", "green", 2),
    ]  # fmt: skip
    done: list[int] = []
    found = write_groups(people, tmp_path, SimpleNamespace(encode=encode), done.append)
    assert found == {"trained": 2, "held out": 1} and done == [1, 2, 3, 4]
    assert json.loads((tmp_path / HELD_OUT_FILE).read_text()) == ["eve"]
    history = people[0].interactions()
    half = len(history) // 2
    texts = json.loads((tmp_path / "ada.texts.json").read_text())
    assert 1 < len(texts) <= 4
    for one in history[half:]:
        assert not any(one.answer in text for text in texts)
    assert any(one.answer in text for text in texts for one in history[:half])
    rows = [json.loads(line) for line in (tmp_path / "ada.train.jsonl").read_text().splitlines()]
    assert [row["messages"][1]["content"] for row in rows] == [one.answer for one in history[half:]]
    groups = read_groups(GroupFiles(tmp_path), make_tokenizer(), encode)
    assert [group.name for group in groups.trained] == ["ada", "bob"]
    assert [group.name for group in groups.held_out] == ["eve"]
