"""A server's router from a store: what is current there serves, and what is not for this stack does not."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from molora import MoLoRAModel, Router, RouterConfig, VocabularyRouter
from molora.cli import app
from molora.errors import ConfigError, RouterError
from molora.saved import load
from molora.selection import router_rows
from molora.serve.engine import Engine
from molora.serve.routers import StoredRouter
from molora.serve.store import AdapterStore
from molora.stack import ROUTERS
from tests.serve.test_engine import Heard, alone, endless, greedy
from tests.unit.spoken import make_spoken, save_spoken

PROMPT = list(range(20, 60))


@pytest.fixture
def model(tmp_path: Path) -> MoLoRAModel:
    return endless(make_spoken(tmp_path / "adapters"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    made = AdapterStore(tmp_path / "store")
    yield made
    made.close()


@pytest.fixture
def engine(model: MoLoRAModel) -> Iterator[Engine]:
    made = Engine(model, rows=2, longest=160, chunk=16)
    made.start()
    yield made
    made.close()


def only(model: MoLoRAModel, name: str) -> VocabularyRouter:
    """A router that sends every token to one adapter."""
    vocabulary = model.config.vocab_size
    return VocabularyRouter({name: [[0, vocabulary - 1]]}, router_rows(model.stack), vocabulary)


def said(engine: Engine, tokens: int = 8) -> list[int]:
    return Heard(engine, greedy(PROMPT, {"domain": "auto"}, tokens)).tokens()


def test_what_is_current_serves(model: MoLoRAModel, store: AdapterStore, engine: Engine) -> None:
    wanted = {name: alone(model, PROMPT, {"domain": name}, 8) for name in ("math", "code")}
    assert wanted["math"] != wanted["code"]
    first = store.put_router("main", only(model, "domain/math"))
    followed = StoredRouter(engine, store, "main", every_s=0.02)
    assert followed.version == first.version and said(engine) == wanted["math"]
    second = store.put_router("main", only(model, "domain/code"))
    _until(lambda: followed.version == second.version)
    assert said(engine) == wanted["code"]
    store.roll_back(ROUTERS, "main")
    _until(lambda: followed.version == first.version)
    assert said(engine) == wanted["math"]
    followed.close()
    store.put_router("main", only(model, "domain/code"))
    assert said(engine) == wanted["math"]


def test_an_answer_goes_on_with_the_new_one(model: MoLoRAModel, store: AdapterStore, engine: Engine) -> None:
    """As if the text so far had been the prompt of the rest."""
    store.put_router("main", only(model, "domain/math"))
    followed = StoredRouter(engine, store, "main", every_s=60)
    heard = Heard(engine, greedy(PROMPT, {"domain": "auto"}, 100))
    first = [heard.next().token for _ in range(3)]  # type: ignore[union-attr]
    store.put_router("main", only(model, "domain/code"))
    followed.look()
    rest = heard.tokens_left()
    followed.close()
    before = alone(model, PROMPT, {"domain": "math"}, 100)
    changed = next(n for n in range(3, 100) if [*first, *rest][: n + 1] != before[: n + 1])
    expected = alone(model, [*PROMPT, *before[:changed]], {"domain": "code"}, 100 - changed)
    assert [*first, *rest][changed:] == expected


def test_another_stacks_router_does_not_serve(
    model: MoLoRAModel, store: AdapterStore, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RouterError, match="main"):
        StoredRouter(engine, store, "main")
    other = Router(RouterConfig(width=8, hidden=16), ["domain/law", "domain/none"], model.config.hidden_size)
    store.put_router("main", other)
    with pytest.raises(RouterError, match="has domain/math, domain/code"):
        StoredRouter(engine, store, "main")
    good = store.put_router("main", only(model, "domain/math"))
    followed = StoredRouter(engine, store, "main", every_s=0.02)
    with caplog.at_level(logging.ERROR, "molora.serve"):
        store.put_router("main", Router(RouterConfig(width=8), ["x/none"], model.config.hidden_size))
        _until(lambda: bool(caplog.records))
        _until(lambda: followed._refused is not None)
        followed.look()  # told once
    followed.close()
    assert followed.version == good.version and "cannot serve" in caplog.text and caplog.text.count("cannot") == 1
    assert said(engine) == alone(model, PROMPT, {"domain": "math"}, 8)


def test_a_router_lacks_no_row_of_the_stack(model: MoLoRAModel, store: AdapterStore, engine: Engine) -> None:
    """An adapter that came after the router was stored acts when it is named, as on a live model."""
    fewer = Router(RouterConfig(width=8, hidden=16), ["domain/math", "domain/none", "user/*", "user/none"], 32)
    torch.nn.init.normal_(fewer.parts[0].output.weight)
    store.put_router("main", fewer)
    followed = StoredRouter(engine, store, "main", every_s=60)
    followed.close()
    assert sorted(model.router.rows) == sorted(router_rows(model.stack))  # type: ignore[union-attr, arg-type]
    assert Heard(engine, greedy(PROMPT, {"domain": "code"}, 5)).tokens() == alone(model, PROMPT, {"domain": "code"}, 5)


def test_from_the_shell(model: MoLoRAModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    saved, url, runner = save_spoken(model, tmp_path), str(tmp_path / "made"), CliRunner()

    def molora(*words: str) -> Any:
        return runner.invoke(app, ["store", *words], catch_exceptions=False)

    put = molora("put", url, "_routers/main", str(saved))
    assert put.exit_code == 0
    version = put.stdout.strip()
    assert version in molora("versions", url, "_routers/main").stdout
    listed = molora("list", url, "_routers").stdout
    assert "main" in listed and version in listed
    assert molora("get", url, "_routers/main", "--out", str(tmp_path / "out")).exit_code == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"router.json", "router.safetensors"}
    router = load(saved).router
    assert router is not None
    kept = AdapterStore(url).get_router("main").state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(kept[name], tensor) for name, tensor in router.state_dict().items())  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="give --store, too"):
        runner.invoke(app, ["serve", str(saved), "--router", "main"], catch_exceptions=False)


def _until(true: Any) -> None:
    import time

    ends = time.monotonic() + 30
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)
