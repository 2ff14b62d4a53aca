"""The table of contenders on a tiny model: each row is what it says, and the lines that must hold follow from rows."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from molora import MoLoRAModel, StackLayer
from molora.errors import DataError
from molora_training import contenders as module
from molora_training import quality_sets
from molora_training.contenders import Contenders, Row, best_of
from molora_training.data import IGNORED, Example, write_examples
from molora_training.evaluate import LAYER, TOGETHER, losses
from molora_training.quality_sets import DOCUMENTS, IN_A_TURN, TURNS, UNSEEN, QualitySets, after
from molora_training.quality_table import best_router, figures, fill, must
from tests.unit.spoken import make_spoken

DOMAINS = ("math", "code")
LEARNT = ("LoRA Soups, CAT", "Arrow, top-1", "X-LoRA")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for domain in DOMAINS:
        for split in ("train", "validation", "test"):
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
def model(tmp_path_factory: pytest.TempPathFactory) -> MoLoRAModel:
    folder = tmp_path_factory.mktemp("spoken")
    model = make_spoken(folder)
    model.stack.layers.append(StackLayer(TOGETHER, {}, default=None))
    model.set_router(None)
    model.add_adapter(TOGETHER, "multitask", folder / "law")
    return model


@pytest.fixture(scope="module")
def table(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contenders]:
    folder = tmp_path_factory.mktemp("spoken")
    model = make_spoken(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_sets, "COUNT", 5)
        patch.setattr(quality_sets, "MIXED", (4, 4, 4, 2))
        patch.setattr(module, "LEARNT_STEPS", 2)
        sets = QualitySets(model, data)
        yield Contenders(model, sets, {"saved": model.router}, folder / "work")  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def before(table: Contenders) -> dict[str, torch.Tensor]:
    """The model's weights before anything was measured."""
    return {name: tensor.clone() for name, tensor in table.model.state_dict().items()}


@pytest.fixture(scope="module")
def rows(table: Contenders, before: dict[str, torch.Tensor]) -> dict[str, Row]:
    found = [contender.measure() for contender in table.all()]
    return {row.name: row for row in [*found, best_of([row for row in found if row.kind == "adapter"])]}


def test_every_contender_is_there_and_the_model_as_before(
    table: Contenders, rows: dict[str, Row], before: dict[str, torch.Tensor]
) -> None:
    names = list(rows)
    after = table.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert names[:2] == ["base", "label oracle"]
    assert {"math alone", "code alone", "base, one example of each domain"} <= set(names)
    rivals = {f"{what} by {scope}" for what in ("classifier", "nearest centroid") for scope in ("sequence", "turn")}
    assert {"per-sequence oracle", "uniform merge", *module.MERGES, *rivals, *LEARNT} <= set(names)
    assert {"MoLoRA saved, top-1 unit", "MoLoRA saved, top-2 softmax"} <= set(names)
    assert [contender.name for contender in table.all()] == [name for name in names if name != "per-sequence oracle"]
    again = table.all()[0].measure()  # the base, after all of them
    assert all(torch.equal(again.sets[name].loss, own.loss) for name, own in rows["base"].sets.items())
    assert list(table.model.stack[LAYER].adapters) == list(DOMAINS) and not list(table.work.iterdir())
    base, oracle = rows["base"], rows["label oracle"]
    for name in (TURNS, UNSEEN, DOCUMENTS, IN_A_TURN):
        assert figures(base, base, oracle)["sets"][name]["gap_closed"] == 0
        assert figures(oracle, base, oracle)["sets"][name]["gap_closed"] == 1
        tokens = {tuple(row.sets[name].tokens.sum(0).tolist()) for row in rows.values()}
        assert len(tokens) == 1  # the same answers for all
    for domain in DOMAINS:
        own = rows[f"{domain} alone"]
        assert torch.allclose(oracle.single[domain].loss, own.single[domain].loss, rtol=1e-5)


