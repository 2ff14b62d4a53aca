"""The table of contenders on a tiny model: each row is what it says, and the lines that must hold follow from rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.errors import DataError
from molora_training import quality_table
from molora_training.data import Example, write_examples
from molora_training.evaluate import LAYER
from molora_training.quality_table import DOCUMENTS, IN_A_TURN, TURNS, UNSEEN, QualityTable, figures, fill, must
from tests.unit.spoken import make_spoken

DOMAINS = ("math", "code")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for domain in DOMAINS:
        for split in ("train", "test"):
            rows = [
                Example(
                    f"{domain}-{n}", domain, split, messages(domain, n), "form", unseen=split == "test" and n % 2 == 0
                )
                for n in range(8)
            ]
            write_examples(folder / f"{domain}.{split}.jsonl", rows)
    return folder


def messages(domain: str, n: int) -> tuple[dict[str, str], ...]:
    return {"role": "user", "content": f"{domain} {n}?"}, {"role": "assistant", "content": f"so {n}"}


@pytest.fixture(scope="module")
def table(data: Path, tmp_path_factory: pytest.TempPathFactory) -> QualityTable:
    model = make_spoken(tmp_path_factory.mktemp("spoken"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_table, "COUNT", 5)
        return QualityTable(model, data)


def test_every_contender_is_there_and_the_model_as_before(table: QualityTable, tmp_path: Path) -> None:
    model = table.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = list(table.rows(tmp_path))
    names = [row.name for row in rows]
    assert names[:4] == ["base", "label oracle", "math alone", "code alone"]
    rivals = {f"{what} by {scope}" for what in ("classifier", "nearest centroid") for scope in ("sequence", "turn")}
    assert {"per-sequence oracle", "uniform merge", *quality_table.MERGES, *rivals} <= set(names)
    assert names[-2:] == ["MoLoRA, top-1 unit", "MoLoRA, top-2 softmax"]
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert list(model.stack[LAYER].adapters) == list(DOMAINS) and not list(tmp_path.iterdir())
    base, oracle = rows[:2]
    found = {row.name: figures(row, base, oracle) for row in rows}
    for name in (TURNS, UNSEEN, DOCUMENTS, IN_A_TURN):
        assert found["base"]["sets"][name]["gap_closed"] == 0
        assert found["label oracle"]["sets"][name]["gap_closed"] == 1
        tokens = {tuple(row.sets[name].tokens.sum(0).tolist()) for row in rows}
        assert len(tokens) == 1  # the same answers for all
    for domain in DOMAINS:
        own = next(row for row in rows if row.name == f"{domain} alone")
        assert torch.allclose(oracle.single[domain].loss, own.single[domain].loss, rtol=1e-5)
    lines = {line["name"]: line for line in must(rows)}
    assert (
        lines[f"{TURNS}: share of the gap closed"]["value"] == found["MoLoRA, top-1 unit"]["sets"][TURNS]["gap_closed"]
    )
    below = lines[f"{DOCUMENTS}: below TIES, nats a token"]
    ties, mine = (next(row for row in rows if row.name == name) for name in ("TIES", "MoLoRA, top-1 unit"))
    assert below["value"] == pytest.approx(ties.sets[DOCUMENTS].mean - mine.sets[DOCUMENTS].mean, abs=1e-6)
    assert not must(rows[:5])


def test_a_merge_of_all_at_equal_weights_is_the_uniform_merge(table: QualityTable, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_table, "MERGES", {"sum": ("cat", 1.0)})
        rows = {row.name: row for row in table.rows(tmp_path)}
    for name, own in rows["sum"].sets.items():
        assert torch.allclose(own.loss, rows["uniform merge"].sets[name].loss, rtol=1e-3)


def test_a_report_is_written_as_it_grows(table: QualityTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(quality_table, "MERGES", {})
    whole = quality_table.write_report

    def write(report: dict[str, Any], out: Path) -> None:
        seen.append(len(report["rows"]))
        whole(report, out)

    monkeypatch.setattr(quality_table, "write_report", write)
    report = fill(table, tmp_path / "quality.json", "molora eval quality")
    assert seen == list(range(2, len(report["rows"]) + 1))
    assert json.loads((tmp_path / "quality.json").read_text()) == report
    assert all(set(line) == {"name", "value", "bar", "better", "holds", "note"} for line in report["must"])


def test_a_domain_without_unseen_forms_is_named(table: QualityTable, tmp_path: Path) -> None:
    for domain in DOMAINS:
        rows = [Example(f"{domain}-{n}", domain, "test", messages(domain, n)) for n in range(4)]
        write_examples(tmp_path / f"{domain}.test.jsonl", rows)
    with pytest.raises(DataError, match="math has no test example"):
        QualityTable(table.model, tmp_path)
