"""How much adapters fight: figures against dense float64, advice, measured losses against PEFT, page and command."""

import copy
import json
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor

from molora import Stack, StackLayer
from molora.adapter import Adapter
from molora.cli import app
from molora.commands.interference import adapters_at, interference
from molora.compose import interference as compared
from molora.compose.heat_map import heat_page, show
from molora.compose.interference import Pair, by_losses, by_weights, pairs
from molora.errors import AdapterMismatchError, ConfigError, DataError, StackError
from molora.factors import of_adapter
from molora_training.data import Encoded, Example, encode, write_examples
from molora_training.interference import losses, read_rows
from tests.conftest import write_adapter
from tests.unit.spoken import make_spoken, save_spoken

SIZES = {"up": (24, 40), "down": (40, 24), "key": (24, 8)}
Made = dict[str, tuple[Tensor, Tensor]]


def some(seed: int, rank: int = 3, modules: tuple[str, ...] = tuple(SIZES)) -> Made:
    chance = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, SIZES[name][0], generator=chance), torch.randn(SIZES[name][1], rank, generator=chance),
        )
        for name in modules
    }  # fmt: skip


def scaled(factors: Mapping[str, tuple[Tensor, Tensor]], by: float) -> Made:
    return {name: (A, B * by) for name, (A, B) in factors.items()}


def only(first: Made, second: Made, **more: Any) -> Pair:
    (pair,) = pairs({"first": first, "second": second}, **more)
    return pair


def figures(pair: Pair) -> list[float]:
    return [pair.overlap_in, pair.overlap_out, pair.cosine, pair.sign_conflict]


def dense(first: Made, second: Made) -> list[float]:
    """The figures by their definitions, deltas and projectors made whole."""
    inner, weights, squares = 0.0, 0.0, [0.0, 0.0]
    overlaps, shared, opposed = [0.0, 0.0], 0.0, 0.0
    for name in first.keys() & second.keys():
        one, other = ((B.double() @ A.double()) for A, B in (first[name], second[name]))
        inner += float((one * other).sum())
        squares = [squares[0] + float(one.square().sum()), squares[1] + float(other.square().sum())]
        weight = float(one.norm() * other.norm())
        weights += weight
        for side, half in enumerate((lambda pair: pair[0].T, lambda pair: pair[1])):
            spans = [half(pair).double() for pair in (first[name], second[name])]
            projectors = [span @ torch.linalg.pinv(span, rtol=1e-6) for span in spans]
            least = min(int(torch.linalg.matrix_rank(span, rtol=1e-6)) for span in spans)
            overlaps[side] += weight * float((projectors[0] * projectors[1]).sum()) / least
        smaller = torch.minimum(one.abs(), other.abs())
        shared += float(smaller.sum())
        opposed += float(smaller[one * other < 0].sum())
    return [*(one / weights for one in overlaps), inner / (squares[0] * squares[1]) ** 0.5, opposed / shared]


@pytest.mark.parametrize("block", [50, 2**20], ids=["by rows", "whole"])
def test_figures_are_those_of_the_deltas(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compared, "_BLOCK", block)
    adapters = {"a": some(0), "b": some(1, 7), "c": some(2, 1, ("up", "key")), "d": some(3, 12, ("key",))}
    for name in SIZES:  # c and d not far from a, and of ranks that are less than they look
        A, B = adapters["a"][name]
        if name in adapters["c"]:
            adapters["c"][name] = (torch.cat([A, A[:1]]), torch.cat([B, B[:, :1]], 1) + 0.1)
    found = pairs(adapters)
    assert [(one.first, one.second) for one in found] == [*zip("aaabbc", "bcdcdd", strict=True)]
    assert [one.modules for one in found] == [3, 2, 1, 2, 1, 1]
    for one in found:
        assert figures(one) == pytest.approx(dense(adapters[one.first], adapters[one.second]), abs=1e-6)


