"""Adapters that come when they are asked for: the right one in each answer, however many there are."""

import threading
from pathlib import Path
from typing import Any

import pytest

from molora import MoLoRAModel
from molora.errors import AdapterMismatchError, AdapterNotFoundError, BusyError, RequestError, StackError
from molora.serve.pool import Pool
from molora.serve.requests import Event, Finished
from molora.serve.turns import MOST_OVERTAKEN
from tests.conftest import make_base, write_adapter
from tests.parity.test_equalities import make_routed
from tests.serve.live import until
from tests.serve.test_engine import Heard, Held, alone, endless, engines, greedy, held  # noqa: F401 - a fixture


class Users:
    """Adapters on disk, each in a version; counts what is asked of it."""

    def __init__(self, base: Any, root: Path, count: int) -> None:
        self.at = {f"u{n}": ("1", write_adapter(base, root / f"u{n}", 50 + n, r=2)) for n in range(count)}
        self.asked: list[str] = []
        self.gate: threading.Event | None = None

    def find(self, name: str) -> tuple[str, Path]:
        self.asked.append(name)
        if name not in self.at:
            raise AdapterNotFoundError(f"There is no adapter {name!r}.")
        if self.gate is not None and name == "u0":
            self.gate.wait(60)
        return self.at[name]


@pytest.fixture
def model(base: Any, adapters: dict[str, Path]) -> MoLoRAModel:
    return endless(make_routed(base, adapters))


@pytest.fixture
def users(base: Any, tmp_path: Path) -> Users:
    return Users(base, tmp_path, 12)


def expected(model: MoLoRAModel, users: Users, name: str, ids: list[int], tokens: int) -> list[int]:
    """By the model itself, with the adapter in its stack by name."""
    model.add_adapter("user", "now", users.at[name][1])
    found = alone(model, ids, {"domain": "auto", "user": "now"}, tokens)
    model.remove_adapter("user", "now")
    return found


def test_many_users_in_the_room_of_few(model: MoLoRAModel, users: Users, engines: Any) -> None:  # noqa: F811
    asked = [(f"u{n * 5 % 12}", [5 + n, 9, 11 + n], 4 + n % 5) for n in range(40)]
    answers = [expected(model, users, *one) for one in asked]
    pool = Pool(model, "user", users.find, most=3)
    engine = engines(model, pools=[pool])
    heard = [Heard(engine, greedy(ids, {"domain": "auto", "user": name}, tokens)) for name, ids, tokens in asked]
    own = Heard(engine, greedy([5, 6, 7], {"domain": None, "user": "ada"}, 6))  # the layer's own
    assert [one.tokens() for one in heard] == answers
    assert own.tokens() == alone(model, [5, 6, 7], {"domain": None, "user": "ada"}, 6)
    stats = pool.stats()
    assert stats.live == 3 and stats.reads == 12 and stats.live_hits + stats.host_hits == 40
    assert len(model.stack["user"].adapters) == 4 and "ada" not in users.asked


def test_a_new_version_serves_new_requests_only(model: MoLoRAModel, users: Users, base: Any, engines: Any) -> None:  # noqa: F811
    old = expected(model, users, "u1", [5, 6, 7], 40)
    engine = engines(model, pools=[Pool(model, "user", users.find, most=4)])
    first = Heard(engine, greedy([5, 6, 7], {"domain": "auto", "user": "u1"}, 40))
    said = [first.next().token]  # type: ignore[union-attr]
    users.at["u1"] = ("2", users.at["u2"][1])
    second = Heard(engine, greedy([5, 6, 7], {"domain": "auto", "user": "u1"}, 40))
    assert said + [piece.token for piece in first.all()[0]] == old
    new = second.tokens()
    assert new != old and new == expected(model, users, "u2", [5, 6, 7], 40)


def test_a_slow_store_holds_nobody_else(model: MoLoRAModel, users: Users, engines: Any) -> None:  # noqa: F811
    users.gate = threading.Event()
    engine = engines(model, pools=[Pool(model, "user", users.find)])
    slow = Heard(engine, greedy([5, 6], {"domain": None, "user": "u0"}, 4))
    assert len(Heard(engine, greedy([5, 6], {"domain": None, "user": "u1"}, 4)).tokens()) == 4
    assert len(Heard(engine, greedy([5, 6], {"domain": "auto"}, 4)).tokens()) == 4
    late = Heard(engine, greedy([5, 6], {"domain": None, "user": "u0"}, 4, timeout_s=0.0))
    assert late.all()[1].reason == "timeout"
    users.gate.set()
    assert len(slow.tokens()) == 4


