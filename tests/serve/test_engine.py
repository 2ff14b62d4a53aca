"""Requests that come and go in one batch: each is answered as if it were alone."""

import copy
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.errors import BaseModelError, BusyError, NonFiniteError, RequestError, SelectionError
from molora.serve.batch import Batch
from molora.serve.engine import Engine
from molora.serve.prefixes import BLOCK
from molora.serve.requests import Event, Finished, Piece, Request, Sampling
from molora.serve.rows import Rows
from molora.serve.sampling import Sampler
from molora.serve.text import Text
from molora.serve.ticket import Ticket
from molora.serve.warm import warm
from tests.conftest import DEVICE, FAMILIES, make_base, write_adapter
from tests.parity.test_equalities import ROUTED, make_routed
from tests.serve.live import until
from tests.unit.spoken import make_spoken
from tests.unit.test_keyed import make_keyed, questions

SELECTIONS: list[dict[str, Any]] = [
    {"personality": "sage", "domain": "auto", "user": "ada"},
    {"domain": "code"},
    {"domain": None},
    {"domain": "auto"},
    {"domain": {"math": 0.7, "code": 0.5}},
    {"personality": "sage", "domain": ["math"]},
]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(params=[False, True], ids=["at once", "while the next step runs"])
def engines(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes engines, which read prompts together and tell of tokens as on a CPU and as on a GPU."""
    made: list[Engine] = []

    def make(model: MoLoRAModel, **settings: Any) -> Engine:
        made.append(Engine(model, **{"rows": 4, "longest": 96, "chunk": 16, **settings}))
        made[-1]._batch.tells_later = made[-1]._batch.reads_again = request.param
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.close()


class Heard:
    """What is told of a request."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.ticket = engine.submit(request, self.events.put)

    def next(self) -> Event:
        return self.events.get(timeout=60)

    def all(self) -> tuple[list[Piece], Finished]:
        pieces = []
        while isinstance(event := self.next(), Piece):
            pieces.append(event)
        assert self.events.empty()
        return pieces, event

    def tokens(self) -> list[int]:
        pieces, end = self.all()
        assert end.tokens == len(pieces) and end.error is None, end
        return [piece.token for piece in pieces]

    def tokens_left(self) -> list[int]:
        """Of which some were heard already."""
        pieces, end = self.all()
        assert end.error is None, end
        return [piece.token for piece in pieces]


def endless(model: MoLoRAModel) -> MoLoRAModel:
    model.base.generation_config.eos_token_id = None
    return model


def greedy(ids: Sequence[int], selection: Any, tokens: int, **more: Any) -> Request:
    return Request(ids, selection, Sampling(temperature=0, max_tokens=tokens), **more)


def alone(model: MoLoRAModel, ids: Sequence[int], selection: Any, tokens: int) -> list[int]:
    found = model.generate(
        input_ids=torch.tensor([list(ids)], device=DEVICE), selection=selection, max_new_tokens=tokens, **GREEDY
    )
    return found[0, len(ids) :].tolist()


def begun(engine: Engine, ids: Sequence[int], selection: Any, tokens: int = 5, tell: Any = print) -> Ticket:
    """A request that is to be given to the engine's batch itself."""
    one = greedy(list(ids), selection, tokens)
    sampler, text = Sampler.of(one.sampling, one.ids, DEVICE), Text(engine.model.tokenizer, ())
    return Ticket(one, tell, None, sampler, text, list(ids), tokens, dict(selection))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    chance = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 50, (count,), generator=chance).tolist()
    return [torch.randint(3, 97, (size,), generator=chance).tolist() for size in sizes]


@pytest.mark.parametrize("kind", ROUTED)
def test_each_is_answered_as_if_alone(kind: str, base: Any, adapters: dict[str, Path], engines: Any) -> None:
    model = endless(make_routed(base, adapters, **ROUTED[kind]))
    asked = [
        (ids, SELECTIONS[number % len(SELECTIONS)], 3 + 5 * (number % 4)) for number, ids in enumerate(prompts(14))
    ]
    expected = [alone(model, *one) for one in asked]
    engine = engines(model)
    heard = [Heard(engine, greedy(*one)) for one in asked]  # more than rows, of all lengths: they come and go
    assert [one.tokens() for one in heard] == expected
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.requests_total) == (0, 0, 14)
    assert stats.tokens_total == sum(tokens for _, _, tokens in asked)
    assert stats.prompt_tokens_total == sum(len(ids) for ids, _, _ in asked)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma3"])