def test_the_lines_follow_from_the_rows(rows: dict[str, Row]) -> None:
    base, oracle, mine, ties = (rows[name] for name in ("base", "label oracle", "MoLoRA saved, top-1 unit", "TIES"))
    ordered = [base, oracle, *(row for name, row in rows.items() if name not in ("base", "label oracle"))]
    lines = {line["name"]: line for line in must(ordered)}
    own = figures(mine, base, oracle)["sets"]
    assert lines[f"{TURNS}: share of the gap closed"]["value"] == own[TURNS]["gap_closed"]
    below = lines[f"{DOCUMENTS}: below TIES, nats a token"]
    assert below["value"] == pytest.approx(ties.sets[DOCUMENTS].mean - mine.sets[DOCUMENTS].mean, abs=1e-6)
    gains = [
        (base.single[n].mean - mine.single[n].mean) / (base.single[n].mean - oracle.single[n].mean) for n in DOMAINS
    ]
    assert lines["single-domain: share of the oracle's gain, mean"]["value"] == pytest.approx(sum(gains) / 2)
    assert 0 <= mine.right["answer 17+"] <= 1 and set(mine.right) == {
        f"{part} {span}" for part in ("question", "answer") for span in ("1-4", "5-16", "17+")
    }
    assert not must(ordered[:5])
    assert must(ordered, "integrated") == []  # the model has none
    integrated = [*ordered, replace(mine, kind="integrated")]
    assert must(integrated) == list(lines.values())
    alike = {line["name"]: line["value"] for line in must(integrated, "integrated")}
    assert alike == {name: line["value"] for name, line in lines.items() if name in alike} and len(alike) > 10


