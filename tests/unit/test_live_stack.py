"""Adapters added, removed and replaced on a model that is in use."""

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from molora import MoLoRAModel, Stack, StackLayer
from molora.errors import MoLoRAError, SelectionError
from molora.examples import encode_examples, features_of
from molora.router import NEVER, Router
from molora.routing import decoder_layers
from tests.conftest import write_adapter
from tests.parity.test_equalities import make_routed, make_stack
from tests.unit.spoken import make_spoken


@pytest.fixture
def model(base: Any, adapters: dict[str, Path]) -> MoLoRAModel:
    return make_routed(base, adapters)


@pytest.fixture(scope="module")
def law(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("law") / "law", 9, r=6)


def fresh(base: Any, model: MoLoRAModel, layers: dict[str, dict[str, Path]]) -> MoLoRAModel:
    """A new model with these adapters and a copy of the router that ``model`` has now."""
    stack = Stack([StackLayer(name, found, default=None if name == "personality" else "auto", shared=name == "user")
                   for name, found in layers.items()])  # fmt: skip
    return MoLoRAModel.from_base(copy.deepcopy(base), stack, copy.deepcopy(model.router)).eval()


def the_same(a: MoLoRAModel, b: MoLoRAModel, ids: torch.Tensor, *selections: Any) -> None:
    assert a.stack.names == b.stack.names
    for selection in (None, {"user": "ada", "personality": "sage"}, *selections):
        x, y = (model(ids, selection=selection, output_routes=True) for model in (a, b))
        assert (x.logits - y.logits).abs().max() <= 1e-5 * y.logits.abs().max()
        for one, other in zip(x.routes.slots.unique(), y.routes.slots.unique(), strict=True):
            assert (one < 0) == (other < 0)
        assert read(x.routes) == read(y.routes)


def read(routes: Any) -> list[Any]:
    return [routes.at(b, t) for b in range(routes.slots.shape[0]) for t in range(routes.slots.shape[1])]


@torch.no_grad()
def test_added_is_built_that_way(
    model: MoLoRAModel, base: Any, adapters: dict[str, Path], law: Path, ids: torch.Tensor
) -> None:
    before = model(ids).logits
    model.add_adapter("domain", "law", law)
    assert torch.equal(model(ids).logits, before)  # "auto" does not choose what it knows nothing about
    expected = fresh(
        base,
        model,
        {
            "personality": {"sage": adapters["sage"]},
            "domain": {"math": adapters["math"], "code": adapters["code"], "law": law},
            "user": {"ada": adapters["ada"]},
        },
    )
    the_same(model, expected, ids, {"domain": "law"}, {"domain": ["law", "code"]})