def test_the_same_the_opposite_and_the_scale() -> None:
    first, second = some(0), some(1, 5)
    assert figures(only(first, first)) == pytest.approx([1, 1, 1, 0], abs=1e-9)
    assert figures(only(first, scaled(first, -1))) == pytest.approx([1, 1, -1, 1], abs=1e-9)
    as_they_are = figures(only(first, second))
    assert figures(only(scaled(first, 300), scaled(second, 300))) == pytest.approx(as_they_are, abs=1e-6)
    assert figures(only(scaled(first, 1e-9), scaled(second, 1e-9))) == pytest.approx(as_they_are, abs=1e-6)
    apart = figures(only(scaled(first, 1e-4), scaled(second, 300)))  # signs count by the smaller magnitude
    assert apart[:3] == pytest.approx(as_they_are[:3], abs=1e-6)
    turned = figures(only(scaled(first, -1), second))
    assert turned == pytest.approx([*as_they_are[:2], -as_they_are[2], 1 - as_they_are[3]], abs=1e-6)
    assert figures(only(second, first)) == pytest.approx(as_they_are, abs=1e-6)


def test_what_shares_nothing_has_figures_of_zero() -> None:
    A, B = torch.zeros(2, 2, 24), torch.zeros(2, 40, 2)
    A[0, :, :9], A[1, :, 9:], B[0, :20], B[1, 20:] = 1 + torch.rand(2, 9), torch.rand(2, 15), 1.0, -1.0
    apart = only({"up": (A[0], B[0])}, {"up": (A[1], B[1])})
    assert figures(apart) == pytest.approx([0, 0, 0, 0], abs=1e-12) and (apart.modules, apart.advice) == (1, "stack")
    elsewhere = only(some(0, 2, ("up",)), some(0, 2, ("down",)))
    assert figures(elsewhere) == [0, 0, 0, 0] and (elsewhere.modules, elsewhere.advice) == (0, "stack")
    untrained = only(some(0), scaled(some(1), 0))  # B of zeros, as PEFT begins
    assert figures(untrained) == [0, 0, 0, 0]


def test_adapters_of_two_bases_are_not_compared() -> None:
    with pytest.raises(AdapterMismatchError, match="'up' first maps 24 to 40 features and second 40 to 24"):
        only(some(0, 2, ("up",)), {"up": some(0)["down"]})


def wide(seed: int) -> Made:
    chance = torch.Generator().manual_seed(seed)
    return {"wide": (torch.randn(2, 200, generator=chance), torch.randn(150, 2, generator=chance))}


def test_each_rule_for_weights_is_reached() -> None:
    first, other = wide(0), wide(1)
    (A, B), (_, D) = first["wide"], other["wide"]
    cases = {
        "they barely touch": ("stack", other),
        "they pull the same way": ("merge", {"wide": (A, B + 0.5 * D)}),
        "they pull against each other": ("route", {"wide": (A, D - B)}),
        "they meet without agreeing": ("route", {"wide": (A, D)}),
        "they adapt no module in common": ("stack", {"narrow": (A, B)}),
    }
    for why, (advice, second) in cases.items():
        pair = only(first, second)
        assert (pair.advice, pair.costs) == (advice, None) and pair.why.startswith(why)
    assert [by_weights(1, 0.0, cosine, 0.5)[0] for cosine in (0.09, 0.1, 0.29, 0.3)] == [
        "stack", "route", "route", "merge",
    ]  # fmt: skip
    assert [by_weights(1, shared, 0.0, 0.5)[0] for shared in (0.19, 0.2)] == ["stack", "route"]
    assert [by_weights(1, 0.0, 0.0, signs)[0] for signs in (0.3, 0.4, 0.6, 0.7)] == ["route", "stack", "stack", "route"]


