"""How tests ask the app, and read what it answers."""

import json

from fastapi.testclient import TestClient

from molora.serve.app import build_app
from tests.serve.fake_engine import FakeEngine

CHAT = {"model": "molora", "messages": [{"role": "user", "content": "Hi"}]}


def client_of(engine=None, **settings):
    return TestClient(build_app(engine or FakeEngine(), **settings), raise_server_exceptions=False)


def chat(client, path="/v1/chat/completions", headers=None, **fields):
    return client.post(path, json={**CHAT, **fields}, headers=headers)


def text(client, **fields):
    return client.post("/v1/completions", json={"model": "base", "prompt": "ab", **fields})


def chunks(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def error_of(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]
