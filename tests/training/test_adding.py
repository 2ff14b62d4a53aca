"""An adapter that comes later: the report is what the models do, and leaves the model as it was."""

import json
from pathlib import Path

import pytest
import torch

from molora.errors import ConfigError
from molora_training import adding
from molora_training.adding import must, run
from molora_training.data import Example, write_examples
from tests.unit.spoken import make_spoken

TEXTS = {"math": "12+34=46 78*9", "code": "def f(x): return", "law": "THE PARTY SHALL"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for domain, text in TEXTS.items():
        for split in ("train", "test"):
            rows = [Example(f"{domain}-{n}", domain, split, _messages(text, n)) for n in range(6)]
            write_examples(tmp_path / "data" / f"{domain}.{split}.jsonl", rows)
    return tmp_path / "data"


def _messages(text: str, n: int) -> tuple[dict[str, str], ...]:
    turned = text[n:] + text[:n]
    return {"role": "user", "content": turned}, {"role": "assistant", "content": turned[::-1]}


def test_a_later_adapter_against_a_retrained_router(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, full = make_spoken(tmp_path / "a"), make_spoken(tmp_path / "b", ("math", "code", "law"))
    models = {tmp_path / "few": few, tmp_path / "full": full}
    monkeypatch.setattr(adding.MoLoRAModel, "from_pretrained", lambda folder, dtype: models[folder])
    with torch.no_grad():
        for part in full.router.parts:
            part.output.bias[full.router.rows.index("domain/law")] += 4
    rows_before = list(few.router.rows)
    report = run(tmp_path / "few", tmp_path / "full", data, tmp_path / "adding.json", "molora eval adding")
    assert json.loads((tmp_path / "adding.json").read_text()) == report and report["new"] == ["law"]
    by_name = {row["contender"]: row for row in report["rows"]}
    assert list(by_name) == ["trained on all", "before", "32 examples", "128 examples", "512 examples"]
    assert by_name["before"]["right"]["law"] == 0 < by_name["512 examples"]["right"]["law"]
    assert few.router.rows == rows_before and "law" not in few.stack["domain"].adapters
    ids = full.encode(few.tokenizer.decode([7]))  # the models still run
    assert torch.isfinite(few(**ids).logits).all()
    lines = {line["name"]: line for line in report["must"]}
    added, trained = by_name["128 examples"]["right"]["law"], by_name["trained on all"]["right"]["law"]
    assert lines["law: share of the retrained router's accuracy"]["value"] == pytest.approx(added / trained)
    changes = [by_name["128 examples"]["single"][n] / by_name["before"]["single"][n] - 1 for n in ("math", "code")]
    assert lines["loss on an old domain changes by"]["value"] == pytest.approx(max(map(abs, changes)))
    with pytest.raises(ConfigError, match="no adapter"):
        run(tmp_path / "few", tmp_path / "few", data, tmp_path / "x.json", "")
    assert must(report["rows"], report["new"]) == report["must"]