def test_each_rule_for_losses_is_reached() -> None:
    def said(to_first: float, to_second: float, cosine: float = 0.0, base: float = 3.0) -> tuple[str, str]:
        return by_losses(("x/a", "x/b"), torch.tensor([[2, 2 + to_first, base], [1 + to_second, 1, 3.0]]), cosine)

    assert said(0.01, 0.01) == ("stack", "neither costs the other more than 1.0% of its gain over the base")
    assert said(-0.5, -0.1)[0] == "stack"  # each helps the other
    assert said(0.01, 0.03, 0.3) == (
        "merge", "they pull the same way (cosine 0.30), and neither costs the other more than 1.5% of its gain over "
        "the base",
    )  # fmt: skip
    assert said(0.5, 0.0, 0.9) == ("route", "x/b costs x/a 50% of its gain over the base")
    assert said(0.0, 0.05) == ("route", "x/a costs x/b 2% of its gain over the base")
    assert said(0.0, 0.0, base=2.0) == ("route", "x/a gains nothing over the base on its own data")


def test_losses_decide_where_they_are_there() -> None:
    adapters = {name: wide(seed) for seed, name in enumerate("abc")}
    nan = float("nan")
    given = torch.tensor([[2, 2.0, 2, 3], [2.5, 2, 2, 3], [nan, nan, nan, nan]], dtype=torch.float64)
    first, *others = pairs(adapters, given)
    assert (first.advice, first.costs) == ("route", (0.0, 0.5)) and "a costs b 50%" in first.why
    for pair in others:  # c has no data
        assert (pair.advice, pair.costs) == ("stack", None) and "barely touch" in pair.why
    same = {"a": wide(0), "b": scaled(wide(0), 2)}
    assert only(*same.values()).advice == "merge"
    assert only(*same.values(), losses=given[:2, [0, 1, 3]]).advice == "route"


def rows_of(tokenizer: Any, *turns: tuple[str, str]) -> list[Encoded]:
    return [
        encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}], tokenizer, ["x"], ["x"])
        for q, a in turns
    ]


@torch.no_grad()
def test_losses_are_those_of_peft(tmp_path: Path) -> None:
    model = make_spoken(tmp_path, domains=())
    plain, tokenizer = copy.deepcopy(model.base), model.tokenizer
    write_adapter(plain, tmp_path / "wide", 7, r=6, use_rslora=True)
    names = ["math", "code", "wide"]
    rows = {
        "math": rows_of(tokenizer, ("1+1?", "two"), ("And what of all the rest?", "that is much more"), ("a", "b")),
        "code": rows_of(tokenizer, ("print", "print('yes')")),
    }
    steps: list[tuple[int, int]] = []
    adapters = {name: of_adapter(Adapter.load(tmp_path / name)) for name in names}
    found = losses(model.base, tokenizer, adapters, rows, lambda done, of: steps.append((done, of)))
    assert steps == [(done, steps[-1][1]) for done in range(1, len(steps) + 1)] and steps[-1][0] == steps[-1][1]
    assert len(steps) == int(found.isfinite().sum())
    assert found.shape == (3, 4) and bool(found[2].isnan().all())
    assert not any(module._forward_hooks for module in model.base.modules())

    def wanted(peft: Any, some: list[Encoded]) -> float:
        each = []
        for row in some:
            logits = peft(row.input_ids[None]).logits[0, :-1]
            each.append(torch.nn.functional.cross_entropy(logits, row.labels[1:], reduction="none")[row.labels[1:] > 0])
        return float(torch.cat(each).double().mean())

    peft: Any = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "math", adapter_name="math")
    for name in names[1:]:
        peft.load_adapter(tmp_path / name, adapter_name=name)
    for i, name in enumerate(rows):
        for j, other in enumerate(names):
            acting = name if i == j else f"{name}_{other}"
            if i != j:
                peft.add_weighted_adapter([name, other], [1.0, 1.0], acting, combination_type="cat")
            peft.set_adapter(acting)
            assert float(found[i, j]) == pytest.approx(wanted(peft, rows[name]), abs=1e-4)
        assert float(found[i, 3]) == pytest.approx(wanted(plain, rows[name]), abs=1e-4)
    assert len({round(value, 5) for value in found[:2].flatten().tolist()}) == 8  # no two are alike


