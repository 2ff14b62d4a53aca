"""Many small domains out of the others, without any download."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from molora.errors import DataError
from molora_training.data import read_conversations, read_examples
from molora_training.data.items import Item, split_of
from molora_training.data.read_many import _plain, read_many

# The package gives the name `prepare` to the function.
preparing = sys.modules["molora_training.data.prepare"]
module = sys.modules["molora_training.data.read_many"]
SIZES = {"Speech A. Person": 70, "code c": 80, "code rust": 90, "tiny": 59}


def named() -> Iterator[tuple[str, Item]]:
    for name, size in SIZES.items():
        for number in range(size):
            key = f"{name}-{number}"
            yield name, Item(key, key, "science", "commonsense", {"question": f"{key}?"}, {"plain": f"so {key}"})
    yield "code c", Item("code c-0", "code c-0", "science", "commonsense", {"question": "again?"}, {"plain": "no"})


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_named", named)


def test_those_with_enough_items_are_found_under_plain_names_the_largest_first() -> None:
    found = read_many()
    assert {name: len(items) for name, items in found.items()} == {"code-c": 80, "code-rust": 90, "speech-a-person": 70}
    assert list(found) == ["code-rust", "code-c", "speech-a-person"]
    assert found["code-c"][0].body["question"] == "code c-0?"  # of one id the first


def test_the_largest_of_which_enough_is_left_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "MANY_COUNT", 2)
    monkeypatch.setitem(SIZES, "code d", 300)  # the largest, but too long to be asked

    def some() -> Iterator[tuple[str, Item]]:
        for name, item in named():
            yield name, replace(item, body={"question": "word " * 3000}) if name == "code d" else item

    monkeypatch.setattr(module, "_named", some)
    preparing.prepare(["many"], tmp_path)
    assert {file.name.partition(".")[0] for file in tmp_path.glob("*.jsonl")} >= {"code-rust", "code-c"}
    assert not list(tmp_path.glob("speech-*")) and not list(tmp_path.glob("code-d.*"))


def test_files_have_the_small_domains_and_the_splits_of_the_large_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = preparing.prepare(["many"], tmp_path)["many"]
    rows = {split: read_examples(tmp_path / f"code-rust.{split}.jsonl") for split in counts.examples}
    assert all(row.domain == "code-rust" for own in rows.values() for row in own)
    assert all(split_of(row.id, "science") == split for split, own in rows.items() for row in own)
    assert 30 < len(rows["train"]) < 60  # half of its ninety, as of science, and not 80%
    monkeypatch.setattr(preparing, "read_many", lambda: pytest.fail("read again"))
    assert preparing.prepare(["many"], tmp_path)["many"] == counts
    (tmp_path / "code-c.test.jsonl").unlink()
    monkeypatch.setattr(preparing, "read_many", read_many)
    preparing.prepare(["many"], tmp_path)
    assert (tmp_path / "code-c.test.jsonl").is_file()


def test_a_fact_is_asked_without_options() -> None:
    item = _plain("jeopardy-1", "It travels 1,129 feet a second", "sound")
    assert item.body == {"question": "It travels 1,129 feet a second"}
    assert item.answers == {"plain": "sound"} and not item.choices


def test_a_row_of_neither_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": "a", "split": "test", "messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(DataError, match="x.jsonl line 1: no 'domain' and no 'domains'"):
        read_conversations(tmp_path / "x.jsonl")