def test_who_waits_for_a_store_alone_is_late_in_time(model: MoLoRAModel, users: Users, engines: Any) -> None:  # noqa: F811
    users.gate = threading.Event()
    engine = engines(model, pools=[Pool(model, "user", users.find)])
    late = Heard(engine, greedy([5, 6], {"domain": None, "user": "u0"}, 4, timeout_s=0.1))
    assert late.all()[1].reason == "timeout"  # though nobody comes who would wake the engine
    users.gate.set()


def test_nothing_is_brought_for_who_has_left(model: MoLoRAModel, users: Users, engines: Any) -> None:  # noqa: F811
    users.gate = threading.Event()
    engine = engines(model, pools=[Pool(model, "user", users.find)])
    slow = [Heard(engine, greedy([5, 6], {"domain": None, "user": "u0"}, 4)) for _ in range(4)]  # all readers wait
    gone = [Heard(engine, greedy([5, 6], {"domain": None, "user": f"u{n}"}, 4)) for n in (1, 2, 3)]
    for one in gone:
        one.ticket.cancel()
        assert one.all()[1].reason == "cancelled"
    last = Heard(engine, greedy([5, 6], {"domain": None, "user": "u4"}, 4))
    users.gate.set()
    assert [len(one.tokens()) for one in (*slow, last)] == [4] * 5
    assert set(users.asked) == {"u0", "u4"}


def test_what_cannot_be_used_is_an_error_of_its_request(
    model: MoLoRAModel,
    users: Users,
    tmp_path: Path,
    engines: Any,  # noqa: F811
) -> None:
    users.at["wide"] = ("1", write_adapter(make_base("gpt2"), tmp_path / "wide", 1, fan_in_fan_out=True))
    engine = engines(model, pools=[Pool(model, "user", users.find, most=2)])
    wrong = Heard(engine, greedy([5], {"user": "wide"}, 3))
    nobody = Heard(engine, greedy([5], {"user": "nobody"}, 3))
    assert isinstance(wrong.all()[1].error, AdapterMismatchError)
    assert isinstance(nobody.all()[1].error, AdapterNotFoundError)
    for choice in (["u1", "u2"], {"u1": 1.0, "ada": 0.5}, {"u1": 1.0, "u2": 0.5, "u3": 1.0}):
        with pytest.raises(RequestError, match="Name one adapter"):
            engine.submit(greedy([5], {"user": choice}, 3), print)
    with pytest.raises(StackError, match="not shared"):
        Pool(model, "domain", users.find)


def test_the_names_of_slots_are_nobodys(model: MoLoRAModel, users: Users, engines: Any) -> None:  # noqa: F811
    engine = engines(model, pools=[Pool(model, "user", users.find)])
    pieces, _ = Heard(engine, greedy([5, 6], {"domain": None, "user": "u3"}, 3, routes=True)).all()
    assert all(("user", "u3", 1.0) in piece.route for piece in pieces)
    (slot,) = set(model.stack["user"].adapters) - {"ada"}
    other = Heard(engine, greedy([5, 6], {"domain": None, "user": slot}, 3))
    assert isinstance(other.all()[1].error, AdapterNotFoundError)  # not another's adapter by its slot


def test_two_at_once_with_weights(model: MoLoRAModel, users: Users, engines: Any) -> None:  # noqa: F811
    engine = engines(model, pools=[Pool(model, "user", users.find, most=2)])
    found = Heard(engine, greedy([5, 6], {"domain": None, "user": {"u1": 0.7, "u2": 0.5}}, 8)).tokens()
    for name in ("u1", "u2"):
        model.add_adapter("user", name, users.at[name][1])
    assert found == alone(model, [5, 6], {"domain": None, "user": {"u1": 0.7, "u2": 0.5}}, 8)