def write_data(folder: Path, name: str, split: Any, answers: list[str]) -> None:
    turns = [({"role": "user", "content": "Say."}, {"role": "assistant", "content": answer}) for answer in answers]
    write_examples(
        folder / f"{name}.{split}.jsonl", [Example(f"{name}-{n}", name, split, turn) for n, turn in enumerate(turns)]
    )


def test_rows_are_the_first_that_fit(tmp_path: Path) -> None:
    tokenizer = make_spoken(tmp_path / "m", domains=()).tokenizer
    write_data(tmp_path, "math", "validation", ["not this"])
    write_data(tmp_path, "math", "test", ["long " * 300, "one", "two", "three"])
    write_data(tmp_path, "code", "validation", ["else this"])
    found = read_rows(tmp_path, ["domain/math", "domain/code", "user/ada"], tokenizer, 2)
    said = {name: [tokenizer.decode(row.labels[row.labels > 0]) for row in rows] for name, rows in found.items()}
    assert list(said) == ["domain/math", "domain/code"]
    assert [len(some) for some in said.values()] == [2, 1]
    assert all(word in text for word, text in zip(("one", "two"), said["domain/math"], strict=True))
    with pytest.raises(DataError, match="holds no data of user/ada"):
        read_rows(tmp_path, ["user/ada"], tokenizer, 2)


NAMES = ["domain/math", 'x/<script>"', "user/ada"]
LOSSES = torch.tensor([[1.21, 1.32, 1.22, 2.43], [2.5, 1.54, 1.55, 2.65], [float("nan")] * 4], dtype=torch.float64)


def compare() -> list[Pair]:
    return pairs({name: some(seed) for seed, name in enumerate(NAMES)}, LOSSES)


def test_the_page_has_every_figure_and_nothing_from_elsewhere() -> None:
    found = compare()
    page = heat_page(NAMES, found, LOSSES, "Who <fights>?")
    assert "<script" not in page and "&lt;script&gt;&quot;" in page and "Who &lt;fights&gt;?" in page
    assert not any(word in page for word in ("http", "src=", "@import", "url("))
    assert "color-scheme: light dark" in page and "prefers-color-scheme: dark" in page
    for pair in found:
        for value in figures(pair):
            assert page.count(f">{value:z.2f}</td>") >= 2  # a map has each pair twice
        assert f"<td>{pair.advice}</td>" in page and pair.why.replace("<script>", "&lt;script&gt;")[-20:] in page
    for value in LOSSES[:2].flatten().tolist():
        assert f">{value:.2f}</td>" in page
    assert 'title="data of domain/math, with user/ada: 1.220 (+0.010)"' in page and "user/ada: no data" in page
    assert page.count("<table") == 6 and heat_page(NAMES, found, None, "t").count("<table") == 5


@pytest.mark.parametrize("width", [140, 20], ids=["wide", "narrow"])
def test_a_terminal_shows_names_colours_and_advice(width: int) -> None:
    found, out = compare(), StringIO()
    show(Console(file=out, width=width, force_terminal=True, color_system="truecolor"), NAMES, found, LOSSES)
    text = "".join(out.getvalue().split())
    assert all(pair.advice in text for pair in found) and "why" in text
    assert ("48;2;" in text) == (width == 140)  # maps that do not fit are left out
    if width == 140:
        assert all(name in text for name in NAMES) and "cosine" in text and "1.32" in text


def test_a_terminal_is_not_steered_by_names() -> None:
    names, out = ["[red]a", "b\x1b[31m"], StringIO()
    show(Console(file=out, width=99), names, pairs({name: some(seed) for seed, name in enumerate(names)}))
    assert "\x1b" not in out.getvalue() and out.getvalue().count("[red]a") == 5


def adapter_folders(model: Any, root: Path) -> Path:
    for seed, name in enumerate(("math", "user/ada", "user/ben"), 10):
        write_adapter(model.base, root / name, seed, target_modules=["q_proj", "down_proj"])
    return root


def run(capsys: Any, *arguments: Any) -> Any:
    capsys.readouterr()
    interference(*arguments)
    return json.loads(capsys.readouterr().out)


