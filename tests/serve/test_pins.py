"""Pins that servers share: one that was made at another server holds here, and so does its end."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molora import MoLoRAModel
from molora.errors import StoreError
from molora.serve.engine import Engine
from molora.serve.pins import StoredPins
from molora.serve.pool import Pool
from molora.serve.store import AdapterStore
from tests.conftest import write_adapter
from tests.parity.test_equalities import make_routed
from tests.serve.live import until
from tests.serve.test_engine import Heard, endless, greedy


@pytest.fixture
def store(base: Any, tmp_path: Path) -> Iterator[AdapterStore]:
    made = AdapterStore(tmp_path / "store")
    for number in range(4):
        made.put("user", f"u{number}", write_adapter(base, tmp_path / f"u{number}", 50 + number, r=2))
    yield made
    made.close()


@pytest.fixture
def engine(base: Any, adapters: dict[str, Path], store: AdapterStore) -> Iterator[Engine]:
    model: MoLoRAModel = endless(make_routed(base, adapters))
    made = Engine(model, rows=2, longest=64, pools=[Pool(model, "user", store.finder("user"), most=2)])
    made.start()
    yield made
    made.close()


def ask(engine: Engine, *names: str) -> None:
    for name in names:
        Heard(engine, greedy([5, 6, 7], {"domain": None, "user": name}, 2)).tokens()


def test_what_is_pinned_elsewhere_stays_here(engine: Engine, store: AdapterStore) -> None:
    pool = engine.pools["user"]
    store.pin("user", "u0")
    followed = StoredPins(engine, store, every_s=0.02)  # a server that starts later
    ask(engine, "u0", "u1", "u2", "u3")
    hits = pool.stats().live_hits
    ask(engine, "u0")
    assert pool.stats().live_hits == hits + 1 and pool.pinned == ["u0"]
    store.unpin("user", "u0")
    assert until(lambda: pool.pinned == [])
    ask(engine, "u1", "u2")
    store.pin("user", "u2")
    assert until(lambda: pool.pinned == ["u2"])  # it is here already
    followed.close()


@pytest.mark.parametrize("kind", [StoreError, OSError])
def test_a_store_that_does_not_answer_keeps_nobody_from_starting(
    kind: type[Exception],
    engine: Engine,
    store: AdapterStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.pin("user", "u0")

    def fail(layer: str) -> list[str]:
        raise kind("It does not answer.")

    with monkeypatch.context() as broken, caplog.at_level(logging.ERROR, "molora.serve"):
        broken.setattr(store, "pinned", fail)
        followed = StoredPins(engine, store, every_s=0.02)
        assert until(lambda: caplog.text.count("It does not answer") > 1)
    ask(engine, "u0")
    assert until(lambda: engine.pools["user"].pinned == ["u0"])
    followed.close()
