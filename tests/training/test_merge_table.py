"""The table of merges on a tiny model: its rows, and that exact ways are what they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.cli import app
from molora.errors import ConfigError
from molora_training.data import Example, write_examples
from molora_training.evaluate import losses
from molora_training.merge_table import MergeTable, MergeTableSettings, must
from tests.unit.spoken import make_spoken, save_spoken

SAYS = {"math": "four", "code": "none", "law": "guilty"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    spoken = make_spoken(tmp_path / "adapters")
    with torch.no_grad():
        spoken.base.get_output_embeddings().weight.mul_(20)
    save_spoken(spoken, tmp_path)
    stack = Stack([StackLayer("domain", {name: tmp_path / "adapters" / name for name in SAYS})])
    model = MoLoRAModel.from_base(
        str(tmp_path / "base"), stack, RouterConfig(width=8, hidden=16), tokenizer=spoken.tokenizer
    )
    model.base_name = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "stacked")
    for name, says in SAYS.items():
        for split in ("train", "test"):
            rows = [
                Example(f"{name}{n}", name, split, ({"role": "user", "content": f"{n}?"},
                        {"role": "assistant", "content": f"{says} {n}"}))
                for n in range(3)
            ]  # fmt: skip
            write_examples(tmp_path / "data" / f"{name}.{split}.jsonl", rows)
    return tmp_path / "stacked"


def test_the_command_has_every_way(saved: Path, tmp_path: Path, capsys: Any) -> None:
    given = [f"model={saved}", f"data={tmp_path / 'data'}", "counts=[2,8]", "densities=[0.5]", "soup_steps=2"]
    app(["eval", "merges", *given, "--out", str(tmp_path / "o.json"), "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "o.json").read_text())
    assert report["names"] == list(SAYS) and {row["adapters"] for row in report["rows"]} == {2, 3}
    ways = [row["way"] for row in report["rows"] if row["adapters"] == 3]
    assert ways == [
        "base", "each on its own text", "routed by token", "cat, 1/n each", "cat, 1 each", "svd to rank 16, 1/n each",
        "linear", "ties, 0.5 kept", "ties_svd, 0.5 kept", "dare_linear, 0.5 kept", "dare_linear_svd, 0.5 kept",
        "dare_ties, 0.5 kept", "dare_ties_svd, 0.5 kept", "magnitude_prune, 0.5 kept",
        "magnitude_prune_svd, 0.5 kept", "knots, 0.5 kept", "LoRA Soups, CAT",
    ]  # fmt: skip
    rows = {row["way"]: row for row in report["rows"] if row["adapters"] == 3}
    assert rows["base"]["gain_kept"] == 0.0 and rows["each on its own text"]["gain_kept"] == pytest.approx(1.0)
    # Twelve ranks of three adapters fit into sixteen: nothing is cut.
    assert rows["svd to rank 16, 1/n each"]["loss"] == pytest.approx(rows["cat, 1/n each"]["loss"], rel=1e-2)
    assert rows["cat, 1 each"]["error"] < 1e-2 < rows["ties, 0.5 kept"]["error"]
    assert [one["name"].split(":")[0] for one in report["must"]] == ["2 adapters", "3 adapters"]
    assert report["must"] == must(report["rows"])


def test_short_answers_are_those_of_the_stack_itself(saved: Path, tmp_path: Path) -> None:
    model = MoLoRAModel.from_pretrained(saved, dtype=torch.float32).eval()
    table = MergeTable(model, MergeTableSettings(saved, data=tmp_path / "data", soup_steps=0, densities=(0.5,)))
    rows = {row["way"]: row["short_answers"] for row in table.rows(3)}
    for way, choice in (("base", lambda _: None), ("each on its own text", lambda name: name)):
        found = [losses(model, table.test[name], {"domain": choice(name)}, 1) for name in SAYS]
        assert all(one.asked.sum() == 3 for one in found)
        assert rows[way] == pytest.approx(sum(one.accuracy for one in found) / 3)
    # An adapter that is made to answer right: every token of its own answers the likeliest.
    exact = table.alone["math"]
    table.alone["math"] = replace(exact, exact=exact.asked)
    row = table._row("made", ["math"], {"math": table.alone["math"]})
    assert row["short_answers"] == 1.0


@torch.no_grad()
def test_weights_at_run_time_are_the_exact_merge(saved: Path, tmp_path: Path) -> None:
    model = MoLoRAModel.from_pretrained(saved, dtype=torch.float32).eval()
    settings = MergeTableSettings(saved, data=tmp_path / "data", soup_steps=0, densities=(0.5,))
    table = MergeTable(model, settings)
    merged = next(row for row in table.rows(2) if row["way"] == "cat, 1 each")
    selection = {"domain": {"math": 1.0, "code": 1.0}}
    with model.routing.active(lambda: model._resolve(selection)):
        losses = {name: table._losses(name, None) for name in ("math", "code")}
    assert table._row("stacked", ["math", "code"], losses)["loss"] == pytest.approx(merged["loss"], rel=1e-4)


def test_what_does_not_fit(saved: Path, tmp_path: Path) -> None:
    model = MoLoRAModel.from_pretrained(saved)
    with pytest.raises(ConfigError, match="test data of 0 adapters"):
        MergeTable(model, MergeTableSettings(saved, data=tmp_path))
    with pytest.raises(ConfigError, match="counts are whole numbers from 2"):
        MergeTableSettings(saved, counts=(1, 2))