def test_the_command_on_a_folder_a_stack_and_a_page(tmp_path: Path, capsys: Any) -> None:
    folder = adapter_folders(make_spoken(tmp_path / "m", domains=()), tmp_path / "adapters")
    record = run(capsys, str(folder), None, None, 8, True)
    labels = ["math", "user/ada", "user/ben"]
    assert record["adapters"] == labels and record["losses"] is None and record["left_out"] == []
    assert [(one["first"], one["second"]) for one in record["pairs"]] == [
        ("math", "user/ada"), ("math", "user/ben"), ("user/ada", "user/ben"),
    ]  # fmt: skip
    wanted = pairs({label: of_adapter(Adapter.load(folder / label)) for label in labels})
    assert [one["cosine"] for one in record["pairs"]] == [pair.cosine for pair in wanted]
    assert {one["modules"] for one in record["pairs"]} == {6}
    Stack([StackLayer("domain", {"math": "adapters/math"}), StackLayer("user", {"ada": "adapters/user/ada"})]).save(
        tmp_path / "stack.yaml"
    )
    record = run(capsys, str(tmp_path / "stack.yaml"), None, None, 8, True)
    assert record["adapters"] == ["domain/math", "user/ada"]
    assert record["pairs"][0]["cosine"] == pytest.approx(wanted[0].cosine)
    interference(str(folder), tmp_path / "page.html", None, 8, False)
    assert "3 adapters, 3 pairs" in capsys.readouterr().out and "user/ben" in (tmp_path / "page.html").read_text()
    app(["info", str(folder), "--interference"], standalone_mode=False)
    shown = capsys.readouterr()
    assert "user/ada" in shown.out and "with --data the losses decide" in shown.err
    with pytest.raises(ConfigError, match="belong to --interference"):
        app(["info", str(folder), "--html", "page.html"], standalone_mode=False)
    with pytest.raises(DataError, match="cannot be written"):
        interference(str(folder), tmp_path / "nowhere" / "page.html", None, 8, False)


def test_the_command_measures_what_has_data(tmp_path: Path, capsys: Any) -> None:
    model = make_spoken(tmp_path / "adapters", domains=("math", "code", "law"))
    place = save_spoken(model, tmp_path)
    write_data(tmp_path / "data", "math", "test", ["one", "two"])
    write_data(tmp_path / "data", "code", "validation", ["def f(): pass"])
    assert adapters_at(str(place))[0] == str(tmp_path / "base")
    interference(str(place), None, tmp_path / "data", 2, True)
    said = capsys.readouterr()
    record = json.loads(said.out)
    assert record["left_out"] == ["domain/law"] and "for want of data: domain/law" in said.err
    assert record["losses"][2] == [None] * 4 and all(value > 0 for row in record["losses"][:2] for value in row)
    first, *others = record["pairs"]
    table = record["losses"]
    assert first["costs"] == pytest.approx([table[0][1] - table[0][0], table[1][0] - table[1][1]], abs=1e-5)
    assert [one["costs"] for one in others] == [None, None]


def test_what_stops_with_a_sentence(tmp_path: Path) -> None:
    model = make_spoken(tmp_path / "m", domains=())
    write_adapter(model.base, tmp_path / "one" / "math", 1)
    for place, count in ((tmp_path / "one", "1 adapter:"), (tmp_path / "one" / "math", "0 adapters:")):
        with pytest.raises(ConfigError, match=f"holds {count} interference is between two or more"):
            interference(str(place), None, None, 8, True)
    with pytest.raises(StackError, match="There is no folder"):
        interference(str(tmp_path / "nowhere"), None, None, 8, True)
    with pytest.raises(DataError, match="holds no data of math, user/ada"):
        model.base.save_pretrained(tmp_path / "base")
        model.tokenizer.save_pretrained(tmp_path / "base")
        folder = adapter_folders(model, tmp_path / "adapters")
        for file in folder.rglob("adapter_config.json"):
            file.write_text(
                json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")})
            )
        interference(str(folder), None, tmp_path, 8, True)
