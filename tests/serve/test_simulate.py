"""Simulated replicas against what is known without them: formulas of queues, a cache, Ray's own router, the engine."""

import json
import math
import subprocess
import sys
import threading
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from molora.cli import app
from molora.errors import ConfigError, StackError
from molora.serve import costs as measuring
from molora.serve import engine as engine_module
from molora.serve import simulated as simulated_module
from molora.serve.costs import Costs, measure_costs, read_costs, write_costs
from molora.serve.engine import Engine
from molora.serve.forward import affinity
from molora.serve.measure import write_random
from molora.serve.placement import KEPT_KEYS, Crowds, Placement
from molora.serve.pool import Pool
from molora.serve.requests import Request, Sampling
from molora.serve.simulate import report, simulate
from molora.serve.simulated import HOST_BYTES, READERS, Asked, Replica
from molora.serve.traffic import Arrival, Traffic, arrivals
from tests.unit.spoken import make_spoken, save_spoken

FREE = ((1, 0.0),)
SOME = Costs(step=((1, 0.02), (8, 0.04)), prompt=((1, 0.01), (256, 0.1)), fetch=0.05, swap=0.004, fetch_spread=0.03)


@pytest.mark.parametrize("load", [0.5, 0.8], ids=["half", "crowded"])
def test_one_row_waits_as_in_an_m_d_1_queue(load: float) -> None:
    """The first token costs nothing here, so it comes when service begins; the ten others take a second."""
    alone = Costs(step=((1, 0.1),), prompt=FREE, fetch=0, swap=0)
    coming = arrivals(Traffic(100_000, rate=load, users=3, prompt=(5, 5), answer=(11, 11), seed=4))
    found, (engine,) = simulate(coming, alone, rows=1, waiting=10**9)
    waited = np.mean([one.first - one.at for one in found])
    assert waited == pytest.approx(load / (2 * (1 - load)), rel=0.03)
    assert all(one.done - one.first == pytest.approx(1.0) for one in found if one.done is not None)
    assert engine.busy == pytest.approx(100_000)


def test_littles_law() -> None:
    """Requests that are there on average, counted at moments of no meaning: rate by the time that each one stays."""
    coming = arrivals(Traffic(50_000, rate=20.0, users=5, prompt=(5, 20), answer=(5, 40), seed=5))
    found, _ = simulate(coming, Costs(step=((1, 0.05),), prompt=FREE, fetch=0, swap=0), rows=64, waiting=10**9)
    begun, ended = np.array([one.at for one in found]), np.sort([one.done for one in found])
    moments = np.random.default_rng(0).uniform(100, begun[-1] - 100, 20_000)
    there = np.searchsorted(begun, moments) - np.searchsorted(ended, moments)
    stays = np.mean([(one.done or math.inf) - one.at for one in found])
    assert there.mean() == pytest.approx(50_000 / begun[-1] * stays, rel=0.02)
    tokens = np.mean([one.answer for one in coming])
    assert stays == pytest.approx((tokens - 1) * 0.05, rel=0.06)  # it begins at the next step, in the middle of one


def test_live_adapters_are_those_of_an_lru_cache() -> None:
    coming = arrivals(Traffic(20_000, rate=1.0, users=500, zipf=1.0, prompt=(2, 4), answer=(2, 4), seed=6))
    found, (engine,) = simulate(coming, SOME, rows=1, live=50, waiting=10**9)
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for one in sorted(found, key=lambda one: one.began):
        hits += one.user in cache
        cache[one.user] = None
        cache.move_to_end(one.user)
        if len(cache) > 50:
            cache.popitem(last=False)
    assert 0.3 < hits / 20_000 < 0.7
    assert (engine.adapters.hits, engine.adapters.misses) == (hits, 20_000 - hits)
    assert engine.adapters.reads == len({one.user for one in coming})  # the host's memory keeps them all


def test_an_adapter_in_use_stays_and_who_finds_no_room_waits() -> None:
    """Room for one: the second user's first token comes after the first one's last, though there are rows."""
    coming = [Arrival(0.0, 1, 2, 10), Arrival(0.0, 2, 2, 10), Arrival(0.0, 1, 2, 10)]
    found, _ = simulate(coming, Costs(step=((1, 1.0),), prompt=FREE, fetch=0, swap=0), rows=4, live=1)
    assert [one.done for one in found] == [10, 19, 10]  # prompts read together get their first tokens by a step
    assert found[1].began == 10


