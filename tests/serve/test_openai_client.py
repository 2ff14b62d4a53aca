"""OpenAI's own client against the server behind a socket, and clients that leave or read slowly."""

import asyncio
import json
import threading
from types import SimpleNamespace

import httpx
import openai
import pytest

from molora.serve import forward, pace
from molora.serve.app import build_app
from molora.serve.metrics import Metrics
from molora.serve.proxies import CutSlow
from molora.serve.requests import Request
from molora.serve.stream import Answers, EventStream
from tests.serve.fake_engine import FakeEngine
from tests.serve.live import serving, unread, until

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def address(engine):
    with serving(build_app(engine)) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat(client):
    reply = client.chat.completions.create(model="base+math", messages=MESSAGES, logprobs=True, top_logprobs=1, n=2)
    assert [choice.message.content for choice in reply.choices] == ["Hello there"] * 2
    assert reply.choices[0].finish_reason == "stop" and reply.usage.completion_tokens == 22
    assert reply.choices[0].logprobs.content[0].top_logprobs[0].token == "H"


def test_a_stream_comes_piece_by_piece(client, engine):
    engine.go = threading.Semaphore(0)
    engine.go.release()
    extra = {"routes": True, "selection": {"domain": "math"}}
    with client.chat.completions.create(
        model="molora", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, extra_body=extra
    ) as reply:
        said = []
        for chunk in reply:  # the next token is only made when this one is here
            if chunk.choices:
                said.append(chunk.choices[0].delta.content)
            engine.go.release()
            last = chunk
    assert "".join(text or "" for text in said) == "Hello there" and len(said) == 12
    assert last.usage.completion_tokens == 11 and engine.requests[0].selection["domain"] == "math"


def test_routes_reach_the_client(client):
    reply = client.chat.completions.create(model="molora", messages=MESSAGES, stream=True, extra_body={"routes": True})
    assert next(iter(reply)).routes == [["domain", "math", 0.75], ["user", None, 0.0]]


def test_completions_and_models(client):
    reply = client.completions.create(model="base", prompt="ab", max_tokens=3, logprobs=1)
    assert reply.choices[0].text == "Hel" and reply.choices[0].finish_reason == "length"
    assert reply.choices[0].logprobs.tokens == ["H", "e", "l"]
    told = client.completions.create(model="base", prompt="ab", stream=True)
    assert "".join(chunk.choices[0].text for chunk in told) == "Hello there"
    assert "molora" in [model.id for model in client.models.list()]
    assert client.models.retrieve("base+domain/math").id == "base+domain/math"


def test_errors_are_its_own_types(client, engine):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="tools") as error:
        client.chat.completions.create(model="molora", messages=MESSAGES, tools=[])
    assert error.value.param == "tools"
    engine.ending = "error"
    with pytest.raises(openai.APIError, match="engine failed"):
        list(client.chat.completions.create(model="molora", messages=MESSAGES, stream=True))
    engine.busy = True
    with pytest.raises(openai.RateLimitError) as busy:
        client.chat.completions.create(model="molora", messages=MESSAGES)
    assert busy.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize("streamed", [True, False])
def test_who_leaves_ends_what_runs_for_him(address, engine, streamed):
    engine.go = threading.Semaphore(2)
    body = {"model": "molora", "messages": MESSAGES, "stream": streamed, "n": 2}
    with httpx.Client(timeout=1.0) as client:
        if streamed:
            with client.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
                assert "Hello"[0] in next(response.iter_text())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{address}/v1/chat/completions", json=body)
    assert until(lambda: all(ticket.cancelled.is_set() for ticket in engine.tickets))
    assert len(engine.tickets) == 2


class Near:
    """A replica in this process, which sends as one behind Ray does: without knowing what was taken."""

    def __init__(self, app):
        self.app = app

    def __call__(self, key, scope, body):
        self.messages = forward.answer(self.app, scope, body)
        return self

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await anext(self.messages)

    def cancel(self):
        """Whoever waits for a message has ended the rest."""


def through_a_proxy(app):
    door = forward.build_door(Near(app), dict, shared=(), fixed=lambda layer, name: False, at_once=2)
    return CutSlow(door)


@pytest.mark.parametrize("around", [lambda app: app, through_a_proxy], ids=["alone", "through a proxy"])
@pytest.mark.parametrize("reads", ["nothing", "a little"])
def test_a_slow_client_is_cut(engine, monkeypatch, reads, around):
    monkeypatch.setattr(pace, "SLOW_S", 0.5)
    engine.script, engine.delay_s = "x" * 200_000, 0.001
    asked = {"model": "molora", "stream": True, "messages": MESSAGES, "logprobs": True, "top_logprobs": 20}
    with serving(around(build_app(engine))) as address:
        with unread(address, "/v1/chat/completions", json.dumps(asked).encode()) as slow:

            def cut():
                if reads == "a little":
                    slow.recv(200)
                return bool(engine.tickets) and engine.tickets[0].cancelled.is_set()

            assert until(cut, 30)
        assert engine.counts.tokens_total < 200_000
        engine.script = "Fine"
        assert httpx.post(f"{address}/v1/completions", json={"model": "base", "prompt": "a"}).status_code == 200
        body = {"model": "base", "prompt": "a", "stream": True}
        assert "[DONE]" in httpx.post(f"{address}/v1/completions", json=body).text


@pytest.mark.parametrize("last", ["data: x\n\n", "data: [DONE]\n\n"])
def test_who_takes_no_more_is_cut_at_any_part(monkeypatch, last):
    monkeypatch.setattr(pace, "SLOW_S", 0.05)
    cancelled = []

    async def lines():
        yield "x"

    async def forever(message=None):
        if message is None or message.get("body") == last.encode():
            await asyncio.Event().wait()

    answer = EventStream(lines(), SimpleNamespace(cancel=lambda: cancelled.append(1)))
    asyncio.run(asyncio.wait_for(answer({"type": "http"}, forever, forever), 10))
    assert cancelled == [1]


def test_who_leaves_while_his_request_is_taken_leaves_nothing_running(engine):
    submit, answers = engine.submit, []

    async def ask():
        answers.append(Answers(engine, Metrics(engine)))
        await answers[0].submit([Request([5])] * 3)

    def slow(request, tell):
        answers[0].cancel()  # in the loop, while this thread is at it
        return submit(request, tell)

    engine.submit, engine.go = slow, threading.Semaphore(0)
    asyncio.run(ask())
    assert [ticket.cancelled.is_set() for ticket in engine.tickets] == [True]


def test_others_are_answered_while_one_waits(address, engine):
    engine.go = threading.Semaphore(0)
    waiting = threading.Thread(
        target=lambda: httpx.post(f"{address}/v1/completions", json={"model": "base", "prompt": "a"}, timeout=30)
    )
    waiting.start()
    assert until(lambda: len(engine.tickets) == 1)
    assert httpx.get(f"{address}/health", timeout=2).status_code == 200
    for _ in range(20):
        engine.go.release()
    waiting.join(10)
    assert not waiting.is_alive()
