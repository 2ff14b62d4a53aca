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
from molora_training.merge_table import MergeTable, MergeTableSettings, as_lists, from_lists, must, row, run
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
    table = MergeTable(model, MergeTableSettings(saved, data=tmp_path / "data"))
    base, alone = (way.measure() for way in table.bounds())
    rows = {
        way.title: row(way.title, way.names, part, base, alone)["short_answers"]
        for way, part in zip(table.bounds(), (base, alone), strict=True)
    }
    for way, choice in (("base", lambda _: None), ("each on its own text", lambda name: name)):
        found = [losses(model, table.test[name], {"domain": choice(name)}, 1) for name in SAYS]
        assert all(one.asked.sum() == 3 for one in found)
        assert rows[way] == pytest.approx(sum(one.accuracy for one in found) / 3)
    # An adapter that is made to answer right: every token of its own answers the likeliest.
    own = alone["losses"]["math"]
    made = {"losses": {"math": {**own, "exact": own["asked"]}}}
    assert row("made", ["math"], made, base, alone)["short_answers"] == 1.0


def test_losses_are_kept_to_the_last_bit(saved: Path, tmp_path: Path) -> None:
    model = MoLoRAModel.from_pretrained(saved, dtype=torch.float32).eval()
    table = MergeTable(model, MergeTableSettings(saved, data=tmp_path / "data"))
    found = table._losses("math", None)
    kept = from_lists(json.loads(json.dumps(as_lists({"math": found})))["math"])
    for name, value in vars(found).items():
        assert torch.equal(getattr(kept, name), value) and getattr(kept, name).dtype == value.dtype


@torch.no_grad()
def test_weights_at_run_time_are_the_exact_merge(saved: Path, tmp_path: Path) -> None:
    model = MoLoRAModel.from_pretrained(saved, dtype=torch.float32).eval()
    settings = MergeTableSettings(saved, data=tmp_path / "data", soup_steps=0, densities=(0.5,))
    table = MergeTable(model, settings)
    base, alone = (way.measure() for way in table.bounds())
    merged = next(way for way in table.ways(2) if way.title == "cat, 1 each")
    selection = {"domain": {"math": 1.0, "code": 1.0}}
    with model.routing.active(lambda: model._resolve(selection)):
        losses = {name: table._losses(name, None) for name in ("math", "code")}
    stacked = row("stacked", merged.names, {"losses": as_lists(losses)}, base, alone)
    expected = row(merged.title, merged.names, merged.measure(), base, alone)
    assert merged.names == ["math", "code"] and stacked["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_an_interrupted_table_goes_on_and_processes_share_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = MergeTableSettings(saved, data=tmp_path / "data", counts=(2, 3), densities=(0.5,), soup_steps=2)
    measure, measured = MergeTable._losses, []

    def go(out: str, stops: int = 0, share: tuple[int, int] = (0, 1), **changed: Any) -> dict[str, Any] | None:
        """The report without its times; None while ways are missing, or if measuring the losses was interrupted."""
        measured.clear()

        def counting(*given: Any) -> Any:
            measured.append(given)
            if len(measured) == stops:
                raise KeyboardInterrupt
            return measure(*given)

        monkeypatch.setattr(MergeTable, "_losses", counting)
        try:
            report = run(replace(settings, **changed), tmp_path / out, "x", share)
        except KeyboardInterrupt:
            return None
        if report is None:
            return None
        assert report == json.loads((tmp_path / out).read_text())
        return {**report, "rows": [{**one, "seconds": 0} for one in report["rows"]]}

    whole = go("whole.json")
    every = len(measured)
    assert whole is not None and every == 2 * 3 + 15 * (2 + 3)  # base and alone; 15 ways of two and of three
    assert go("o.json", stops=14) is None and not (tmp_path / "o.json").is_file()
    assert go("o.json") == whole and len(measured) == every - 12  # the way that was begun is measured anew
    assert go("o.json") == whole and not measured
    assert go("fewer.json", counts=(2,)) is not None
    assert go("fewer.json") == whole and len(measured) == 15 * 3  # of more adapters only what there is not
    assert go("shared.json", share=(0, 2)) is None and not (tmp_path / "shared.json").is_file()
    of_one = len(measured)
    assert go("shared.json", share=(1, 2)) == whole and of_one + len(measured) == every
    few = {"limit": 2, "counts": (2,)}
    # Nothing is used of other settings, of other text or of another router.
    assert go("o.json", **few) is not None and len(measured) == 2 * 3 + 15 * 2
    text = (tmp_path / "data" / "law.test.jsonl").read_text()
    (tmp_path / "data" / "law.test.jsonl").write_text(text.replace("guilty", "free"))
    assert go("o.json", **few) is not None and len(measured) == 2 * 3 + 15 * 2
    model = MoLoRAModel.from_pretrained(saved)
    assert model.router is not None
    torch.nn.init.normal_(model.router.parts[0].output.weight)
    model.save_pretrained(saved)
    assert go("o.json", **few) is not None and len(measured) == 2 * 3 + 15 * 2


def test_what_does_not_fit(saved: Path, tmp_path: Path) -> None:
    model = MoLoRAModel.from_pretrained(saved)
    with pytest.raises(ConfigError, match="test data of 0 adapters"):
        MergeTable(model, MergeTableSettings(saved, data=tmp_path))
    with pytest.raises(ConfigError, match="counts are whole numbers from 2"):
        MergeTableSettings(saved, counts=(1, 2))