def test_a_cold_adapter_holds_up_nobody_else() -> None:
    coming = [Arrival(0.0, 1, 5, 100), Arrival(10.0, 2, 5, 3)]
    slow = Costs(step=((1, 1.0),), prompt=FREE, fetch=20.0, swap=0)
    first, second = simulate(coming, slow, rows=4)[0]
    assert (first.first, first.done) == (20, 119)  # the second one's prompt takes no time here
    assert (second.began, second.done) == (30, 32)
    held = simulate(coming, Costs(step=((1, 1.0),), prompt=((1, 7.0),), fetch=20.0, swap=0.5), rows=4)[0][0]
    assert held.done == 20 + 99 + 2 * 7.5  # but a prompt that is read and an adapter that enters stop the steps


def test_long_prompts_are_read_in_pieces_between_steps() -> None:
    coming = [Arrival(0.0, 1, 1, 31), Arrival(10.5, 1, 30, 2)]
    chunked = Costs(step=((1, 1.0),), prompt=((1, 0.0), (2, 0.0), (10, 0.5)), fetch=0, swap=0, chunk=10)
    first, second = simulate(coming, chunked, rows=2)[0]
    assert second.began == 11 and second.first == 11 + 0.5 + 1 + 0.5 + 1 + 0.5
    assert first.done == 30 + 3 * 0.5


def test_nothing_is_lost() -> None:
    """Far too many come for few places to wait: some are refused, and all others get all of their tokens."""
    coming = arrivals(Traffic(5_000, rate=60.0, users=300, prompt=(5, 400), answer=(1, 60), seed=7))
    found, engines = simulate(coming, SOME, replicas=3, rows=4, live=6, waiting=20)
    told = report(found, engines)
    assert told["asked"] == 5_000 == told["answered"] + told["refused"] and 0 < told["refused"] < 5_000
    assert all((one.done is None) == one.refused for one in found)
    for one, asked in zip(coming, found, strict=True):
        assert (asked.tokens, asked.left, asked.unread) == (
            (0, one.answer, one.prompt) if asked.refused else (one.answer, 0, 0)
        )
    gaps = sum(sum(engine.gaps.values()) for engine in engines)
    assert gaps == sum(one.tokens - 1 for one in found if not one.refused)
    assert all(engine.under_way == 0 and not any(engine.adapters.live.values()) for engine in engines)
    assert 0.9 < told["busy"] <= 1 and told["refused share"] == round(told["refused"] / 5_000, 4)
    again = simulate(coming, SOME, replicas=3, rows=4, live=6, waiting=20)
    assert report(*again) == told


def test_requests_are_placed_as_rays_router_places_them() -> None:
    """Ray's own code says which replicas may have each request, told what each is known for."""
    pytest.importorskip("ray")
    from ray.serve._private.request_router.request_router import MultiplexMixin

    coming = arrivals(Traffic(6_000, rate=5.0, users=5_000, zipf=0.8, prompt=(2, 9), answer=(2, 9), seed=8))
    keys = [affinity(json.dumps({"model": f"base+user/u{one.user}"}).encode(), {"user"}) for one in coming]
    ours, router, known = Placement(4, seed=1), MultiplexMixin(), [OrderedDict() for _ in range(4)]  # type: ignore
    replicas = [SimpleNamespace(replica_id=number, multiplexed_model_ids=known[number]) for number in range(4)]
    router._replicas, router._replica_id_set = dict(enumerate(replicas)), set(range(4))  # type: ignore
    stayed = 0
    for number, key in enumerate(keys):
        router._update_multiplexed_model_ids_with_replicas(replicas)  # type: ignore
        routing = SimpleNamespace(
            multiplexed_start_matching_time=None,
            tried_first_multiplexed_models=False,
            tried_fewest_multiplexed_models=False,
            should_backoff=False,
        )
        pending: Any = SimpleNamespace(metadata=SimpleNamespace(multiplexed_model_id=key), routing_context=routing)
        router._multiplexed_model_id_fallback_match.clear()  # it would wait a moment for another one's replica
        allowed = router.apply_multiplex_routing(pending)
        assert set(ours.candidates(key)) == set(allowed)
        chosen = ours.choose(key, lambda replica, number=number: (replica + number) % 4)
        stayed += key in known[chosen]
        known[chosen][key] = None
        known[chosen].move_to_end(key)
        if len(known[chosen]) > KEPT_KEYS:  # as its multiplexer does
            known[chosen].popitem(last=False)
    assert len(keys) / 3 < stayed < len(keys) and max(map(len, known)) == KEPT_KEYS


def test_a_user_stays_at_a_replica_and_the_less_busy_of_two_takes_a_new_one() -> None:
    coming = arrivals(Traffic(4_000, rate=4.0, users=300, zipf=0.5, prompt=(2, 9), answer=(2, 9), seed=9))
    found, _ = simulate(coming, SOME, replicas=5)
    homes: dict[int, set[int]] = {}
    for one in found:
        homes.setdefault(one.user, set()).add(one.replica)
    assert all(len(home) == 1 for home in homes.values()) and len(set.union(*homes.values())) == 5
    assert all(Placement(2, seed).choose("new", [3, 2].__getitem__) == 1 for seed in range(20))


