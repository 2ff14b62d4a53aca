"""An adapter that comes later: the report is what the models do, and leaves the model as it was."""

import json
from pathlib import Path

import pytest
import torch

from molora.errors import ConfigError
from molora_training import adding
from molora_training.adding import must, run
from molora_training.data import Example, write_examples
from tests.unit.spoken import make_spoken, save_spoken

TEXTS = {"math": "12+34=46 78*9", "code": "def f(x): return", "law": "THE PARTY SHALL"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for domain, text in TEXTS.items():
        for split in ("train", "validation", "test"):
            rows = [Example(f"{domain}-{n}", domain, split, _messages(text, n)) for n in range(6)]
            write_examples(tmp_path / "data" / f"{domain}.{split}.jsonl", rows)
    return tmp_path / "data"


def _messages(text: str, n: int) -> tuple[dict[str, str], ...]:
    turned = text[n:] + text[:n]
    return {"role": "user", "content": turned}, {"role": "assistant", "content": turned[::-1]}


def saved(folder: Path, domains: tuple[str, ...] = ("math", "code")) -> Path:
    """A model on disk, whose base is there too."""
    model = make_spoken(folder / "adapters", domains)
    if "law" in domains:
        with torch.no_grad():
            for part in model.router.parts:
                part.output.bias[model.router.rows.index("domain/law")] += 4
    return save_spoken(model, folder)


def test_a_later_adapter_against_a_retrained_router(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adding, "SHORT", (8, 4, 4, 2))
    few, full = saved(tmp_path / "a"), saved(tmp_path / "b", ("math", "code", "law"))
    report = run(few, full, data, tmp_path / "adding.json", "molora eval adding", limit=24)
    assert json.loads((tmp_path / "adding.json").read_text()) == report and report["new"] == ["law"]
    by_name = {row["contender"]: row for row in report["rows"]}
    trained = {count: f"{count} examples, {adding.TRAINED}" for count in adding.EXAMPLES}
    counts = [name for count in adding.EXAMPLES for name in (f"{count} examples", trained[count])]
    assert list(by_name) == ["trained on all", "before", *counts]
    assert by_name["before"]["right"]["law"] == 0 < by_name["512 examples"]["right"]["law"]
    for row in (by_name[name] for name in trained.values()):
        assert row["right"] != by_name["512 examples"]["right"] and row["mixed_right"]["all"] > 0
    lines = {line["name"]: line for line in report["must"]}
    for how in ("128 examples", trained[128]):
        added, whole = by_name[how], by_name["trained on all"]
        value = lines[f"{how}: share of the retrained router's accuracy on law"]["value"]
        assert value == pytest.approx(added["right"]["law"] / whole["right"]["law"])
        value = lines[f"{how}: share of the retrained router's accuracy on all mixed"]["value"]
        assert value == pytest.approx(added["mixed_right"]["all"] / whole["mixed_right"]["all"])
        changes = [added["single"][n] / by_name["before"]["single"][n] - 1 for n in ("math", "code")]
        assert lines[f"{how}: loss on an old domain changes by"]["value"] == pytest.approx(max(map(abs, changes)))
    with pytest.raises(ConfigError, match="no adapter"):
        run(few, few, data, tmp_path / "x.json", "")
    assert must(report["rows"], report["new"]) == report["must"]
    assert not list((tmp_path / "runs").rglob("*.safetensors"))  # what it trained with is gone
