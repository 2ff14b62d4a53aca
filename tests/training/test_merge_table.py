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
from molora_training import merge_table
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


def test_what_is_kept_is_a_mean_over_adapters_each_beside_its_own_bounds(saved: Path, tmp_path: Path) -> None:
    def part(**losses: float) -> dict[str, Any]:
        return {"losses": {name: own_part(loss) for name, loss in losses.items()}}

    def own_part(loss: float) -> dict[str, list[float]]:
        return {**like, "loss": [loss] * len(like["loss"])}

    model = MoLoRAModel.from_pretrained(saved, dtype=torch.float32).eval()
    table = MergeTable(model, MergeTableSettings(saved, data=tmp_path / "data"))
    like = as_lists({"math": table._losses("math", None)})["math"]
    base, alone = part(math=4.0, code=10.0), part(math=2.0, code=0.0)
    found = row("half and none", ["math", "code"], part(math=3.0, code=10.0), base, alone)  # 1/2 and 0
    assert found["gain_kept"] == pytest.approx(0.25) and found["gain_kept_interval"] == pytest.approx([0.25, 0.25])
    assert row("whole", ["math"], part(math=2.0), base, alone)["gain_kept"] == pytest.approx(1.0)


def test_a_soup_is_held_against_the_best_other_merge() -> None:
    def one(way: str, kept: float, **more: float) -> dict[str, Any]:
        return {"adapters": 2, "way": way, "gain_kept": kept, **more}

    rows = [
        one("routed by token", 0.99), one("knots, 0.5 kept", 0.7, bytes=1), one("cat, 1/n each", 0.5, bytes=1),
        one("LoRA Soups, CAT", 0.6, bytes=1),
    ]  # fmt: skip
    (found,) = must(rows)
    assert found["value"] == pytest.approx(-0.1) and not found["holds"] and found["note"] == "knots, 0.5 kept"


def test_each_way_is_made_of_its_adapters_and_weights(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MoLoRAModel.from_pretrained(saved, dtype=torch.float32).eval()
    table = MergeTable(model, MergeTableSettings(saved, data=tmp_path / "data", densities=(0.5,), soup_steps=2))
    ways = {way.title: way for way in table.ways(2)}
    merges, soups, routed = [], [], []

    class Stop(Exception):
        pass

    def merging(paths: Any, out: Path, method: str, *, weights: Any, density: float, **_: Any) -> Any:
        merges.append((list(paths), method, weights, density))
        raise Stop

    def souping(base: Any, paths: Any, rows: Any, *_: Any, **__: Any) -> Any:
        soups.append((list(paths), rows))
        raise Stop

    monkeypatch.setattr(merge_table, "merge", merging)
    monkeypatch.setattr(merge_table, "train_soup", souping)
    for way in ways.values():
        if way.title != "routed by token":
            with pytest.raises(Stop):
                way.measure()
    half = {"cat, 1/n each", "svd to rank 16, 1/n each", "linear"} | {
        title for title in ways if title.startswith(("dare_linear", "magnitude_prune"))
    }
    others = [title for title in ways if title not in ("routed by token", "LoRA Soups, CAT")]
    for title, (names, method, weights, density) in zip(others, merges, strict=True):
        assert names == ["math", "code"] and weights == [0.5 if title in half else 1.0] * 2
        assert title.startswith(method) and density == (0.5 if "kept" in title else 1.0)
    ((names, rows),) = soups
    assert names == ["math", "code"] and rows == [*table.train["math"], *table.train["code"]]

    def resolving(selection: Any) -> Any:
        routed.append(selection)
        raise Stop

    monkeypatch.setattr(model, "_resolve", resolving)
    with pytest.raises(Stop):
        ways["routed by token"].measure()
    assert routed == [{"domain": ["math", "code"]}]


def test_each_adapter_is_asked_about_its_own_text(saved: Path, tmp_path: Path) -> None:
    model = MoLoRAModel.from_pretrained(saved, dtype=torch.float32).eval()
    table = MergeTable(model, MergeTableSettings(saved, data=tmp_path / "data"))
    alone = table.bounds()[1].measure()["losses"]
    for name in SAYS:
        expected = losses(model, table.test[name], {"domain": name}, 1)
        assert alone[name]["loss"] == pytest.approx(expected.loss.flatten().tolist(), rel=1e-5)
    assert len({tuple(one["loss"]) for one in alone.values()}) == len(SAYS)


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