def test_a_merge_of_all_at_equal_weights_is_the_uniform_merge(
    table: Contenders, rows: dict[str, Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MERGES", {"sum": ("cat", 1.0)})
    found = next(contender for contender in table.all() if contender.name == "sum").measure()
    for name, own in found.sets.items():
        assert torch.allclose(own.loss, rows["uniform merge"].sets[name].loss, rtol=1e-3)


def test_an_adapter_on_all_data_is_measured_as_what_it_is(model: MoLoRAModel, data: Path, tmp_path: Path) -> None:
    sets = QualitySets(model, data, limit=3)
    contender = next(one for one in Contenders(model, sets, {}, tmp_path).all() if one.kind == "multitask")
    row = contender.measure()
    expected = losses(model, sets.mixed[TURNS], {LAYER: None, TOGETHER: "multitask"}, 2)
    assert contender.name == "multitask: one LoRA on all data"
    assert torch.equal(row.sets[TURNS].loss, expected.loss)
    base = losses(model, sets.mixed[TURNS], {LAYER: None}, 2)
    assert not torch.allclose(row.sets[TURNS].loss, base.loss, rtol=1e-3)


def test_all_weights_learn_in_a_copy(
    model: MoLoRAModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FULL_TOKENS", 256)
    monkeypatch.setattr(module, "FULL_RATE", 1e-2)
    sets = QualitySets(model, data, limit=3)
    assert len(sets.questions(most=None)) == 2 * 8
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    row = next(one for one in Contenders(model, sets, {}, tmp_path).all() if one.kind == "full").measure()
    base = losses(model, sets.mixed[TURNS], {LAYER: None}, 2)
    assert row.sets[TURNS].mean < base.mean - 0.3 and row.sets[TURNS].tokens.sum() == base.tokens.sum()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base.state_dict().items())


def test_shots_go_before_and_are_not_counted(table: Contenders) -> None:
    shots, row = table.sets.shots(), table.sets.mixed[TURNS][0]
    both = after(shots, row)
    cut = len(shots.input_ids)
    assert torch.equal(both.input_ids[cut:], row.input_ids) and torch.equal(both.labels[cut:], row.labels)
    assert (both.labels[:cut] == IGNORED).all() and (shots.labels != IGNORED).any()
    assert both.segments.diff().min() >= 0 and int(both.segments[cut]) == len(DOMAINS)


def test_an_interrupted_table_goes_on_and_processes_share_it(
    table: Contenders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MERGES", {})
    monkeypatch.setattr(table, "work", tmp_path / "work")
    out, measured = tmp_path / "quality.json", list[str]()
    whole = Contenders.measured

    def measure(self: Contenders, name: str, *rest: object) -> Row:
        measured.append(name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return whole(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Contenders, "measured", measure)
    with pytest.raises(KeyboardInterrupt):
        fill(table, out, "molora eval quality", "mark")
    assert not out.exists()
    half = fill(table, out, "molora eval quality", "mark", share=(0, 2))
    assert half is not None and json.loads(out.read_text()) == half
    names = [contender.name for contender in table.all()]
    assert half["missing"] == [name for name in names[3::2] if name not in measured[:2]]
    assert {row["contender"] for row in half["rows"]} == set(names) - set(half["missing"])
    report = fill(table, out, "molora eval quality", "mark", share=(1, 2))
    assert report is not None and json.loads(out.read_text()) == report
    assert report["missing"] == [] and {row["contender"] for row in report["rows"]} > set(names)
    assert all(list(row["sets"]) == list(table.sets.mixed) for row in report["rows"])
    assert len(measured) == len(set(measured)) + 1  # only the interrupted one began twice
    assert {line["name"] for line in report["must"]} and all(
        set(line) == {"name", "value", "bar", "better", "holds", "note"} for line in report["must"]
    )
    assert fill(table, out, "molora eval quality", "another mark", share=(0, 99)) is None
    assert measured[-1] == "base"  # of other adapters or text nothing is kept


def test_a_router_is_chosen_on_validation(table: Contenders, data: Path, tmp_path: Path) -> None:
    sets = QualitySets(table.model, data, split="validation")
    assert UNSEEN not in sets.mixed and sets.examples("validation")["math"][0].split == "validation"
    routers = {"one": table.routers["saved"], "two": table.routers["saved"]}
    found = Contenders(table.model, sets, routers, tmp_path).all()
    assert {one.kind for one in found} == {"base", "oracle", "adapter", "router"}
    assert {"MoLoRA one, top-2 softmax", "MoLoRA two, top-1 unit"} <= {one.name for one in found}
    assert "MoLoRA two, top-2 softmax" not in {one.name for one in found}  # for the first alone
    report = fill(Contenders(table.model, sets, routers, tmp_path), tmp_path / "chosen.json", "molora eval", "mark")
    assert report is not None and report["data"].startswith("validation split") and report["must"]
    assert report["best"] == "MoLoRA one, top-1 unit"  # of two that are the same the first
    rows = [one.measure() for one in found if one.kind == "router"][:2]
    for own in (*rows[1].sets.values(), *rows[1].single.values()):  # top-2: it would be the best, and is no default
        own.loss.zero_()
    assert best_router(rows) == rows[0].name and best_router([]) is None
    assert not any(UNSEEN in line["name"] for line in report["must"])


def test_a_router_that_gives_up_single_domains_is_not_chosen() -> None:
    def row(name: str, kind: str, mixed: float, math: float, code: float) -> Any:
        own = {key: SimpleNamespace(mean=value) for key, value in (("math", math), ("code", code))}
        return SimpleNamespace(name=name, kind=kind, sets={TURNS: SimpleNamespace(mean=mixed)}, single=own)

    ends = [row("base", "base", 3.0, 2.0, 4.0), row("label oracle", "oracle", 1.0, 1.0, 2.0)]
    keeps = row("MoLoRA keeps, top-1 unit", "router", 1.5, 1.009, 2.018)  # 99.1% of each
    better = row("MoLoRA better, top-1 unit", "router", 0.5, 1.0, 2.06)  # 98.5%, and the lower loss
    assert best_router([*ends, better, keeps]) == keeps.name
    assert best_router([*ends, better]) == best_router([better, keeps]) == better.name  # there is nothing else to go by


def test_a_domain_without_unseen_forms_is_named(table: Contenders, tmp_path: Path) -> None:
    for domain in DOMAINS:
        rows = [Example(f"{domain}-{n}", domain, "test", messages(domain, n)) for n in range(4)]
        write_examples(tmp_path / f"{domain}.test.jsonl", rows)
    with pytest.raises(DataError, match="math has no test example"):
        QualitySets(table.model, tmp_path)