def test_every_family(family: str, tmp_path: Path, engines: Any) -> None:
    base = make_base(family)
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    path = write_adapter(base, tmp_path / "a", 1, **fan)
    model = endless(MoLoRAModel.from_base(base, Stack([StackLayer("domain", {"a": path})])))
    asked = [(ids, {"domain": "a" if number % 2 else None}, 7) for number, ids in enumerate(prompts(6, 1))]
    expected = [alone(model, *one) for one in asked]
    engine = engines(model)
    heard = [Heard(engine, greedy(*one)) for one in asked]
    assert [one.tokens() for one in heard] == expected


def test_a_window_that_is_too_short_is_refused(tmp_path: Path) -> None:
    base = make_base("gemma3")
    path = write_adapter(base, tmp_path / "a", 1)
    model = MoLoRAModel.from_base(base, Stack([StackLayer("domain", {"a": path})]))
    with pytest.raises(BaseModelError, match="16 tokens"):
        Engine(model, rows=2, longest=64)


@pytest.fixture
def model(base: Any, adapters: dict[str, Path]) -> MoLoRAModel:
    return endless(make_routed(base, adapters))


def test_a_seed_gives_the_same_answer_beside_others(model: MoLoRAModel, engines: Any) -> None:
    engine = engines(model)
    ids = prompts(1, 3)[0]
    request = Request(ids, {"domain": "auto"}, Sampling(temperature=0.9, top_p=0.9, seed=7, max_tokens=20))
    other = Request(ids, {"domain": "auto"}, Sampling(temperature=0.9, top_p=0.9, seed=8, max_tokens=20))
    first = Heard(engine, request).tokens()
    beside = [Heard(engine, one) for one in (other, request, greedy(ids, None, 9))]
    found = [one.tokens() for one in beside]
    assert found[1] == first and found[0] != first


def test_routes_are_told(model: MoLoRAModel, engines: Any) -> None:
    ids = prompts(1, 4)[0]
    pieces, _ = Heard(engines(model), greedy(ids, {"domain": "auto"}, 12, routes=True)).all()
    whole = torch.tensor([[*ids, *(piece.token for piece in pieces)]], device=DEVICE)
    with torch.no_grad():
        routes = model(whole, selection={"domain": "auto"}, output_routes=True).routes
    for place, piece in enumerate(pieces):
        at = len(ids) - 1 + place  # the position from which the token was predicted
        named = {name: weight for _, name, weight in piece.route if name}
        slots = routes.slots[0, at].tolist()
        assert sorted(named) == sorted(routes.names[slot].split("/")[1] for slot in slots if slot >= 0)


def test_logprobs_are_the_models(model: MoLoRAModel, engines: Any) -> None:
    ids = prompts(1, 5)[0]
    sampling = Sampling(temperature=0.7, seed=1, max_tokens=6, logprobs=3)
    pieces, _ = Heard(engines(model), Request(ids, {"domain": "code"}, sampling)).all()
    whole = torch.tensor([[*ids, *(piece.token for piece in pieces)]], device=DEVICE)
    with torch.no_grad():
        logits = model(whole, selection={"domain": "code"}).logits[0].log_softmax(-1)
    for place, piece in enumerate(pieces):
        here = logits[len(ids) - 1 + place]
        assert piece.logprob == pytest.approx(float(here[piece.token]), abs=1e-4)
        assert [token for token, _ in piece.likeliest] == here.topk(3).indices.tolist()


def test_what_ends_it(model: MoLoRAModel, engines: Any) -> None:
    ids = prompts(1, 6)[0]
    said = alone(model, ids, None, 10)
    model.base.generation_config.eos_token_id = said[4]
    pieces, end = Heard(engines(model), greedy(ids, None, 10)).all()
    assert [piece.token for piece in pieces] == said[: said.index(said[4]) + 1] and end.reason == "stop"
    model.base.generation_config.eos_token_id = None
    assert Heard(engines(model), greedy(ids, None, 2)).all()[1].reason == "length"
    pieces, end = Heard(engines(model, longest=len(ids) + 5), Request(ids, None, Sampling(temperature=0))).all()
    assert len(pieces) == 5 and end.reason == "length" and end.prompt_tokens == len(ids)