def test_a_crowd_goes_by_further_keys_and_home_again() -> None:
    crowds = Crowds(2)
    with ExitStack() as many:
        assert [many.enter_context(crowds.one("ada")) for _ in range(5)] == ["ada", "ada", "ada-1", "ada-1", "ada-2"]
        with crowds.one("ben") as other, crowds.one("") as none, crowds.one("") as none_again, crowds.one("") as last:
            assert other == "ben" and none == none_again == last == ""
    with crowds.one("ada") as again:
        assert again == "ada"
    assert not crowds._under_way


def test_who_asks_more_than_one_replica_can_answer_is_answered_by_several() -> None:
    """One user asks three times what a replica can answer; others ask little."""
    rows, step = 4, SOME.of_step(4)
    rate = 3 * rows / (10 * step)
    hot = arrivals(Traffic(600, rate=rate, users=1, prompt=(1, 1), answer=(10, 10), seed=1))
    rest = [replace(one, user=1 + number) for number, one in enumerate(hot[::50])]
    coming = sorted([*hot, *rest], key=lambda one: one.at)
    found, _ = simulate(coming, SOME, replicas=6, rows=rows, waiting=20)
    assert not any(one.refused for one in found) and len({one.replica for one in found if one.user == 0}) > 2
    alone, _ = simulate(coming, SOME, replicas=1, rows=rows, waiting=20)
    assert sum(one.refused for one in alone) > 200
    waits = [one.first - one.at for one in found if one.user > 0 and not one.refused]
    assert len(waits) == len(rest) and max(waits) < 20 * step


