"""A keyed layer: the question as a whole tells its adapter, by keys that come and go and leave the others alone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from transformers import DynamicCache

from molora import MoLoRAModel, Stack, StackLayer
from molora.adapter import Adapter
from molora.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    CacheError,
    NonFiniteError,
    SelectionError,
    StackError,
)
from molora.following import Following
from molora.key_file import KEY_FILE, MOST, MOST_BYTES, kept, read_key, write_key
from molora.keys import READS, LayerKeys, asked, entering
from molora.selection import router_rows
from molora.versions import Versions
from tests.conftest import DEVICE, FAMILIES, make_base, write_adapter
from tests.parity.test_equalities import close, make_routed
from tests.unit.spoken import make_spoken, save_spoken

TOPICS = {"low": (3, 35), "high": (60, 97), "odd": (35, 60)}  # of token ids
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}


def questions(topic: str, count: int = 30, seed: int = 0) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(seed + 1000 * list(TOPICS).index(topic))
    sizes = torch.randint(4, 20, (count,), generator=chance).tolist()
    return [torch.randint(*TOPICS[topic], (size,), generator=chance).to(DEVICE) for size in sizes]


def make_keyed(base: Any, paths: dict[str, Path], **more: Any) -> MoLoRAModel:
    """A model whose layer "task" finds each adapter by questions of its topic."""
    stack = Stack([StackLayer("task", dict(paths), keyed=True), *more.pop("layers", ())])
    model = MoLoRAModel.from_base(base, stack, **more).eval()
    for name in paths:
        model.keys.put("task", name, torch.stack([asked(model.base, one) for one in questions(name)]))
    return model


@pytest.fixture
def paths(base: Any, tmp_path: Path) -> dict[str, Path]:
    return {name: write_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("low", "high"), 1)}


@pytest.fixture
def model(base: Any, paths: dict[str, Path]) -> MoLoRAModel:
    return make_keyed(copy.deepcopy(base), paths)


def clouds(names: str, count: int = 40, size: int = 12) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=chance)
    return {
        n: torch.randn(count, size, generator=chance) @ mix + 2 * torch.randn(size, generator=chance) for n in names
    }


def test_the_nearest_is_what_discriminant_analysis_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molora.keys.SHRINKS", 0.0)
    known, keys = clouds("abcd"), LayerKeys()
    for name, own in known.items():
        keys.put(name, own)
    rows = torch.cat(list(known.values()))
    labels = [name for name, own in known.items() for _ in own]
    other = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4).fit(rows.numpy(), labels)
    found = keys.nearest(rows, "abcd")
    assert found == list(other.predict(rows.numpy())) and len(set(found)) == 4
    best = other.decision_function(rows.numpy())[:, [0, 2]].argmax(1)
    assert keys.nearest(rows, "ca") == ["ac"[place] for place in best]  # among some: the best of these


def test_who_came_first_and_who_left_makes_no_difference() -> None:
    known = clouds("abcd")
    one, other = LayerKeys(), LayerKeys()
    for name in "abcd":
        one.put(name, known[name])
    one.nearest(known["a"], "abcd")
    one.drop("b")
    for name in "dca":
        other.put(name, known[name])
    (names, weights, bias), expected = one._make(), other._make()
    assert names == expected[0] and torch.equal(weights, expected[1]) and torch.equal(bias, expected[2])
    assert one.nearest(known["a"], ["d"]) == ["d"] * 40


def test_a_key_keeps_few_questions() -> None:
    many = torch.arange(1000.0).unsqueeze(1).expand(-1, 8)
    few = kept(many)
    assert len(few) == MOST and few[0, 0] == 0 and few[-1, 0] == 255 * 1000 // 256
    wide = kept(torch.zeros(300, 4096))
    assert wide.nbytes == MOST_BYTES and len(kept(many[:5])) == 5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_enters_the_layer(family: str) -> None:
    base = make_base(family)
    ids = torch.randint(3, 97, (2, 9), device=DEVICE)
    states = base(ids, output_hidden_states=True).hidden_states
    layers = base.config.num_hidden_layers
    assert torch.equal(entering(base, input_ids=ids), states[min(READS, layers - 1)].float())
    embedded = base.get_input_embeddings()(ids)
    if family != "gemma3":  # which scales what it embeds
        torch.testing.assert_close(asked(base, embedded[0]), asked(base, ids[0]))
    close(base(ids).logits, base(ids).logits, 0.0)  # no hook is left


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_question_has_its_adapter_as_peft_runs_it(family: str, tmp_path: Path) -> None:
    base = make_base(family)
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    paths = {name: write_adapter(base, tmp_path / name, seed, **fan) for seed, name in enumerate(("low", "high"), 1)}
    model = make_keyed(copy.deepcopy(base), paths)
    others = {name: PeftModel.from_pretrained(copy.deepcopy(base), path).eval() for name, path in paths.items()}
    precise: dict[str, Any] = {
        name: PeftModel.from_pretrained(copy.deepcopy(base).double(), path, autocast_adapter_dtype=False).eval()
        for name, path in paths.items()
    }
    chosen = []
    for one in (*questions("low", 4, seed=7), *questions("high", 4, seed=7)):
        ids = one.unsqueeze(0)
        chosen.append(model.find(ids)["task"])
        peft = others[str(chosen[-1])]
        close(model(ids).logits.double(), precise[str(chosen[-1])].double()(ids).logits)
        expected = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), expected)
    assert chosen[:4].count("low") > chosen[4:].count("low")


def batch_of(rows: list[torch.Tensor], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.int64, device=DEVICE) for _ in range(2))
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_a_batch_is_told_one_by_one(model: MoLoRAModel, left: bool) -> None:
    rows = [*questions("low", 3, seed=7), *questions("high", 3, seed=7)]
    ids, mask = batch_of(rows, left)
    chosen = model.keys.choose(None, model.stack, {"input_ids": ids, "attention_mask": mask})
    assert chosen == [{"task": "low"}] * 3 + [{"task": "high"}] * 3
    forced = [{"task": name} for name in ("low", "high") for _ in range(3)]
    close(model(ids, mask).logits[mask.bool()], model(ids, mask, selection=forced).logits[mask.bool()])
    mixed: list[Any] = [{"task": "high"}, {"task": None}, None, {}, {"task": ["low"]}, {"task": ["high", "low"]}]
    told: list[Any] = [{"task": "high"}, {"task": None}, *({"task": name} for name in ("low", "high", "low", "high"))]
    assert model.keys.choose(mixed, model.stack, {"input_ids": ids, "attention_mask": mask}) == told
    if left:
        more: dict[str, Any] = {"num_beams": 2, "num_return_sequences": 2, **GREEDY}
        own = model.generate(input_ids=ids, attention_mask=mask, **more)
        named = model.generate(input_ids=ids, attention_mask=mask, selection=forced, **more)
        assert torch.equal(own, named) and len(own) == 12


@torch.no_grad()
def test_a_question_ends_where_the_answer_begins(model: MoLoRAModel) -> None:
    low, high = questions("low", 1, seed=7)[0], questions("high", 1, seed=7)[0]
    ids = torch.cat([low, *[high] * 6]).unsqueeze(0)
    assert model.find(ids) == {"task": "high"}  # all of it asks
    labels = ids.clone()
    labels[0, : len(low)] = -100
    expected = model(ids, selection={"task": "low"}, labels=labels)
    found = model(ids, labels=labels)
    close(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


@torch.no_grad()
def test_a_cache_holds_a_part_of_the_question(model: MoLoRAModel) -> None:
    ids = questions("low", 1, seed=7)[0].unsqueeze(0)
    cache = DynamicCache(config=model.config)
    selection = model.find(ids)
    first = model(ids[:, :-1], selection=selection, past_key_values=cache, use_cache=True)
    with pytest.raises(CacheError, match=r"'task' is told by the whole question.*model\.find"):
        model(ids[:, -1:], past_key_values=cache)
    last = model(ids[:, -1:], selection=selection, past_key_values=cache)
    close(torch.cat([first.logits, last.logits], 1), model(ids).logits)


def test_what_is_refused(model: MoLoRAModel, paths: dict[str, Path]) -> None:
    ids = questions("low", 1)[0].unsqueeze(0)
    with pytest.raises(StackError, match="keyed, so it cannot be shared"):
        StackLayer("task", {}, keyed=True, shared=True)
    with pytest.raises(StackError, match="its top_k is 1"):
        StackLayer("task", {}, keyed=True, top_k=2)
    with pytest.raises(StackError, match="keyed must be true or false"):
        StackLayer("task", {}, keyed="yes")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="no adapter 'third'"):
        model(ids, selection={"task": ["low", "third"]})
    with pytest.raises(SelectionError, match="2 selections were given for a batch of 3"):
        model(ids.expand(3, -1), selection=[{}, {}])
    with pytest.raises(SelectionError, match="One prompt is told at a time"):
        model.find(ids.expand(2, -1))
    with pytest.raises(SelectionError, match="a sequence without any token"):
        model(ids, attention_mask=torch.zeros_like(ids))
    undecided = model._resolve({"task": "auto"})
    with pytest.raises(SelectionError, match=r"'task' is told by a question.*model\.find"):
        model.routing.active(lambda: undecided).__enter__()
    model.add_adapter("task", "third", paths["low"])
    with pytest.raises(SelectionError, match="'third' has no key"):
        model(ids, selection={"task": ["low", "third"]})
    with pytest.raises(SelectionError, match="at least one and none of them empty"):
        model.fit_row("task", "third", [])


@torch.no_grad()
def test_without_keys_nothing_acts(base: Any, paths: dict[str, Path]) -> None:
    model = MoLoRAModel.from_base(copy.deepcopy(base), Stack([StackLayer("task", dict(paths), keyed=True)]))
    ids = questions("low", 1)[0].unsqueeze(0)
    assert model.find(ids) == {"task": None}
    close(model(ids).logits, base(ids).logits, 0.0)
    model.keys.put("task", "high", torch.randn(3, 32))
    assert model.find(ids) == {"task": "high"}  # the only one that may be meant


@torch.no_grad()
def test_beside_a_router(base: Any, adapters: dict[str, Path], paths: dict[str, Path]) -> None:
    """Layers that a router decides route as without the keyed one; what else acts does not change what is found."""
    routed = make_routed(base, adapters)
    plain = copy.deepcopy(routed.router)
    stack = Stack([StackLayer("task", dict(paths), keyed=True), *routed.stack.layers])
    assert router_rows(stack) == router_rows(routed.stack)
    model = MoLoRAModel.from_base(copy.deepcopy(base), stack, plain).eval()
    for name in paths:
        model.keys.put("task", name, torch.stack([asked(model.base, one) for one in questions(name)]))
    for name in paths:
        ids = questions(name, 1, seed=7)[0].unsqueeze(0)
        for more in ({}, {"personality": "sage", "user": "ada"}, {"domain": "code"}):
            assert model.find(ids, more) == {**more, "task": name}
            found = model(ids, selection=more, output_routes=True)
            close(found.logits, model(ids, selection={**more, "task": name}).logits, 0.0)
            own = found.routes.to_pandas() if hasattr(found.routes, "to_pandas") else found.routes
            assert own is not None
        one, other = (m(ids, selection={"domain": "auto"}, output_routes=True).routes for m in (model, routed))
        at = one.columns.index("domain")
        names = [[r.names[s] if s >= 0 else None for s in r.slots[0, :, c]] for r, c in
                 ((one, at), (other, other.columns.index("domain")))]  # fmt: skip
        assert names[0] == names[1]
        chosen = one.slots[0, :, one.columns.index("task")]
        assert {one.names[slot] for slot in chosen} == {f"task/{name}"}
    model.train()
    model(ids, selection={"task": "low", "domain": "auto"})
    model.eval()


def test_saved_and_loaded_as_it_was(tmp_path: Path) -> None:
    model = make_spoken(tmp_path / "adapters", ())
    folder = tmp_path / "adapters"
    model.stack.layers.append(StackLayer("task", {}, keyed=True))
    model._refresh()
    asks = {
        "math": ["11111111 22222222 33333333", "12121212 3434343434", "31313131 24242424"],
        "code": ["xxxxyyyyzzzz xxxxyyyyzzzz", "zyzyzyzy xyxyxyxy", "yyyyzzzzzz xxxxx"],
    }
    for name, examples in asks.items():
        model.add_adapter("task", name, folder / name, examples=examples)
    model.add_adapter("task", "law", folder / "law")
    chat = [{"role": "user", "content": "43214321 11223344"}]
    assert model.find(chat)["task"] == "math"
    saved = save_spoken(model, tmp_path)
    (entry,) = [one for one in json.loads((saved / "molora.json").read_text())["stack"]["layers"] if "keyed" in one]
    assert entry["name"] == "task" and entry["keyed"] is True
    loaded = MoLoRAModel.from_pretrained(saved, dtype=torch.float32)
    for name in asks:
        assert torch.equal(loaded.keys.of("task", name), model.keys.of("task", name))  # type: ignore[arg-type]
    assert loaded.keys.of("task", "law") is None
    assert loaded.find(chat) == model.find(chat)
    own = loaded.encode(chat)["input_ids"][0]
    assert own.tolist()[-1] == model.encode(chat)["input_ids"][0, -1]
    [*_, last] = loaded.stream(chat, max_new_tokens=3)
    assert ("task", "math", 1.0) in [tuple(one) for one in last.route]


def test_a_stack_without_keys_is_written_as_before(tmp_path: Path) -> None:
    saved = save_spoken(make_spoken(tmp_path / "adapters"), tmp_path)
    layers = json.loads((saved / "molora.json").read_text())["stack"]["layers"]
    assert all(set(layer) == {"name", "top_k", "default", "shared", "adapters"} for layer in layers)
    assert not list(saved.rglob(KEY_FILE))


def test_a_key_comes_and_goes_with_its_adapter(
    base: Any, model: MoLoRAModel, paths: dict[str, Path], tmp_path: Path
) -> None:
    odd = write_adapter(base, tmp_path / "odd", 3)
    write_key(odd, torch.stack([asked(model.base, one) for one in questions("odd")]))
    ask = questions("odd", 1, seed=7)[0].unsqueeze(0)
    before = {name: model.keys.of("task", name) for name in paths}
    model.add_adapter("task", "odd", odd)
    assert model.find(ask) == {"task": "odd"}
    model.replace_adapter("task", "odd", paths["low"])  # a version without a key: by name alone
    assert model.find(ask)["task"] in paths
    model.replace_adapter("task", "odd", odd)
    assert model.find(ask) == {"task": "odd"}
    model.remove_adapter("task", "odd")
    assert model.find(ask)["task"] in paths and model.keys.of("task", "odd") is None
    assert all(model.keys.of("task", name) is own for name, own in before.items())
    with pytest.raises(StackError, match="no adapter"):
        model.fit_row("task", "odd", ["x"])


def test_a_chat_takes_up_a_version_and_its_key(tmp_path: Path) -> None:
    model = make_spoken(tmp_path / "adapters", ())
    model.stack.layers.append(StackLayer("task", {}, keyed=True))
    model._refresh()
    for name, examples in {"math": ["1 + 1", "2 + 2"], "code": ["def f", "for i"]}.items():
        model.add_adapter("task", name, tmp_path / "adapters" / name, examples=examples)
    saved = save_spoken(model, tmp_path)
    running = MoLoRAModel.from_pretrained(saved, dtype=torch.float32)
    following = Following(running, saved)
    versions = Versions(saved, "task", "math")
    new = tmp_path / "new"
    new.mkdir()
    for file in Path(versions.saved / "adapters" / "task" / "math").iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    write_key(new, torch.full((2, 32), 7.0))
    versions.promote(versions.add(new).number)
    assert following.catch_up() == ["task/math"]
    assert torch.equal(running.keys.of("task", "math"), torch.full((2, 32), 7.0))  # type: ignore[arg-type]
    versions.rollback()
    following.catch_up()
    assert torch.equal(running.keys.of("task", "math"), model.keys.of("task", "math"))  # type: ignore[arg-type]


def test_a_key_that_is_none_is_refused(base: Any, model: MoLoRAModel, paths: dict[str, Path], tmp_path: Path) -> None:
    folder = write_adapter(base, tmp_path / "bad", 3)
    bad: dict[str, tuple[Any, type[Exception]]] = {
        "NaN": ({"questions": torch.full((2, 32), float("nan"))}, NonFiniteError),
        "other": ({"questions": torch.zeros(2, 32), "more": torch.zeros(1)}, AdapterFormatError),
        "none": ({"questions": torch.zeros(0, 32)}, AdapterFormatError),
        "flat": ({"questions": torch.zeros(32)}, AdapterFormatError),
        "half": ({"questions": torch.zeros(2, 32, dtype=torch.float16)}, AdapterFormatError),
        "of another base": ({"questions": torch.zeros(2, 31)}, AdapterMismatchError),
    }
    for tensors, error in bad.values():
        save_file(tensors, folder / KEY_FILE)
        with pytest.raises(error):
            model.add_adapter("task", "bad", folder)
    (folder / KEY_FILE).write_bytes(b"\x80\x04pickle")
    with pytest.raises(AdapterFormatError, match="not safetensors"):
        Adapter.load(folder)
    assert list(model.stack["task"].adapters) == list(paths) and model.keys.of("task", "bad") is None
    write_key(folder, torch.ones(300, 32))
    assert read_key(folder).shape == (MOST, 32)  # type: ignore[union-attr]
    assert set(load_file(folder / KEY_FILE)) == {"questions"}