def test_what_is_refused_at_once(model: MoLoRAModel, engines: Any) -> None:
    engine = engines(model)
    for ids, sampling, wrong in [
        ([], Sampling(), "empty"),
        ([5] * 96, Sampling(), "up to 96"),
        ([5] * 90, Sampling(max_tokens=7), "up to 6"),
        ([5, 97], Sampling(), "from 0 to 96"),
    ]:
        with pytest.raises(RequestError, match=wrong):
            engine.submit(Request(ids, None, sampling), print)
    with pytest.raises(SelectionError, match="no adapter 'law'"):
        engine.submit(Request([5], {"domain": "law"}), print)
    for settings in ({"temperature": -1}, {"top_p": 0}, {"top_p": float("nan")}, {"stop": ("",)}, {"max_tokens": 0}):
        with pytest.raises(RequestError):
            Sampling(**settings)


def test_too_many_are_told_to_come_back(model: MoLoRAModel, engines: Any) -> None:
    engine = engines(model, rows=1, waiting=2)
    held = Held(engine)
    waiting = [Heard(engine, greedy([5, 6], None, 3)) for _ in range(2)]
    with pytest.raises(BusyError, match="2 requests wait") as caught:
        engine.submit(greedy([5, 6], None, 3), print)
    assert caught.value.retry_after_s >= 1
    held.free()
    assert [len(one.tokens()) for one in waiting] == [3, 3]


def test_nobody_is_told_to_wait_for_the_time_in_which_nobody_asked(
    model: MoLoRAModel, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, passed = engines(model, rows=1, waiting=100), 0.0
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed)
    for _ in range(20):
        Heard(engine, greedy([5, 6], None, 1)).tokens()
        passed += 600
    held = Held(engine)
    waiting = [Heard(engine, greedy([5, 6], None, 1)) for _ in range(100)]
    with pytest.raises(BusyError) as caught:
        engine.submit(greedy([5, 6], None, 3), print)
    assert 1 <= caught.value.retry_after_s < 100
    held.free()
    assert [len(one.tokens()) for one in waiting] == [1] * 100


class Held:
    """A request whose listener does not return: the engine stands still until it is set free."""

    def __init__(self, engine: Engine, tokens: int = 1, user: str = "") -> None:
        self._go, arrived = threading.Event(), threading.Event()

        def tell(event: Event) -> None:
            arrived.set()
            self._go.wait(60)

        engine.submit(greedy([5], None, tokens, user=user), tell)
        arrived.wait(60)

    def free(self) -> None:
        self._go.set()


def test_users_are_served_in_turn(model: MoLoRAModel, engines: Any) -> None:
    engine = engines(model, rows=1)
    order: list[str] = []
    held = Held(engine)
    ended = threading.Semaphore(0)

    def listener(name: str) -> Any:
        def tell(event: Event) -> None:
            if isinstance(event, Finished):
                order.append(name)
                ended.release()

        return tell

    for user in ("ada", "ada", "ada", "bob", "cleo", "bob"):
        engine.submit(greedy([7, 8], None, 2, user=user), listener(user))
    held.free()
    for _ in range(6):
        assert ended.acquire(timeout=60)
    assert order == ["ada", "bob", "cleo", "ada", "bob", "ada"]


def test_cancelled_and_late_ones_leave_and_others_go_on(model: MoLoRAModel, engines: Any) -> None:
    asked = [(ids, SELECTIONS[number], 30) for number, ids in enumerate(prompts(4, 8))]
    asked = [(ids[:40], selection, tokens) for ids, selection, tokens in asked]
    expected = [alone(model, *one) for one in asked]
    engine = engines(model)
    heard = [Heard(engine, greedy(*one)) for one in asked]
    for _ in range(4):
        heard[0].next()
    heard[0].ticket.cancel()
    late = Heard(engine, greedy([9] * 20, None, 60, timeout_s=0.0))
    assert heard[0].all()[1].reason == "cancelled"
    assert late.all() == ([], Finished("timeout", 20, 0))
    assert [one.tokens() for one in heard[1:]] == expected[1:]


def test_whom_nobody_listens_to_ends(model: MoLoRAModel, engines: Any) -> None:
    engine, told = engines(model), list[Event]()

    def tell(event: Event) -> None:
        told.append(event)
        raise RuntimeError("the loop is closed")

    ticket = engine.submit(greedy([5, 6], None, 80), tell)
    assert until(lambda: ticket.finished) and ticket.tokens < 10
    assert isinstance(told[-1], Finished) and told[-1].reason == "cancelled"


