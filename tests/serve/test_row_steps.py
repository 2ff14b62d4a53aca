"""Rows that run by the decode step of few launches are answered as without it; on a GPU the step is captured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from molora import MoLoRAModel
from molora.decode import DecodeStep
from molora.selection import candidates, without_names
from molora.serve.engine import Engine
from molora.serve.prefixes import BLOCK
from tests.conftest import DEVICE, write_adapter
from tests.parity.test_equalities import make_routed
from tests.serve.test_engine import Heard, alone, endless, engines, greedy, held, watched  # noqa: F401 - a fixture

AS_ON_A_GPU = pytest.mark.parametrize("engines", [True], indirect=True)
TOKENS = 12 if DEVICE.type == "cuda" else 2  # the interpreter takes a second a step
PROMPTS = [[5, 6], [7, 8, 9, 10, 11], [12]]
KINDS: list[Any] = [
    pytest.param({"reads": (0, 2)}, id="two routers"),
    pytest.param({"reads": 0, "decays": (0.8, 0.95)}, id="averages", marks=pytest.mark.gpu),
    pytest.param({"reads": 1}, id="layer 1", marks=pytest.mark.gpu),
    pytest.param({"reads": 0, "weights": "softmax", "top_k": 2}, id="two at once", marks=pytest.mark.gpu),
]


class Two:
    """A model whose rows are stepped, how often, and its copy whose rows are not."""

    def __init__(self, base: Any, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        with monkeypatch.context() as here:
            here.setattr("molora.adapted.backend_for", lambda _: "triton")
            self.model = endless(make_routed(base, adapters, **config))
        self.plain = endless(make_routed(base, adapters, **config))
        self.sizes: list[tuple[int, int]] = []
        call = DecodeStep.__call__

        def counted(step: DecodeStep, ids: torch.Tensor) -> torch.Tensor:
            self.sizes.append((len(ids), step.batch))
            return call(step, ids)

        monkeypatch.setattr(DecodeStep, "__call__", counted)


@pytest.fixture
def two(base: Any, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Two]:
    yield Two(base, adapters, monkeypatch, reads=(0, 2))


def plain_tokens(two: Two, ids: list[int], selection: Any, tokens: int) -> list[int]:
    two.plain.steps.backend = "dense"  # as transformers generates
    return alone(two.plain, ids, selection, tokens)


SELECTIONS: list[dict[str, Any]] = [
    {"personality": "sage", "domain": "auto", "user": "ada"},
    {"domain": {"math": 0.7, "code": 0.5}},
    {"domain": "code"},
]


@AS_ON_A_GPU
@pytest.mark.parametrize("config", KINDS)
def test_rows_of_all_lengths_in_one_step(
    config: dict[str, Any],
    base: Any,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    engines: Any,  # noqa: F811
) -> None:
    two = Two(base, adapters, monkeypatch, **config)
    asked = [(ids, SELECTIONS[n], TOKENS + n) for n, ids in enumerate(PROMPTS)]
    expected = [plain_tokens(two, *one) for one in asked]
    engine, together = engines(two.model, chunk=64), watched(monkeypatch)
    with held(engine):
        heard = [Heard(engine, greedy(*one)) for one in asked]
    assert [one.tokens() for one in heard] == expected
    assert together == [(2, 0)]  # the third has one token
    assert two.sizes, "no step was taken"
    assert all(count <= batch and batch in (1, 2, 4) for count, batch in two.sizes)
    assert any(count < batch for count, batch in two.sizes) or DEVICE.type == "cuda"


@AS_ON_A_GPU
def test_one_token_each_after_a_known_beginning(
    two: Two,
    engines: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [[first, *range(5, 5 + BLOCK), 9] for first in (3, 4)]
    expected = [plain_tokens(two, ids, {"domain": "auto"}, TOKENS) for ids in prompts]
    engine, together = engines(two.model, chunk=192), watched(monkeypatch)
    for known in (0, BLOCK):
        with held(engine):
            heard = [Heard(engine, greedy(ids, {"domain": "auto"}, TOKENS)) for ids in prompts]
        assert [one.tokens() for one in heard] == expected and together.pop() == (2, known)


@AS_ON_A_GPU
def test_what_is_being_read_is_not_touched(two: Two, engines: Any) -> None:  # noqa: F811
    """A step of three runs as one of four: the fourth row is one that a prompt is being read into."""
    first = [(ids, {"domain": "auto"}, 4 + TOKENS) for ids in PROMPTS]
    late = (list(range(3, 13)), {"domain": "auto", "user": "ada"}, 2)
    expected = [plain_tokens(two, *one) for one in (*first, late)]
    engine = engines(two.model, chunk=4)
    heard = [Heard(engine, greedy(*one)) for one in (*first, late)]
    assert [one.tokens() for one in heard] == expected
    assert (3, 4) in two.sizes and (4, 4) in two.sizes


@AS_ON_A_GPU
def test_the_router_does_not_decide_of_a_shared_layer_there(two: Two, engines: Any) -> None:  # noqa: F811
    selection = {"domain": "auto", "user": ["ada"]}  # Ada's adapter or none, by token
    two.model.stack["user"].shared = two.plain.stack["user"].shared = True
    expected = plain_tokens(two, [5, 6, 7], {"domain": "auto"}, TOKENS)
    assert Heard(engines(two.model), greedy([5, 6, 7], {"domain": "auto"}, TOKENS)).tokens() == expected
    taken = len(two.sizes)
    assert taken == TOKENS - 1
    Heard(engines(two.model), greedy([5, 6, 7], selection, TOKENS)).tokens()
    assert len(two.sizes) == taken


@AS_ON_A_GPU
def test_adapters_of_a_shared_layer_come_without_a_new_step(
    two: Two,
    engines: Any,  # noqa: F811
    base: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    make = DecodeStep.__init__

    def counted(step: DecodeStep, *args: Any, **settings: Any) -> None:
        made.append(1)
        make(step, *args, **settings)

    monkeypatch.setattr(DecodeStep, "__init__", counted)
    for model in (two.model, two.plain):
        model.stack["user"].shared = True
    engine: Engine = engines(two.model)
    one = ([5, 6, 7], {"domain": "code", "user": "ada"}, TOKENS)
    assert Heard(engine, greedy(*one)).tokens() == plain_tokens(two, *one)
    path = write_adapter(base, tmp_path / "bob", 7)
    engine.change([], lambda: two.model.add_adapter("user", "bob", path))
    two.plain.add_adapter("user", "bob", path)
    other = ([5, 6, 7], {"domain": "code", "user": "bob"}, TOKENS)
    assert Heard(engine, greedy(*other)).tokens() == plain_tokens(two, *other)
    assert len(two.sizes) == 2 * (TOKENS - 1) and len(made) == 1


def test_layers_without_their_names(base: Any, adapters: dict[str, Path]) -> None:
    model: MoLoRAModel = make_routed(base, adapters)
    layers = candidates(model.stack, model.slots)
    assert without_names(layers, ()) == (layers, None)
    left, kept = without_names(layers, ["user"])
    assert kept is not None and len(kept) == sum(len(layer.slots) for layer in left)
    for before, after in zip(layers, left, strict=True):
        columns = kept[after.all]
        if before.name == "user":
            assert after.slots == [-1] and columns == [before.all.stop - 1] and after.rows == ["user/none"]
        else:
            assert after.slots == before.slots and columns == list(range(before.first, before.all.stop))
