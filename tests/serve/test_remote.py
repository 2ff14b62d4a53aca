"""Load at an address: what is asked, and what is told of the answers."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from molora.cli import app
from molora.errors import ConfigError
from molora.serve.app import build_app
from molora.serve.keys import Keys
from molora.serve.load import report
from molora.serve.remote import _body, replay_at
from molora.serve.traffic import Arrival, Traffic, arrivals
from tests.serve.fake_engine import FakeEngine
from tests.serve.live import serving

TRAFFIC = Traffic(requests=9, rate=200.0, users=2, prompt=(2, 5), answer=(3, 6), seed=1)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(ending="length")


@pytest.fixture
def address(engine: FakeEngine) -> Iterator[str]:
    with serving(build_app(engine)) as found:
        yield found


def test_the_trace_is_asked_as_it_is(engine: FakeEngine, address: str) -> None:
    coming, ticks = arrivals(TRAFFIC), list[int]()
    found = replay_at(address, "base+math", coming, tick=lambda: ticks.append(1))
    asked = sorted((len(one.ids), one.sampling.max_tokens) for one in engine.requests)
    assert asked == sorted((one.prompt, one.answer) for one in coming) and len(ticks) == 9
    assert all((one.selection or {})["domain"] == "math" and not one.ends for one in engine.requests)
    assert all(one.sampling.temperature == 0 for one in engine.requests)
    assert [one.count for one in found] == [one.answer for one in coming]
    assert all(one.reason == "length" and one.asked >= arrival.at for one, arrival in zip(found, coming, strict=True))
    told = report(found)
    assert told["answered"] == 9 and (told["refused"], told["failed"]) == (0, 0)
    seconds = sum(one.answer for one in coming) / told["tokens a second"]
    assert told["seconds"] == pytest.approx(seconds, abs=0.00051)  # which are told to a thousandth


def test_each_user_has_a_name(address: str) -> None:
    body = _body("base+user/u{user}", Arrival(0.0, 7, 2, 3), [5, 6])
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("base+user/u7", [5, 6], 3)
    found = replay_at(address, "base+u{user}", arrivals(TRAFFIC))  # there is no u0
    assert report(found) == {"answered": 0, "refused": 0, "failed": 9}


def test_who_is_told_to_come_back_and_who_fails_are_counted_apart(engine: FakeEngine, address: str) -> None:
    engine.busy = True
    assert report(replay_at(address, "base", arrivals(TRAFFIC))) == {"answered": 0, "refused": 9, "failed": 0}
    engine.busy, engine.ending = False, "error"  # after some tokens, in the middle of a stream
    long = replace(TRAFFIC, answer=(50, 50))
    assert report(replay_at(address, "base", arrivals(long))) == {"answered": 0, "refused": 0, "failed": 9}


def test_nobody_there_and_another_key(engine: FakeEngine, address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No server answers"):
        replay_at("http://127.0.0.1:9", "base", arrivals(TRAFFIC))
    keys = Keys(tmp_path / "keys.json")
    secret = keys.create("me", ["use"])
    with serving(build_app(engine, keys=keys)) as guarded:
        with pytest.raises(ConfigError, match="--key"):
            replay_at(guarded, "base", arrivals(TRAFFIC))
        assert all(one.reason == "length" for one in replay_at(guarded, "base", arrivals(TRAFFIC), secret))


def test_the_command(engine: FakeEngine, address: str) -> None:
    given = [
        "bench",
        "serve",
        "--url",
        f"{address}/",
        "--name",
        "base",
        "--requests",
        "4",
        "--rate",
        "0",
        "--answer",
        "3:3",
    ]
    shown = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "first token p50" in shown.output and f"4 requests to {address}" in shown.output
    told = json.loads(CliRunner().invoke(app, [*given, "--json"]).output)
    assert told["rows"][0]["answered"] == 4 and told["address"] == address
    assert told["command"].startswith("molora bench serve --requests 4") and "secret" not in told["command"]
    engine.busy = True
    assert "4" in CliRunner().invoke(app, given, env={"COLUMNS": "200"}).output


def test_an_answer_of_the_length_that_is_asked_for(engine: FakeEngine, address: str) -> None:
    body = {"model": "base", "prompt": "a", "max_tokens": 2}
    for more, ends in (({}, True), ({"ignore_eos": True}, False)):
        httpx.post(f"{address}/v1/completions", json={**body, **more}).raise_for_status()
        assert engine.requests[-1].ends is ends