def test_a_broken_adapter_ends_its_own_request(model: MoLoRAModel, adapters: Any, engines: Any) -> None:
    expected = alone(model, [5, 6, 7], {"domain": "math"}, 12)
    engine = engines(model)
    other = Heard(engine, greedy([5, 6, 7], {"domain": "math"}, 12))
    huge = Heard(engine, greedy([5, 6], {"domain": {"code": 1e38}}, 12))
    pieces, end = huge.all()
    assert pieces == [] and end.reason == "error" and isinstance(end.error, NonFiniteError)
    assert other.tokens() == expected


def test_a_token_that_has_no_text_ends_its_own_request(
    model: MoLoRAModel, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may know more tokens than its tokenizer does, which then may raise anything."""
    expected = alone(model, [5, 6, 7], {"domain": "math"}, 12)
    engine, add, given = engines(model), Text.add, threading.Event()

    def told(text: Text, token: int) -> str:
        if text is bad.ticket.text and given.is_set():
            raise KeyError(token)
        given.set()
        return add(text, token)

    with held(engine):
        bad = Heard(engine, greedy([5, 6], None, 12))
        last = Heard(engine, greedy([5, 6], None, 1))
        other = Heard(engine, greedy([5, 6, 7], {"domain": "math"}, 12))
        monkeypatch.setattr(Text, "add", told)
    _, end = bad.all()
    assert end.reason == "error" and isinstance(end.error, KeyError) and end.tokens < 12
    assert len(last.tokens()) == 1 and other.tokens() == expected
    monkeypatch.setattr(Text, "rest", lambda text: {}["no"])  # at the end, too
    assert Heard(engine, greedy([5, 6], None, 3)).all()[1].reason == "error"
    monkeypatch.undo()
    assert engine.runs and len(Heard(engine, greedy([5, 6], None, 3)).tokens()) == 3


def test_a_fault_of_the_engine_keeps_nobody_waiting(model: MoLoRAModel, engines: Any, monkeypatch: Any) -> None:
    engine = engines(model, rows=1)
    held = Held(engine)
    waiting = [Heard(engine, greedy([5, 6], None, 3)) for _ in range(3)]

    def fail() -> None:
        monkeypatch.undo()
        raise RuntimeError("a fault")

    monkeypatch.setattr(engine, "_make_changes", fail)
    held.free()
    ends = [one.all()[1] for one in waiting]
    assert [end.reason for end in ends] == ["error"] * 3 and str(ends[0].error) == "a fault"
    assert engine.runs and len(Heard(engine, greedy([5, 6], None, 3)).tokens()) == 3


def test_an_adapter_changes_for_whole_sequences(model: MoLoRAModel, adapters: dict[str, Path], engines: Any) -> None:
    before = alone(model, [5, 6, 7], {"domain": "code"}, 40)
    untouched = alone(model, [8, 9], {"domain": "math"}, 40)
    engine = engines(model)
    old = Heard(engine, greedy([5, 6, 7], {"domain": "code"}, 40))
    other = Heard(engine, greedy([8, 9], {"domain": "math"}, 40))
    old.next()
    done = threading.Thread(
        target=lambda: engine.change(["domain/code"], lambda: model.replace_adapter("domain", "code", adapters["math"]))
    )
    done.start()
    new = Heard(engine, greedy([5, 6, 7], {"domain": "code"}, 40))
    assert [before[0], *(piece.token for piece in old.all()[0])][1:] == before[1:]
    assert other.tokens() == untouched
    done.join(60)
    after = new.tokens()
    assert after == alone(model, [5, 6, 7], {"domain": "math"}, 40) and after != before
    with pytest.raises(ValueError, match="as it came"):
        engine.change(["domain/code"], lambda: (_ for _ in ()).throw(ValueError("as it came")))


@pytest.mark.parametrize(
    ("choice", "waits"),
    [
        ({"domain": "auto"}, True),
        ({"domain": ["code"]}, True),
        ({"domain": {"math": 1.0, "code": 0.5}}, True),
        ({}, True),  # by the layer's default
        ({"domain": "math"}, False),
        ({"domain": ["math"]}, False),
        ({"domain": None}, False),
    ],
)
def test_a_change_waits_for_those_that_it_may_act_on(model: MoLoRAModel, choice: Any, waits: bool) -> None:
    engine, order = Engine(model, rows=2, longest=96), list[str]()
    began, asked = threading.Event(), threading.Event()

    def tell(event: Event) -> None:
        began.set()
        asked.wait(60)
        if isinstance(event, Finished):
            order.append("end")

    engine.start()
    engine.submit(greedy([5, 6, 7], choice, 20), tell)
    assert began.wait(60)
    change = threading.Thread(target=engine.change, args=(["domain/code"], lambda: order.append("change")))
    change.start()
    assert until(lambda: len(engine._changes) == 1)
    asked.set()
    change.join(60)
    assert until(lambda: len(order) == 2)
    engine.close()
    assert order == (["end", "change"] if waits else ["change", "end"])


def test_adapters_come_while_others_run(model: MoLoRAModel, adapters: dict[str, Path], engines: Any) -> None:
    expected = alone(model, [5, 6, 7], SELECTIONS[0], 40)
    engine = engines(model)
    running = Heard(engine, greedy([5, 6, 7], SELECTIONS[0], 40))
    running.next()
    engine.change([], lambda: model.add_adapter("user", "bob", adapters["code"]))
    assert Heard(engine, greedy([5, 6], {"domain": None, "user": "bob"}, 9)).tokens() == alone(
        model, [5, 6], {"domain": "code"}, 9
    )
    assert [piece.token for piece in running.all()[0]] == expected[1:]


def test_another_router_reads_the_texts_again(base: Any, adapters: dict[str, Path], engines: Any) -> None:
    model = endless(make_routed(base, adapters))
    other = make_routed(base, adapters, seed=9).router
    engine = engines(model)
    heard = Heard(engine, greedy([5, 6, 7, 8], {"domain": "auto"}, 40))
    first = [heard.next().token for _ in range(5)]  # type: ignore[union-attr]
    engine.change([], lambda: model.set_router(other))
    said = first + [piece.token for piece in heard.all()[0]]
    assert len(said) == 40
    # From the change on, a few tokens later than it was asked for, it is what the new router says of the whole text.
    whole = [alone(model, [5, 6, 7, 8, *said[:place]], {"domain": "auto"}, 40 - place) for place in range(5, 30)]
    assert any(rest == said[place:] for place, rest in enumerate(whole, 5))


def test_text_comes_in_whole_characters_and_ends_before_a_stop(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    ids = model.tokenizer("héllo 🙂 END of it")["input_ids"]
    text = Text(model.tokenizer, ["END", "never"])
    given = [text.add(token) for token in ids]
    assert "".join(given) == "héllo 🙂 " and text.stopped and text.rest() == ""
    text = Text(model.tokenizer, ["END"])
    given = [text.add(token) for token in model.tokenizer("abc EN")["input_ids"]]
    assert "".join(given) == "abc " and text.rest() == "EN"
    half = Text(model.tokenizer)
    assert [half.add(token) for token in model.tokenizer("é")["input_ids"]] == ["", "é"]


def test_closing_tells_everyone(model: MoLoRAModel) -> None:
    engine = Engine(model, rows=1, longest=96)
    with pytest.raises(BusyError, match="not running"):
        engine.submit(greedy([5], None, 3), print)
    engine.start()
    heard = [Heard(engine, greedy([5, 6], None, 80)) for _ in range(3)]
    heard[0].next()
    engine.close()
    assert [one.all()[1].reason for one in heard] == ["cancelled"] * 3
    with pytest.raises(BusyError):
        engine.submit(greedy([5], None, 3), print)


def test_closing_makes_what_was_to_be_changed(model: MoLoRAModel) -> None:
    engine, made = Engine(model, rows=1, longest=96), list[int]()
    engine.start()
    held, heard = Held(engine, tokens=80), Heard(engine, greedy([5, 6], None, 80))
    change = threading.Thread(target=engine.change, args=(["domain/code"], lambda: made.append(1)), daemon=True)
    change.start()
    assert until(lambda: len(engine._changes) == 1)
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert until(lambda: engine._closing)
    held.free()
    closing.join(60)
    change.join(60)
    assert made == [1] and not change.is_alive() and heard.all()[1].reason == "cancelled"


def test_what_a_broken_adapter_left_in_a_row_harms_nobody(model: MoLoRAModel, engines: Any) -> None:
    short, long = [5, 6, 7], list(range(5, 35))
    expected = [alone(model, ids, {"domain": "math"}, 6) for ids in (short, long)]
    engine = engines(model, rows=2)
    _, end = Heard(engine, greedy(range(5, 30), {"domain": {"code": 1e38}}, 6)).all()
    assert isinstance(end.error, NonFiniteError)
    # The first gets the row of the broken one, and the second makes a step look as far as its leftovers.
    both = [Heard(engine, greedy(ids, {"domain": "math"}, 6)) for ids in (short, long)]
    assert [one.tokens() for one in both] == expected


@pytest.mark.parametrize("how", ["cancelled", "timeout", "another router"])
def test_what_a_broken_adapter_left_half_read_harms_nobody(model: MoLoRAModel, how: str) -> None:
    """It is found to be broken at its first token only, which never came."""
    short, long = [5, 6, 7], list(range(5, 35))
    expected = [alone(model, ids, {"domain": "math"}, tokens) for ids, tokens in ((short, 40), (long, 6))]
    engine = Engine(model, rows=2, longest=96)
    batch, broken = engine._batch, begun(engine, range(5, 30), {"domain": {"code": 1e38}})
    with torch.no_grad():
        batch.begin(broken)
        batch.read(20)
        assert batch.reading == [broken] and not all(
            part[..., :20, :].isfinite().all() for part in batch.rows._parts(slice(0, 1))
        )
        if how == "another router":
            model.set_router(copy.deepcopy(model.router))
            batch.read(5)
            assert batch.again == [broken] and not batch.tickets
            batch.again.clear()  # it was cancelled meanwhile
        else:
            batch.leave(broken, "cancelled" if how == "cancelled" else "timeout")
    engine.start()
    first = Heard(engine, greedy(short, {"domain": "math"}, 40))  # in the row of the broken one, read alone
    first.next()
    assert Heard(engine, greedy(long, {"domain": "math"}, 6)).tokens() == expected[1]  # steps look as far as this
    assert first.tokens_left() == expected[0][1:]
    engine.close()


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """What is submitted within begins at once."""
    go = threading.Event()
    holder = threading.Thread(target=engine.change, args=([], go.wait))
    holder.start()
    try:
        yield
    finally:
        go.set()
        holder.join()


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each forward that reads several prompts, how many, and how many tokens of each were known."""
    found: list[tuple[int, int]] = []
    read = Batch.read_together

    def together(batch: Batch, group: Sequence[Ticket]) -> None:
        assert group[0].reader is not None
        found.append((len(group), min(ticket.reader.length for ticket in group if ticket.reader is not None)))
        return read(batch, group)

    monkeypatch.setattr(Batch, "read_together", together)
    return found


@pytest.mark.parametrize("kind", ROUTED)
def test_prompts_of_all_lengths_are_read_together(
    kind: str, base: Any, adapters: dict[str, Path], engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = endless(make_routed(base, adapters, **ROUTED[kind])), watched(monkeypatch)
    prompts = [[5, 6], list(range(7, 20)), [21, 22, 23], [9, 8, 7, 6, 5, 4, 3]]
    asked = list(zip(prompts, SELECTIONS, strict=False))
    expected = [alone(model, ids, selection, 8) for ids, selection in asked]
    engine = engines(model, chunk=64)
    with held(engine):
        heard = [Heard(engine, greedy(ids, selection, 8)) for ids, selection in asked]
    assert [one.tokens() for one in heard] == expected
    assert found == [(4, 0)] and engine.stats().prompt_tokens_total == sum(map(len, prompts))


def test_prompts_that_begin_alike_are_read_together_from_where_they_differ(
    model: MoLoRAModel, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, system = watched(monkeypatch), list(range(3, 3 + BLOCK))
    prompts = [[*system, *more] for more in ([80, 81, 82], [83, 84], [85, 86, 87, 88, 89])]
    expected = [alone(model, ids, {"domain": "auto"}, 6) for ids in prompts]
    engine = engines(model, chunk=96)
    assert Heard(engine, greedy(prompts[0], {"domain": "auto"}, 6)).tokens() == expected[0]
    with held(engine):
        heard = [Heard(engine, greedy(ids, {"domain": "auto"}, 6)) for ids in prompts]
    assert [one.tokens() for one in heard] == expected and found == [(3, BLOCK)]


@pytest.mark.parametrize("kind", ROUTED)
def test_what_is_known_of_some_is_read_again_with_the_others_where_that_is_faster(
    kind: str, base: Any, adapters: dict[str, Path], engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = endless(make_routed(base, adapters, **ROUTED[kind])), watched(monkeypatch)
    system = list(range(3, 3 + BLOCK))
    known, further = [*system, 80, 81, 82], [*system, 90, 91]
    prompts = [known, [5, 6, 7], further, [*system, *range(20, 20 + BLOCK)], [9, 8]]
    asked = [(ids, SELECTIONS[0]) for ids in prompts]
    expected = [alone(model, ids, selection, 6) for ids, selection in asked]
    engine = engines(model, rows=5, longest=160, chunk=3 * (BLOCK + 3))
    assert Heard(engine, greedy(known, SELECTIONS[0], 6)).tokens() == expected[0]
    with held(engine):
        heard = [Heard(engine, greedy(ids, selection, 6)) for ids, selection in asked]
    assert [one.tokens() for one in heard] == expected
    # The fourth is too long to be read with the three before it, or the fifth with it.
    assert found == ([(3, 0)] if engine._batch.reads_again else [(2, BLOCK)])


def test_whole_blocks_of_what_was_read_together_are_found_again(
    model: MoLoRAModel, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = watched(monkeypatch)
    prompts = [[first, *range(5, 5 + BLOCK), 9] for first in (3, 4)]
    expected = [alone(model, ids, {"domain": "auto"}, 6) for ids in prompts]
    engine = engines(model, chunk=192)
    for known in (0, BLOCK):
        with held(engine):
            heard = [Heard(engine, greedy(ids, {"domain": "auto"}, 6)) for ids in prompts]
        assert [one.tokens() for one in heard] == expected and found.pop() == (2, known)


def test_one_token_and_what_does_not_fit_are_read_alone(
    model: MoLoRAModel, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = watched(monkeypatch)
    prompts = [[5], [6], [7, 8, 9], list(range(5, 30))]
    expected = [alone(model, ids, {"domain": "auto"}, 5) for ids in prompts]
    engine = engines(model, chunk=32)
    with held(engine):
        heard = [Heard(engine, greedy(ids, {"domain": "auto"}, 5)) for ids in prompts]
    assert [one.tokens() for one in heard] == expected and not found


def test_a_warm_engine_has_run_all_sizes_and_begins_from_zero(
    model: MoLoRAModel, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, sizes, step = watched(monkeypatch), [], Batch.step

    def counted(batch: Batch) -> None:
        sizes.append(len(batch.running))
        return step(batch)

    monkeypatch.setattr(Batch, "step", counted)
    engine = engines(model, rows=6, longest=256, chunk=192, waiting=4)  # of fewer than there are rows
    assert warm(engine) > 0
    assert set(sizes) == {1, 2, 4, 6} and [many for many, _ in found] == [2, 4, 6]
    stats = engine.stats()
    assert stats.requests_total == stats.prompt_tokens_total == stats.tokens_total == stats.running == 0
    assert engine.prefixes.stats().held == 0
    expected = alone(model, [5, 6, 7], {"domain": "auto"}, 6)
    assert Heard(engine, greedy([5, 6, 7], {"domain": "auto"}, 6)).tokens() == expected


def test_what_fails_while_read_together_ends_and_the_next_go_on(
    model: MoLoRAModel, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(model, [5, 6, 7], {"domain": "math"}, 6)
    engine = engines(model, rows=3, chunk=64)
    running = Heard(engine, greedy([5, 6, 7], {"domain": "math"}, 40))
    running.next()

    def broken(*_: Any) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as here:
        here.setattr(Rows, "together", broken)
        with held(engine):
            two = [Heard(engine, greedy([5, 6, 7], {"domain": "math"}, 6)) for _ in range(2)]
        assert [one.all()[1].reason for one in two] == ["error", "error"]
    with held(engine):
        two = [Heard(engine, greedy([5, 6, 7], {"domain": "math"}, 6)) for _ in range(2)]
    assert [one.tokens() for one in two] == [expected, expected]
    pieces, _ = running.all()
    assert [piece.token for piece in pieces[:5]] == expected[1:]


def test_those_that_are_being_read_move_up_when_others_leave(model: MoLoRAModel) -> None:
    texts = [[5, 6, 7], list(range(5, 25)), [9, 8, 7, 6], list(range(30, 38))]
    expected = [alone(model, ids, {"domain": "auto"}, 5) for ids in texts]
    engine = Engine(model, rows=4, longest=96)
    batch = engine._batch
    batch.reads_again = False  # else, as on a GPU, what was read a piece of is read once more with the others
    heard: list[list[Any]] = [[] for _ in texts]
    tickets = [
        begun(engine, ids, {"domain": "auto"}, tell=events.append) for ids, events in zip(texts, heard, strict=True)
    ]
    running, half, gone, last = tickets
    with torch.no_grad():
        batch.begin(running)
        batch.read(96)
        for ticket in (half, gone, last):
            batch.begin(ticket)
        assert not batch.has_room and batch.group(96) == [half, gone, last] and batch.group(59) == [half, gone]
        batch.read(10)  # of the first a piece, and nothing of the others
        assert batch.group(96) == [half]
        batch.leave(gone, "cancelled")
        batch.leave(running, "cancelled")
        assert batch.tickets == [half, last]
        batch.read(96)
        batch.read(96)
        while batch.running:
            batch.step()
    found = [[event.token for event in events if isinstance(event, Piece)] for events in heard]
    assert (found[1], found[3], found[2]) == (expected[1], expected[3], []) and found[0] == expected[0][:1]


def test_what_a_question_is_told_by_acts_all_along(base: Any, tmp_path: Path, engines: Any) -> None:
    """Keyed layers: each request has the adapter that its own prompt belongs to, whatever is shared with others'."""
    paths = {name: write_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("low", "high"), 1)}
    model = endless(make_keyed(copy.deepcopy(base), paths))
    beginning = torch.randint(3, 97, (BLOCK,), generator=torch.Generator().manual_seed(2)).tolist()
    asked = [beginning + one.tolist() * 12 for topic in paths for one in questions(topic, 4, seed=7)]
    asked = [ids[: BLOCK + 60] for ids in asked]
    chosen = [model.find(torch.tensor([ids]))["task"] for ids in asked]
    assert set(chosen) == set(paths)
    expected = [alone(model, ids, {"task": name}, 9) for ids, name in zip(asked, chosen, strict=True)]
    assert expected == [alone(model, ids, None, 9) for ids in asked]
    engine = engines(model, longest=256)
    assert [Heard(engine, greedy(ids, {"task": "auto"}, 9)).tokens() for ids in asked] == expected
    assert engine.prefixes.stats().found == 6 * BLOCK  # those of the same adapter share the beginning
    heard = [Heard(engine, greedy(ids, None, 9)) for ids in asked]
    assert [one.tokens() for one in heard] == expected
    one = Heard(engine, greedy(asked[0], {"task": ["high"]}, 9))
    assert one.tokens() == alone(model, asked[0], {"task": "high"}, 9)
    with pytest.raises(SelectionError, match="no adapter 'third'"):
        engine.submit(greedy(asked[0], {"task": ["third"]}, 9), print)


def test_one_that_cannot_be_told_loses_no_other(
    base: Any, adapters: dict[str, Path], tmp_path: Path, engines: Any
) -> None:
    """Also where a new router has all others begin again in the same moment."""
    paths = {name: write_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("low", "high"), 1)}
    layers = [StackLayer("domain", {"math": adapters["math"]})]
    router = RouterConfig(width=8, hidden=16, units=12)
    model = endless(make_keyed(copy.deepcopy(base), paths, layers=layers, router=router))
    model.add_adapter("task", "third", paths["low"])  # which has no key
    engine = engines(model)
    ids = questions("low", 1, seed=7)[0].tolist()
    running = Heard(engine, greedy(ids, None, 60))
    running.next()

    def change() -> Heard:
        model.set_router(copy.deepcopy(model.router))
        return Heard(engine, greedy(ids, {"task": ["third"]}, 9))

    bad = engine.change([], change)
    pieces, end = bad.all()
    assert not pieces and isinstance(end.error, SelectionError) and "'third' has no key" in str(end.error)
    assert len(running.tokens_left()) == 59


def test_one_whose_adapter_has_gone_meanwhile_loses_no_other(model: MoLoRAModel, engines: Any) -> None:
    """With the adapter goes its row of the router, so that all others begin again in the same moment."""
    engine = engines(model)
    running = Heard(engine, greedy([5, 6, 7], {"domain": None}, 60))
    running.next()

    def change() -> Heard:
        late = Heard(engine, greedy([5, 6], {"domain": "math"}, 4))
        model.remove_adapter("domain", "math")
        return late

    pieces, end = engine.change([], change).all()
    assert not pieces and isinstance(end.error, SelectionError) and "no adapter 'math'" in str(end.error)
    assert len(running.tokens_left()) == 59
