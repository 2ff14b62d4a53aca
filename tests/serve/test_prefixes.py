"""Beginnings of prompts that are not read again: by whom they are shared, and that nothing changes by it."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from molora import MoLoRAModel
from molora.serve.engine import Engine
from molora.serve.pool import Pool
from tests.parity.test_equalities import ROUTED, make_routed
from tests.serve.test_engine import Heard, alone, endless, engines, greedy  # noqa: F401 - a fixture
from tests.serve.test_pool import Users

LONG = torch.randint(3, 97, (200,), generator=torch.Generator().manual_seed(2)).tolist()
AUTO: dict[str, Any] = {"personality": "sage", "domain": "auto", "user": "ada"}


@pytest.fixture
def model(base: Any, adapters: dict[str, Path]) -> MoLoRAModel:
    return endless(make_routed(base, adapters))


def found(engine: Engine) -> int:
    """Tokens that were not read again."""
    return engine.prefixes.stats().found


def ask(engine: Engine, ids: list[int], selection: Any, tokens: int = 8) -> list[int]:
    return Heard(engine, greedy(ids, selection, tokens)).tokens()


@pytest.mark.parametrize("kind", ROUTED)
def test_what_is_found_changes_nothing(kind: str, base: Any, adapters: dict[str, Path], engines: Any) -> None:  # noqa: F811
    model = endless(make_routed(base, adapters, **ROUTED[kind]))
    engine = engines(model, longest=250, chunk=48)
    other = [*LONG[:130], *reversed(LONG[:40])]
    for ids, expected_found in [(LONG, 0), (LONG, 192), (other, 128), (other, 128), (LONG[:64], 0), (LONG[:65], 64)]:
        before = found(engine)
        assert ask(engine, ids, AUTO) == alone(model, ids, AUTO, 8)
        assert found(engine) - before == expected_found


def test_only_those_on_whom_the_same_acts_share(model: MoLoRAModel, engines: Any) -> None:  # noqa: F811
    engine = engines(model, longest=250)
    ask(engine, LONG, AUTO)
    kinds: list[dict[str, Any]] = [
        {**AUTO, "user": None},
        {**AUTO, "user": ["ada"]},
        {**AUTO, "domain": ["math"]},
        {**AUTO, "domain": None},
        {**AUTO, "domain": "math"},
        {**AUTO, "domain": {"math": 0.5}},
        {**AUTO, "domain": {"math": 0.5, "code": 0.5}},
        {**AUTO, "domain": {"code": 0.5, "math": 0.5}},
        {**AUTO, "personality": None},
    ]
    for selection in kinds:
        before = found(engine)
        assert ask(engine, LONG, selection) == alone(model, LONG, selection, 8)
        assert found(engine) == before, selection
    for selection in (AUTO, *kinds, {**AUTO, "domain": ["code", "math"]}):  # said otherwise, and the same
        before = found(engine)
        ask(engine, LONG, selection)
        assert found(engine) - before == 192, selection


def test_users_share_what_has_no_user(base: Any, model: MoLoRAModel, tmp_path: Path, engines: Any) -> None:  # noqa: F811
    users = Users(base, tmp_path, 3)
    engine = engines(model, longest=250, pools=[Pool(model, "user", users.find, most=2)])
    ask(engine, LONG, {"domain": "auto", "user": "u0"})
    ask(engine, LONG, {"domain": "auto", "user": "u1"})
    assert found(engine) == 0
    ask(engine, LONG, {"domain": "auto", "user": "u0"})
    assert found(engine) == 192
    users.at["u0"] = ("2", users.at["u2"][1])  # another version is another adapter
    said = ask(engine, LONG, {"domain": "auto", "user": "u0"})
    assert found(engine) == 192
    ask(engine, LONG, {"domain": "auto", "user": None})
    assert found(engine) == 192
    ask(engine, LONG, {"domain": "auto"})  # whoever asks
    assert found(engine) == 384
    model.add_adapter("user", "now", users.at["u2"][1])
    assert said == alone(model, LONG, {"domain": "auto", "user": "now"}, 8)


def test_a_change_of_adapters_or_router_is_seen(
    base: Any,
    model: MoLoRAModel,
    adapters: dict[str, Path],
    engines: Any,  # noqa: F811
) -> None:
    engine = engines(model, longest=250)
    for selection in ({"domain": "code"}, {"domain": "auto"}, {"domain": ["code"]}):
        ask(engine, LONG, selection)
    engine.change(["domain/code"], lambda: model.replace_adapter("domain", "code", adapters["math"]))
    for selection in ({"domain": "code"}, {"domain": "auto"}, {"domain": ["code"]}):
        assert ask(engine, LONG, selection) == alone(model, LONG, selection, 8)
    assert found(engine) == 0
    router: Any = model.router

    @torch.no_grad()
    def shift() -> None:
        router.parts[0].output.bias.add_(torch.randn(7, device=model.device))

    engine.change([], shift)
    assert ask(engine, LONG, {"domain": "auto"}) == alone(model, LONG, {"domain": "auto"}, 8)
    engine.change([], lambda: model.set_router(make_routed(base, adapters, seed=11).router))
    assert ask(engine, LONG, {"domain": "auto"}) == alone(model, LONG, {"domain": "auto"}, 8)
    assert found(engine) == 0


def test_what_is_known_by_its_address_stays_alive(model: MoLoRAModel, adapters: dict[str, Path], engines: Any) -> None:  # noqa: F811
    """Or another adapter might come to have the same address."""
    engine = engines(model, longest=250)
    for selection in ({"domain": "code"}, {"domain": ["code"]}):
        ask(engine, LONG, selection)
        old = weakref.ref(model.adapters["domain/code"])
        engine.change(["domain/code"], lambda: model.replace_adapter("domain", "code", adapters["math"]))
        ask(engine, LONG[:9], None)
        gc.collect()
        assert old() is not None
        engine.change([], engine.prefixes.clear)
        gc.collect()
        assert old() is None


def test_there_is_an_end_to_what_is_kept(model: MoLoRAModel, engines: Any) -> None:  # noqa: F811
    engine = engines(model, longest=250)
    ask(engine, LONG, None)
    one = engine.prefixes.stats().held // 3  # of the three blocks
    small = engines(model, longest=250, prefix_bytes=4 * one)
    ask(small, LONG, None)
    ask(small, LONG[:64] + LONG[:64], None)  # the first block is used again, and one more is made
    assert small.prefixes.stats().held == 4 * one
    ask(small, LONG[70:140], None)  # puts out the last block of the first prompt
    assert small.prefixes.stats().held == 4 * one
    before = found(small)
    ask(small, LONG, None)
    assert found(small) - before == 128
    none = engines(model, longest=250, prefix_bytes=0)
    ask(none, LONG, None)
    assert ask(none, LONG, None) == alone(model, LONG, None, 8) and found(none) == 0
