"""What the HTTP server refuses: by name, in OpenAI's form, and with nothing begun."""

import json
import re
import threading

import pytest

from molora.errors import AdapterNotFoundError
from tests.serve.asking import CHAT, chat, chunks, client_of, error_of, text
from tests.serve.fake_engine import FakeEngine


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": []}, "functions"),
        ({"audio": {}}, "audio"),
        ({"temprature": 1}, "temprature"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
        ({"messages": []}, "messages"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "up to 1024"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"selection": {"domain": 3}}, "selection.domain"),
        ({"stream_options": {"more": 1}}, "stream_options.more"),
    ],
)
def test_what_is_not_served_is_named(fields, named):
    engine = FakeEngine()
    assert named in error_of(chat(client_of(engine), **fields), 400)["message"]
    assert engine.requests == []


@pytest.mark.parametrize("fields", [{"prompt": []}, {"prompt": ["a"] * 65}, {"prompt": [[1], "a"]}, {"echo": True}])
def test_completions_are_refused_too(fields):
    error_of(text(client_of(), **fields), 400)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b'"\\ud800"', b"[" * 100_000, b'{"a":' * 90_000 + b"1" + b"}" * 90_000, b"\xff\xfe",
     b'{"model": "molora", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
     b'{"model": "molora", "messages": [{"role": "user", "content": "\\ud800"}]}',
     b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
     b'{"model": "molora", "\\ud800": 1, "messages": [{"role": "user", "content": "x"}]}',
     b'{"model": "molora", "seed": ' + b"9" * 5000 + b', "messages": [{"role": "user", "content": "x"}]}'],
)  # fmt: skip
def test_strange_bodies_are_refused_in_words(body):
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = client_of().post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code in (400, 404)
        assert error_of(response, response.status_code)["message"]


def test_a_body_that_is_too_large_is_refused_with_and_without_its_length():
    engine = FakeEngine()
    client = client_of(engine, most_body=1000)
    big = json.dumps({**CHAT, "messages": [{"role": "user", "content": "x" * 2000}]}).encode()
    as_json = {"content-type": "application/json"}
    error_of(client.post("/v1/chat/completions", content=big, headers=as_json), 413)
    parts = iter([big[:900], big[900:]])
    error_of(client.post("/v1/chat/completions", content=parts, headers=as_json), 413)
    assert engine.requests == [] and chat(client).status_code == 200


def test_errors_of_the_engine_have_their_status():
    response = chat(client_of(FakeEngine(busy=True)), n=2)
    assert "wait already" in error_of(response, 429)["message"] and response.headers["retry-after"] == "7"
    error_of(chat(client_of(FakeEngine(longest=5))), 400)
    assert error_of(chat(client_of(FakeEngine(ending="timeout"))), 408)["code"] == "timeout"
    broken = error_of(chat(client_of(FakeEngine(ending="error"))), 503)
    assert broken["code"] == "engine_failure" and "secret" not in broken["message"]
    error_of(chat(client_of(FakeEngine(ending="cancelled"))), 503)
    error_of(chat(client_of(FakeEngine(ending="error", script="")), stream=True), 503)


def test_who_is_told_to_come_back_has_nothing_running():
    engine = FakeEngine(go=threading.Semaphore(0))
    submit = engine.submit

    def full(request, tell):
        engine.busy = len(engine.tickets) == 2
        return submit(request, tell)

    engine.submit = full
    error_of(chat(client_of(engine), n=3), 429)
    assert [ticket.cancelled.is_set() for ticket in engine.tickets] == [True, True]


def test_a_failure_within_a_stream_is_its_last_word():
    told = chunks(chat(client_of(FakeEngine(ending="timeout")), stream=True))
    assert told[-1]["error"]["code"] == "timeout" and told[-2]["choices"][0]["delta"]["content"] == "e"


def test_unknown_names_are_404_and_bad_choices_400():
    error_of(chat(client_of(), model="base+law"), 404)
    error_of(chat(client_of(), selection={"domain": "law"}), 404)
    error_of(chat(client_of(), selection={"weather": None}), 404)
    error_of(chat(client_of(), model="base+pirate"), 400)
    error = error_of(chat(client_of(), selection={"user": ["ada", "ben"]}), 400)
    assert not {"ada", "ben"} & set(re.findall(r"\w+", error["message"]))


def test_what_a_pool_does_not_find_is_404_without_its_place():
    missing = AdapterNotFoundError("There is nothing at /secret/eve.")
    client = client_of(FakeEngine(script="", ending="error", error=missing, pools={"user": None}))
    for streamed in (True, False):
        error = error_of(chat(client, model="base+user/eve", stream=streamed), 404)
        assert error["code"] == "model_not_found" and "secret" not in error["message"]


def test_wrong_paths_and_methods_have_the_same_form():
    error_of(client_of().get("/v1/nothing"), 404)
    error_of(client_of().get("/v1/chat/completions"), 405)