def test_what_was_read_is_kept_as_far_as_there_is_room(model: MoLoRAModel, users: Users) -> None:
    pool = Pool(model, "user", users.find, most=1)
    one = pool.read("u0")
    assert one.packed.nbytes > one.packed.adapter.nbytes  # with what was made of it
    pool.host_bytes = 3 * one.packed.nbytes
    for name in ("u1", "u2", "u0", "u3", "u0", "u1"):  # u3 puts out u1
        pool.read(name)
    stats = pool.stats()
    assert stats.host_bytes == 3 * one.packed.nbytes and stats.reads == 5
    assert pool.lease(one) is not None and pool.lease(pool.read("u1")) is None  # the only place is taken
    pool.release(one)
    slot = pool.lease(pool.read("u1"))
    assert slot is not None and pool.shown(slot) == "u1"


def test_an_adapter_is_on_its_way_while_its_request_waits(
    model: MoLoRAModel,
    users: Users,
    monkeypatch: pytest.MonkeyPatch,
    engines: Any,  # noqa: F811
) -> None:
    fetched: list[Any] = []
    monkeypatch.setattr(model.adapted, "fetch", fetched.append)
    pool = Pool(model, "user", users.find)
    engine = engines(model, pools=[pool])
    held = Held(engine)
    heard = [Heard(engine, greedy([5, 6, 7], {"domain": None, "user": "u1"}, 4)) for _ in range(2)]
    assert until(lambda: len(fetched) == 2)  # of which the second finds that the first one was there
    assert pool.stats().live == 0 and {one.adapter.path for one in fetched} == {users.at["u1"][1]}
    held.free()
    assert heard[0].tokens() == heard[1].tokens()
    Heard(engine, greedy([5, 6, 7], {"domain": None, "user": "u1"}, 4)).tokens()
    assert len(fetched) == 2  # it is live


def test_hits_misses_and_evictions_are_counted(model: MoLoRAModel, users: Users) -> None:
    pool = Pool(model, "user", users.find, most=2)
    pool.host_bytes = 3 * pool.read("u0").packed.nbytes

    def ask(name: str) -> None:
        read = pool.read(name)
        assert pool.lease(read) is not None
        pool.release(read)

    for name in ("u0", "u1", "u0", "u2", "u0", "u1", "u3", "u2"):
        ask(name)
    stats = pool.stats()
    # Of the model, u2 puts out u1, then u1 u2, u3 u0, and u2 u1; of the memory u3 puts out u2, and u2 u0.
    assert (stats.live_hits, stats.host_hits, stats.evictions) == (2, 6, 4)
    assert (stats.reads, stats.host_evictions) == (5, 2)


def test_ten_requests_at_once_for_one_that_is_not_there_yet(model: MoLoRAModel, users: Users, engines: Any) -> None:  # noqa: F811
    pool = Pool(model, "user", users.find, most=1)
    engine = engines(model, pools=[pool])
    held = Held(engine)
    heard = [Heard(engine, greedy([5, 6, n + 7], {"domain": None, "user": f"u{n % 2}"}, 5)) for n in range(10)]
    held.free()
    answers = [one.tokens() for one in heard]
    for n, found in enumerate(answers):
        model.add_adapter("user", "now", users.at[f"u{n % 2}"][1])
        assert found == alone(model, [5, 6, n + 7], {"domain": None, "user": "now"}, 5)
        model.remove_adapter("user", "now")


def test_a_crowd_keeps_nobody_from_the_only_place(model: MoLoRAModel, users: Users, engines: Any) -> None:  # noqa: F811
    engine = engines(model, rows=2, pools=[Pool(model, "user", users.find, most=1)])
    order: list[str] = []

    def ask(user: str, tokens: int) -> None:
        def tell(event: Event) -> None:
            if isinstance(event, Finished):
                order.append(user if event.error is None else "an error")

        engine.submit(greedy([5, 6], {"domain": None, "user": user}, tokens, user=user), tell)

    with held(engine):
        for number in range(60):
            ask("u0", 10 if number else 5)  # so that never two of them end in the same step
        ask("u1", 3)
    assert until(lambda: len(order) == 61, 60)
    assert sorted(order) == ["u0"] * 60 + ["u1"] and MOST_OVERTAKEN <= order.index("u1") <= MOST_OVERTAKEN + 2