@pytest.mark.parametrize(
    ("live", "longest", "overtaken"),
    [(2, 25, 16), (1, 25, 3), (4, 25, 16), (4, 3, 16)],
    ids=["too few live", "one live", "pieces of prompts", "prompts of one token"],
)
def test_its_forwards_are_the_engines(
    live: int, longest: int, overtaken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All come at once: the same prompts are read in the same pieces and groups between steps of as many sequences."""
    for module in (engine_module, simulated_module):
        monkeypatch.setattr(module, "MOST_OVERTAKEN", overtaken)
    coming = arrivals(Traffic(40, rate=math.inf, users=6, zipf=0.5, prompt=(1, longest), answer=(1, 9), seed=10))
    assert _forwards_of_engine(coming, live, tmp_path, monkeypatch) == _forwards_on_paper(coming, live)


def _forwards_of_engine(coming: list[Arrival], live: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    model = make_spoken(folder)
    kept = write_random(model, folder / "random", 2, 0)
    engine = Engine(
        model, rows=3, chunk=12, longest=64, pools=[Pool(model, "user", lambda name: ("1", kept), most=live)]
    )
    batch, found = engine._batch, []

    def logged(name: str, tell: Any) -> None:
        inner = getattr(batch, name)
        monkeypatch.setattr(batch, name, lambda *given: (found.append(tell(*given)), inner(*given))[1])

    logged("step", lambda: ("step", len(batch.running)))
    logged("read", lambda most: ("read", min(most, batch.reading[0].unread)))
    logged("read_together", lambda group: ("read", len(group) * (max(one.unread for one in group) - 1)))
    engine._thread = threading.current_thread()  # its turns are taken here, when all have come
    tickets = []
    for one in coming:
        sampling = Sampling(temperature=0, max_tokens=one.answer)
        asked = Request([5] * one.prompt, {"user": f"u{one.user}"}, sampling, user=str(one.user), ends=False)
        tickets.append(engine.submit(asked, lambda event: None))
    engine._readers.shutdown(wait=True)  # type: ignore[union-attr]
    while not all(ticket.finished for ticket in tickets):
        engine._turn()
    assert [ticket.tokens for ticket in tickets] == [one.answer for one in coming]
    return found


def _forwards_on_paper(coming: list[Arrival], live: int) -> list[Any]:
    """By the seconds that each takes: a token of a prompt one, a step of n sequences n thousand."""
    found: list[Any] = []

    class Logged(Replica):
        def _spend(self, seconds: float) -> None:
            steps = len(self.running) * 1000
            if seconds >= 1000:
                found.extend([("step", len(self.running))] * round(seconds / steps))
            elif seconds:
                found.append(("read", round(seconds)))
            super()._spend(seconds)

    told = Costs(step=((1, 1000.0), (2, 2000.0)), prompt=((0, 0.0), (1, 1.0), (2, 2.0)), fetch=0, swap=0, chunk=12)
    replica = Logged(told, 3, live, 256, np.random.default_rng(0))
    for one in coming:
        replica.submit(Asked(one.at, one.user, one.prompt, one.prompt, one.answer))
    replica.advance(math.inf)
    assert replica.under_way == 0
    return found


def test_its_limits_are_the_engines() -> None:
    import inspect

    from molora.serve import engine, pool

    assert engine._READERS == READERS
    assert inspect.signature(pool.Pool).parameters["host_bytes"].default == HOST_BYTES
    waiting = inspect.signature(engine.Engine).parameters["waiting"].default
    assert inspect.signature(simulate).parameters["waiting"].default == waiting


def test_costs_between_and_beyond_points() -> None:
    assert [SOME.of_step(rows) for rows in (1, 8, 15)] == pytest.approx([0.02, 0.04, 0.06])
    assert [SOME.of_prompt(tokens) for tokens in (0, 1, 128.5)] == pytest.approx([0.01, 0.01, 0.055])


def test_costs_are_read_as_written(tmp_path: Path) -> None:
    write_costs(SOME, tmp_path / "new" / "costs.json")
    assert read_costs(tmp_path / "new" / "costs.json") == SOME


GOOD: dict[str, Any] = {"step": [[1, 0.1]], "prompt": [[1, 0.1]], "fetch": 0.1, "swap": 0.1}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "no file of costs"),
        ("{", "no file of costs"),
        ("[]", "one JSON object"),
        (GOOD | {"steps": 1}, "has no steps"),
        ({"step": [[1, 0.1]]}, "prompt, fetch, swap is missing"),
        (GOOD | {"step": []}, "list of points"),
        (GOOD | {"step": [[1, 0.1, 2]]}, "list of points"),
        (GOOD | {"step": [[1, "fast"]]}, "list of points"),
        (GOOD | {"step": [[2, 0.1], [1, 0.1]]}, "not in order"),
        (GOOD | {"step": [[1, 0]]}, "more than 0"),
        (GOOD | {"swap": -1}, "swap is a number from 0 on"),
        (GOOD | {"fetch": math.nan}, "fetch is a number from 0 on"),
        (GOOD | {"fetch_spread": True}, "fetch_spread is a number from 0 on"),
        (GOOD | {"chunk": 0}, "chunk is a whole number"),
        (GOOD | {"chunk": 1.5}, "chunk is a whole number"),
    ],
)
def test_bad_costs_are_refused_with_a_sentence(told: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    if told is not None:
        path.write_text(told if isinstance(told, str) else json.dumps(told))
    with pytest.raises(ConfigError, match=said) as refused:
        read_costs(path)
    assert str(path) in str(refused.value)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_STEPS", 3)
    monkeypatch.setattr(measuring, "_ROUNDS", 1)
    monkeypatch.setattr(measuring, "_PROMPTS", (2, 4))
    model = make_spoken(tmp_path)
    before = list(model.stack["user"].adapters)
    assert [number for number, _ in measure_costs(model, rows=(1, 3), rank=2).step] == [1, 3]
    assert list(model.stack["user"].adapters) == before
    model.stack["user"].shared = False
    with pytest.raises(StackError, match="shared: true"):
        measure_costs(model)
    model.stack["user"].shared = True
    saved, file, out = save_spoken(model, tmp_path / "saved"), tmp_path / "costs.json", tmp_path / "out" / "told.json"
    given = ["bench", "costs", str(saved), "--out", str(file), "--rows", "5", "--rank", "2", "--dtype", "float32"]
    assert CliRunner().invoke(app, given).exit_code == 0
    measured = read_costs(file)
    assert [number for number, _ in measured.step] == [1, 2, 5] and [tokens for tokens, _ in measured.prompt] == [2, 4]
    assert measured.fetch > 0 and measured.swap > 0 and measured.adapter_bytes > 0 and measured.dtype == "float32"
    asked = ["bench", "simulate", str(file), "--requests", "50", "--replicas", "2", "--users", "9", "--out", str(out)]
    shown = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "to the first token" in shown.output and "0 of 50 requests refused" in shown.output
    told = json.loads(CliRunner().invoke(app, [*asked, "--json"]).output)
    assert told == json.loads(out.read_text()) and told["rows"][0]["answered"] == 50
    assert {"command", "commit", "date", "machine", "seed", "data", "rows", "must"} <= set(told)
    assert CliRunner().invoke(app, ["bench", "simulate", str(tmp_path / "none.json")]).exit_code != 0


def test_a_simulation_needs_no_torch() -> None:
    code = "import sys, molora.serve.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
