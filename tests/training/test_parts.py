"""What studies keep of finished parts: by name, by mark, and shared among processes."""

import json
from pathlib import Path

import torch

from molora_training.parts import drop_tensors, file_name, finished, keep_tensors, kept_tensors, mark_of


def test_each_part_is_made_once_and_only_for_its_mark(tmp_path: Path) -> None:
    made: list[int] = []

    def make(index: int) -> dict[str, int]:
        made.append(index)
        return {"twice": 2 * index}

    names = ["none", "one", "two"]
    assert finished(tmp_path / "work", names, "a", (1, 2), make) is None and made == [1]
    expected = [{"twice": 0}, {"twice": 2}, {"twice": 4}]
    assert finished(tmp_path / "work", names, "a", (0, 2), make) == expected and made == [1, 0, 2]
    assert finished(tmp_path / "work", names, "a", (0, 1), make) == expected and len(made) == 3
    assert finished(tmp_path / "work", names, "b", (0, 1), make) == expected and made[3:] == [0, 1, 2]


def test_a_mark_changes_with_settings_and_text_and_not_with_where_they_lie(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "net").mkdir(parents=True)
        (tmp_path / place / "net" / "a.json").write_text("{}")
        (tmp_path / place / "text.jsonl").write_text("{}\n")

    def mark(place: str, record: object = None) -> str:
        return mark_of(record or {"seed": 0}, tmp_path / place / "net", tmp_path / place / "text.jsonl")

    before = mark("here")
    assert mark("there") == before and mark("here", {"seed": 1}) != before
    (tmp_path / "there" / "text.jsonl").write_text("[]\n")
    assert mark("there") != before
    (tmp_path / "here" / "net" / "a.json").rename(tmp_path / "here" / "net" / "b.json")
    assert mark("here") != before


def test_tensors_are_kept_exactly_and_only_for_their_mark(tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    assert kept_tensors(file, "a") is None
    tensors = {"A": torch.randn(2, 3), "B": torch.randn(3).bfloat16(), "places": torch.tensor([1], dtype=torch.int16)}
    keep_tensors(file, "a", tensors, {"seconds": 0.1})
    found, about = kept_tensors(file, "a") or ({}, {})
    assert about == {"seconds": 0.1} and found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert kept_tensors(file, "b") is None
    (tmp_path / ".own.safetensors.partial").write_bytes(b"cut")
    (tmp_path / "part.json").write_text(json.dumps({"mark": "a"}))
    drop_tensors(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_names_of_parts_are_names_of_files() -> None:
    names = {
        "cat, 1/n each": "cat-1-n-each",
        "Own adapter, another's": "own-adapter-another-s",
        "0.5 (kept)": "0-5-kept",
    }
    assert {name: file_name(name) for name in names} == names
