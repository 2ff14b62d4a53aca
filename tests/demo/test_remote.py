"""The page over a server: what it tells of its stack, its answers, and how it goes and comes back."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from molora.errors import MoLoRAError
from molora.serve.app import build_app
from molora.serve.keys import Keys
from molora.serve.pool import PoolStats
from molora_demo.remote import PLACED, ServerSource, _metrics
from molora_demo.source import Settings, Turn
from tests.serve.fake_engine import ROUTE, FakeEngine
from tests.serve.live import serving

GREEDY = Settings(64, 0.0)
SELECTION = {"personality": None, "domain": {"math": 0.5}, "user": None}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def address(engine: FakeEngine) -> Iterator[str]:
    with serving(build_app(engine)) as address:
        yield address


def test_the_stack_is_the_servers(address, engine):
    source = ServerSource(f"{address}/v1/")
    told = {layer.name: (list(layer.adapters), layer.default, layer.shared) for layer in source.layers}
    assert told == {
        "personality": (["sage", "pirate"], "sage", False),
        "domain": (["math", "code", "pirate"], "auto", False),
        "user": ([], None, True),  # private
    }
    assert source.has_router and source.name == "org/small"
    held = source.layers[1]  # by the page's controls
    engine.model.stack["domain"].adapters["law"] = "x"
    assert source.catch_up() == ["domain/law"] and source.catch_up() == []
    assert source.layers[1] is held and "law" in held.adapters


def test_an_answer_has_its_text_and_routes(address, engine):
    tokens = list(ServerSource(address).ask([Turn("a", "b", "")], "c", SELECTION, GREEDY))
    assert "".join(token.text for token in tokens) == "Hello there"
    assert {tuple(token.route) for token in tokens} == {ROUTE}
    (request,) = engine.requests
    assert request.selection == SELECTION and request.sampling.temperature == 0 and request.sampling.max_tokens == 64
    asked = engine.model.tokenizer.decode(request.ids)
    assert asked.index("user\na") < asked.index("assistant\nb") < asked.index("user\nc")


def test_who_leaves_ends_the_answer(engine):
    engine.delay_s = 0.02
    with serving(build_app(engine)) as address:
        told = ServerSource(address).ask([], "hello", SELECTION, GREEDY)
        next(told)
        told.close()
        assert engine.tickets[0].cancelled.wait(5)


def test_refusals_are_in_the_servers_words(address):
    with pytest.raises(MoLoRAError, match="lawyer"):
        next(ServerSource(address).ask([], "hello", {"domain": "lawyer"}, GREEDY))


def test_an_answer_that_fails_midway_says_so(engine):
    engine.ending = "error"
    with serving(build_app(engine)) as address, pytest.raises(MoLoRAError) as caught:
        list(ServerSource(address).ask([], "hello", SELECTION, GREEDY))
    assert "secret" not in str(caught.value)


def test_a_server_that_has_gone_is_named_and_comes_back(engine):
    with serving(build_app(engine)) as address:
        source = ServerSource(address)
    for ask in (source.catch_up, source.numbers, lambda: next(source.ask([], "hello", SELECTION, GREEDY))):
        with pytest.raises(MoLoRAError, match="does not answer. Start it"):
            ask()


def test_what_is_no_such_server_is_refused():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "http://[", "nowhere"):
        with pytest.raises(MoLoRAError):
            ServerSource(url)


def test_a_key_is_needed_where_the_server_has_keys(tmp_path, engine):
    keys = Keys(tmp_path / "keys.json")
    mine = keys.create("ada", ["use"], "ada")
    with serving(build_app(engine, keys=keys)) as address:
        with pytest.raises(MoLoRAError, match="key"):
            ServerSource(address)
        layers = {layer.name: list(layer.adapters) for layer in ServerSource(address, mine).layers}
    assert layers["user"] == ["ada"]


def test_figures_are_the_servers(address, engine):
    source = ServerSource(address)
    list(source.ask([], "hello", SELECTION, GREEDY))
    now = source.numbers()
    assert (now.running, now.waiting, now.rows) == (0, 0, 8)
    assert now.counts["Answers"] == 1 and now.counts["Tokens written"] == len("Hello there")
    assert now.places["of the stack"]["domain"] == 3


def test_hits_and_evictions_are_the_pools_of_all_layers(address, engine):
    counted = PoolStats(2, 0, 2, 100, live_hits=5, host_hits=4, reads=3, evictions=2, host_evictions=1)
    engine.pools = {layer: SimpleNamespace(stats=lambda: counted) for layer in ("user", "team")}
    now = ServerSource(address).numbers()
    assert now.places["of the store, in the model"] == {"user": 2, "team": 2}
    assert {shown: now.counts[shown] for shown in PLACED.values()} == {
        "Adapters asked for that were in the model (hits)": 10,
        "Adapters asked for that were put into it (misses)": 8,
        "Adapters that were read from the store": 6,
        "Adapters that left the model to make room (evictions)": 4,
        "Adapters that left memory to make room": 2,
    }


def test_figures_of_several_replicas_are_added():
    rows = 'molora_rows{replica="a"} 4.0\nmolora_rows{replica="b"} 4.0\n'
    text = f'# HELP x\n{rows}m{{layer="user",replica="a",at="live"}} 2\n'
    assert _metrics(text) == {("molora_rows", ()): 8.0, ("m", (("layer", "user"), ("at", "live"))): 2.0}