def test_one_that_waits_for_room_is_counted_once(model: MoLoRAModel, users: Users, engines: Any) -> None:  # noqa: F811
    pool = Pool(model, "user", users.find, most=2)
    engine = engines(model, pools=[pool])
    running = [Heard(engine, greedy([5, 6], {"domain": None, "user": name}, 60)) for name in ("u1", "u2")]
    both = Heard(engine, greedy([5, 6], {"domain": None, "user": {"u1": 1.0, "u3": 0.5}}, 3))
    assert [len(one.tokens()) for one in (*running, both)] == [60, 60, 3]
    stats = pool.stats()
    assert (
        stats.live_hits + stats.host_hits == 4
        and pool.leases == 0
        and not any(live.leases for live in pool._live.values())
    )


def test_more_than_pins_leave_room_for_is_told_at_once(model: MoLoRAModel, users: Users, engines: Any) -> None:  # noqa: F811
    pool = Pool(model, "user", users.find, most=3)
    engine = engines(model, pools=[pool])
    engine.change([], lambda: (pool.pin(pool.read("u0")), pool.pin(pool.read("u1"))))
    running = Heard(engine, greedy([5, 6], {"domain": None, "user": "u4"}, 60))
    running.next()
    both = Heard(engine, greedy([5, 6], {"domain": None, "user": {"u2": 1.0, "u3": 0.5}}, 3))
    one = Heard(engine, greedy([5, 6], {"domain": None, "user": "u2"}, 3))
    assert len(running.tokens_left()) == 59  # until its end there might be room
    end = both.all()[1]
    assert isinstance(end.error, RequestError) and "no room" in str(end.error) and len(one.tokens()) == 3
    assert pool.leases == 0


def test_what_is_pinned_stays(model: MoLoRAModel, users: Users, base: Any, tmp_path: Path, engines: Any) -> None:  # noqa: F811
    pool = Pool(model, "user", users.find, most=3)
    engine = engines(model, pools=[pool])

    def ask(name: str) -> None:
        Heard(engine, greedy([5, 6, 7], {"domain": None, "user": name}, 2)).tokens()

    engine.change([], lambda: pool.pin(pool.read("u0")))
    assert pool.pinned == ["u0"] and pool.stats().pinned == 1 and pool.stats().host_hits == 0
    for number in (1, 2, 3, 4):
        ask(f"u{number}")
    hits = pool.stats().live_hits
    ask("u0")
    assert pool.stats().live_hits == hits + 1  # it never left
    users.at["u0"] = ("2", write_adapter(base, tmp_path / "newer", 99, r=2))
    ask("u0")
    for number in (1, 2, 3):
        ask(f"u{number}")
    ask("u0")
    assert ("u0", "2") in pool._live and ("u0", "1") not in pool._live and pool.stats().live == 3
    assert pool.unpin("u0") and not pool.unpin("u0") and pool.pinned == []
    for number in (1, 2, 3):
        ask(f"u{number}")
    assert ("u0", "2") not in pool._live


def test_what_others_pinned_stays_once_it_was_asked_for(model: MoLoRAModel, users: Users) -> None:
    pool = Pool(model, "user", users.find, most=3)

    def ask(name: str) -> None:
        read = pool.read(name)
        assert pool.lease(read) is not None
        pool.release(read)

    ask("u0")
    pool.keep(frozenset({"u0", "u1", "u2"}))
    assert pool.pinned == ["u0"]
    for name in ("u1", "u2", "u3", "u4"):  # one place stays free: u2 is as all others
        ask(name)
    assert pool.pinned == ["u0", "u1"] and pool.stats().evictions == 2
    users.at["u1"] = ("2", users.at["u5"][1])
    ask("u1")
    assert pool.unpin("u0")
    for name in ("u0", "u3", "u4"):  # it is not pinned anew
        ask(name)
    assert set(pool._live) == {("u1", "2"), ("u3", "1"), ("u4", "1")}
    pool.keep(frozenset({"u4"}))
    assert pool.pinned == ["u4"]


def test_pins_leave_room_for_others(model: MoLoRAModel, users: Users) -> None:
    pool = Pool(model, "user", users.find, most=2)
    held = [pool.read(name) for name in ("u1", "u2")]
    assert all(pool.lease(one) for one in held)
    with pytest.raises(BusyError, match="in use"):
        pool.pin(pool.read("u0"))
    assert pool.pinned == []
    for one in held:
        pool.release(one)
    pool.pin(pool.read("u0"))
    pool.pin(pool.read("u0"))  # again
    with pytest.raises(StackError, match="unpin one"):
        pool.pin(held[0])
    assert pool.lease(held[0]) and pool.lease(held[1]) is None and pool.pinned == ["u0"]