@torch.no_grad()
def test_removed_is_built_that_way(model: MoLoRAModel, base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model.remove_adapter("domain", "math")
    assert model.router.rows.count("domain/math") == 0
    layers = {"personality": {"sage": "sage"}, "domain": {"code": "code"}, "user": {"ada": "ada"}}
    paths = {layer: {name: adapters[name] for name in names} for layer, names in layers.items()}
    the_same(model, fresh(base, model, paths), ids, {"domain": "code"})
    with pytest.raises(SelectionError, match="no adapter 'math'; it has code"):
        model(ids, selection={"domain": "math"})


@torch.no_grad()
def test_replaced_is_built_that_way(
    model: MoLoRAModel, base: Any, adapters: dict[str, Path], law: Path, ids: torch.Tensor
) -> None:
    model(ids, selection={"domain": "code"})
    model.replace_adapter("domain", "code", law)
    layers = {
        "personality": {"sage": adapters["sage"]},
        "domain": {"math": adapters["math"], "code": law},
        "user": {"ada": adapters["ada"]},
    }
    the_same(model, fresh(base, model, layers), ids, {"domain": "code"}, {"domain": "math"})


@torch.no_grad()
def test_a_slot_is_used_again(
    model: MoLoRAModel, base: Any, adapters: dict[str, Path], law: Path, ids: torch.Tensor
) -> None:
    model(ids, selection={"domain": "math"})
    slots = len(model.slots)
    model.remove_adapter("domain", "math")
    model.add_adapter("personality", "wit", law)
    assert len(model.slots) == slots
    layers = {
        "personality": {"sage": adapters["sage"], "wit": law},
        "domain": {"code": adapters["code"]},
        "user": {"ada": adapters["ada"]},
    }
    the_same(model, fresh(base, model, layers), ids, {"personality": "wit"})


@torch.no_grad()
def test_users_share_a_row(model: MoLoRAModel, law: Path, ids: torch.Tensor) -> None:
    rows = list(model.router.rows)
    expected = model(ids, selection={"user": ["ada"]}).logits
    model.add_adapter("user", "bob", law)
    assert model.router.rows == rows
    assert torch.equal(model(ids, selection={"user": ["ada"]}).logits, expected)
    ada, bob = (model(ids, selection={"user": [name]}, output_routes=True).routes.slots for name in ("ada", "bob"))
    assert torch.equal(ada[..., 2] >= 0, bob[..., 2] >= 0)
    model.remove_adapter("user", "ada")
    model.remove_adapter("user", "bob")
    assert model.router.rows == rows
    model(ids)


@torch.no_grad()
def test_a_removed_default_is_off(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = MoLoRAModel.from_base(copy.deepcopy(base), make_stack(adapters, default="code"))
    model.remove_adapter("domain", "code")
    assert model.stack["domain"].default is None
    assert torch.equal(model(ids).logits, base(ids).logits)


@torch.no_grad()
def test_what_the_router_never_saw_does_not_act(
    base: Any, adapters: dict[str, Path], law: Path, ids: torch.Tensor
) -> None:
    """Also where top-k would reach it: with as many choices as there are candidates."""
    for top_k, choice in ((1, ["law"]), (2, ["law"]), (4, "auto")):
        model = make_routed(base, adapters, top_k=top_k)
        model.add_adapter("domain", "law", law)
        slots = model(ids, selection={"domain": choice}, output_routes=True).routes.slots
        assert not (slots == model.slots["domain/law"]).any(), (top_k, choice)


TEXTS = ["Whereas the party of the first part", "the court finds that the plea is void"]


@pytest.mark.parametrize("reads", [0, 1, (0, 2)], ids=str)
@torch.no_grad()
def test_examples_make_auto_choose_it(reads: Any, tmp_path: Path) -> None:
    model = make_spoken(tmp_path, reads=reads)
    other = model.encode("zzz 0123456789 +-*/ zzz")
    before = model(**other, output_routes=True).routes.logits
    rows = list(model.router.rows)
    model.add_adapter("domain", "law", tmp_path / "law", examples=TEXTS)
    assert model.router.rows == [*rows, "domain/law"]
    wins, margins = [], []
    domain = [model.router.rows.index(f"domain/{name}") for name in ("math", "code", "none")]
    for text in TEXTS:
        routes = model(**model.encode(text), output_routes=True).routes
        wins.append(routes.slots[0, :, 0] == model.slots["domain/law"])
        margins.append(torch.stack([part[0, :, -1] - part[0, :, domain].amax(-1) for part in routes.logits], 1))
    assert (torch.cat(margins).mean(0) > 0.5).all()  # by part; add_row promises 1 on average
    if not isinstance(reads, tuple):  # where both parts decide, a random deep one varies too much to win everywhere
        assert torch.cat(wins).float().mean() > 0.5
    after = model(**other, output_routes=True).routes.logits
    assert torch.allclose(after[0][..., :-1], before[0], atol=1e-5)  # the others' logits are what they were


@torch.no_grad()
def test_examples_for_the_first_adapter_of_a_stack(tmp_path: Path) -> None:
    model = make_spoken(tmp_path, domains=())
    model.add_adapter("domain", "law", tmp_path / "law", examples=TEXTS)
    routes = model(**model.encode(TEXTS[0]), output_routes=True).routes
    assert (routes.slots[0, :, 0] == model.slots["domain/law"]).float().mean() > 0.5


@torch.no_grad()
def test_examples_beside_a_row_that_is_never_chosen(tmp_path: Path) -> None:
    """An earlier adapter without examples has a row of zeros, which says nothing about the norm of the others."""
    model = make_spoken(tmp_path, domains=("math",))
    model.add_adapter("domain", "code", tmp_path / "code")
    model.add_adapter("domain", "law", tmp_path / "law", examples=TEXTS)
    norms = model.router.parts[0].output.weight.norm(dim=1)
    rows = [model.router.rows.index(f"domain/{name}") for name in ("math", "none")]
    assert model.router.parts[0].output.bias[model.router.rows.index("domain/code")] == NEVER
    assert torch.isclose(norms[model.router.rows.index("domain/law")], norms[rows].mean(), rtol=1e-4)


@pytest.mark.parametrize("examples", [[], [""], ["x", 3], "one text"], ids=repr)
def test_examples_that_are_none(examples: Any, tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    rows = list(model.router.rows)
    with pytest.raises(MoLoRAError):
        model.add_adapter("domain", "law", tmp_path / "law", examples=examples)
    assert model.router.rows == rows and model.stack.names == ["domain/math", "domain/code"]
    assert model.slots.names == ["domain/math", "domain/code"]


def test_examples_need_a_router_and_a_tokenizer(
    model: MoLoRAModel, base: Any, adapters: dict[str, Path], law: Path
) -> None:
    unrouted = MoLoRAModel.from_base(copy.deepcopy(base), make_stack(adapters))
    for one, sentence in ((unrouted, "learned router"), (model, "tokenizer")):
        with pytest.raises(MoLoRAError, match=sentence):
            one.add_adapter("domain", "law", law, examples=TEXTS)
        assert "domain/law" not in one.stack.names and "domain/law" not in one.slots.names


class Pause(StoppingCriteria):
    """Holds generation after its first token until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.reached.set()
        self.go.wait(20)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def in_thread(act: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(act())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


@torch.no_grad()
def test_a_generation_under_way_ends_with_the_old_version(model: MoLoRAModel, law: Path, ids: torch.Tensor) -> None:
    options: dict[str, Any] = {
        "input_ids": ids,
        "selection": {"domain": "code"},
        "max_new_tokens": 8,
        "do_sample": False,
    }
    old = model.generate(**options)
    pause = Pause()
    paused = {**options, "stopping_criteria": StoppingCriteriaList([pause])}
    generating, generated = in_thread(lambda: model.generate(**paused))
    assert pause.reached.wait(20)
    replacing, _ = in_thread(lambda: model.replace_adapter("domain", "code", law))
    time.sleep(0.1)
    assert replacing.is_alive()
    pause.go.set()
    generating.join(20)
    replacing.join(20)
    assert torch.equal(generated[0], old)
    assert model.adapters["domain/code"].path == law
    assert not torch.equal(model.generate(**options), old)


@torch.no_grad()
def test_a_name_that_left_while_waiting_is_refused(model: MoLoRAModel, law: Path, ids: torch.Tensor) -> None:
    """Another adapter has its slot by then, and must not speak in its name."""
    with model.routing.lock:
        waiting, results = in_thread(
            lambda: model.generate(input_ids=ids, selection={"domain": "math"}, max_new_tokens=4, do_sample=False)
        )
        time.sleep(0.2)
        model.remove_adapter("domain", "math")
        model.add_adapter("domain", "law", law)
    waiting.join(20)
    assert isinstance(results[0], SelectionError), results


@torch.no_grad()
def test_two_threads_get_what_each_gets_alone(model: MoLoRAModel, ids: torch.Tensor) -> None:
    selections: list[Any] = [{"domain": "math"}, {"domain": "auto", "personality": "sage"}, {"domain": None}] * 2
    options: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False}
    alone = [model.generate(selection=selection, **options) for selection in selections]
    assert not torch.equal(alone[0], alone[1])
    started = [in_thread(lambda s=selection: model.generate(selection=s, **options)) for selection in selections]
    for (thread, results), expected in zip(started, alone, strict=True):
        thread.join(30)
        assert torch.equal(results[0], expected)


def test_the_routers_parameters_are_new_ones(model: MoLoRAModel, law: Path) -> None:
    """A trainer that added an adapter takes its optimiser's parameters from the model again."""
    assert isinstance(model.router, Router)
    model.add_adapter("domain", "law", law)
    assert model.router.parts[0].output.weight.shape[0] == len(model.router.rows)
    assert all(parameter.requires_grad for parameter in model.router.parts[0].output.parameters())


@torch.no_grad()
def test_features_for_a_row_are_those_of_a_whole_forward_and_no_layer_beyond_is_run(tmp_path: Path) -> None:
    model = make_spoken(tmp_path, reads=(0, 1))
    encoded = encode_examples(model, ["1 + 1 = 2", "def f(x): return x"], False)
    choices: Any = {"domain": ["math", "code"]}
    wanted = []
    for inputs in encoded:
        model(**inputs, selection=choices)
        wanted.append([q[0] for q in model.routing.features if q is not None])
    run: list[int] = []
    for number, layer in enumerate(decoder_layers(model.base)[1]):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    for part in range(2):
        torch.testing.assert_close(features_of(model, encoded, part, choices), torch.cat([one[part] for one in wanted]))
    assert run == [0, 0]  # for the part that reads at layer 1, a text each
    model(**encoded[0])
    assert run == [0, 0, 0, 1, 2]  # and it ends there no more


@pytest.mark.parametrize("reads", [0, (0, 2)], ids=str)
@torch.no_grad()
def test_a_merge_whose_row_cannot_be_fitted_leaves_nothing(
    reads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last part of the router fails, when those before it have their row already."""
    model = make_spoken(tmp_path, reads=reads)
    null = model.router.rows.index("domain/none")
    for part in model.router.parts:
        part.samples.add(torch.randn(40, model.router.config.hidden), 0)
        part.output.bias[null] = NEVER  # and the null has begun
    inputs, out = model.encode(TEXTS[0]), tmp_path / "both"
    before, state = model(**inputs, output_routes=True), copy.deepcopy(model.router.state_dict())
    rows, slots = list(model.router.rows), model.slots.names
    fit, done = Router.set_row, []

    def fails(router: Router, name: str, index: int, q: torch.Tensor) -> None:
        fit(router, name, index, q)
        done.append(index)
        if index == len(router.parts) - 1:
            raise RuntimeError("the row does not fit")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="does not fit"):
        patch.setattr(Router, "set_row", fails)
        model.merge("domain", ["math", "code"], "both", out, examples=TEXTS)
    assert done == list(range(len(model.router.parts))) and not out.exists()
    assert model.stack.names == ["domain/math", "domain/code"] == list(model.adapters)
    assert model.router.rows == rows and [name for name in model.slots.names if name] == slots
    assert {name: value.tolist() for name, value in model.router.state_dict().items()} == {
        name: value.tolist() for name, value in state.items()
    }
    after = model(**inputs, output_routes=True)
    assert torch.equal(after.logits, before.logits) and read(after.routes) == read(before.routes)
    model.merge("domain", ["math", "code"], "both", out, examples=TEXTS)
    assert out.is_dir() and "domain/both" in model.router.rows and "domain/both" in model.slots.names
