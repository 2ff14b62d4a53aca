"""The door before several replicas, which are here in the same process."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from molora.serve import forward
from molora.serve.app import build_app
from molora.serve.keys import Keys
from tests.serve.asking import CHAT, error_of
from tests.serve.fake_engine import FakeEngine


class Replica:
    """Answers all requests; keeps what it was handed."""

    def __init__(self, keys: Keys) -> None:
        self.app = build_app(FakeEngine(), keys=keys)  # type: ignore[arg-type]
        self.asked: list[tuple[str, bytes]] = []

    def __call__(self, key: str, scope: Any, body: bytes) -> Any:
        self.asked.append((scope["path"], body))
        return Messages(forward.answer(self.app, scope, body))


class Messages:
    def __init__(self, told: Any) -> None:
        self.told = told

    def __aiter__(self) -> "Messages":
        return self

    async def __anext__(self) -> Any:
        return await anext(self.told)

    def cancel(self) -> None:
        """The test has no time left when it ends."""


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.json")


@pytest.fixture
def replica(keys: Keys) -> Replica:
    return Replica(keys)


@pytest.fixture
def door(replica: Replica, keys: Keys) -> TestClient:
    async def measured() -> dict[str, str]:
        return {}

    app = forward.build_door(
        replica, measured, shared=("user",), fixed=lambda layer, name: layer == "domain", at_once=2, keys=keys
    )
    return TestClient(app, raise_server_exceptions=False)


def test_a_fault_of_a_replica_is_in_its_log(
    door: TestClient, replica: Replica, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a fault")

    replica.app.get("/v1/fault")(fail)
    answer = door.get("/v1/fault", headers=headers(keys.create("use", ["use"])))
    assert error_of(answer, 500)["code"] == "internal_error" and "a fault" not in answer.text
    assert "ZeroDivisionError: a fault" in caplog.text


def headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_what_a_key_may_not_upload_is_not_taken_in(door: TestClient, replica: Replica, keys: Keys) -> None:
    use, manage = keys.create("use", ["use"]), keys.create("manage", ["manage"])
    body = {"content": b"x" * 3_000_000, "headers": headers(use) | {"content-type": "multipart/form-data; boundary=b"}}
    assert error_of(door.post("/v1/adapters/user/ada", **body), 403)
    assert error_of(door.post("/v1/adapters/domain/law", **body), 403)  # as it says without the door, not 409
    assert replica.asked == [("/v1/adapters/user/ada", b""), ("/v1/adapters/domain/law", b"")]
    assert error_of(door.post("/v1/adapters/domain/law", headers=headers(manage)), 409)["code"] == "fixed_adapter"
    error_of(door.post("/v1/adapters/user/ada", content=b"--b", headers=headers(manage)), 400)
    assert replica.asked[2:] == [("/v1/adapters/user/ada", b"--b")]
    assert door.post("/v1/chat/completions", json=CHAT, headers=headers(use)).status_code == 200


class Broken:
    """A replica that takes a request, says ``parts``, and is gone; without parts it never takes one."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts, self.cancelled = [{"type": "taken"}, *parts] if parts else [], 0

    def __call__(self, key: str, scope: Any, body: bytes) -> "Broken":
        return self

    def __aiter__(self) -> "Broken":
        return self

    async def __anext__(self) -> Any:
        if not self.parts:
            await asyncio.Event().wait()
        if (part := self.parts.pop(0)) is None:
            raise ConnectionError("secret inside")
        return part

    def cancel(self) -> None:
        self.cancelled += 1


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
PART = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}


@pytest.mark.parametrize("parts", [[], [None], [START, PART, None]], ids=["not there", "gone", "gone within a stream"])
def test_a_replica_that_is_gone_ends_its_requests_in_words(parts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "TAKEN_S", 0.1)
    replica = Broken(parts)
    app = forward.build_door(replica, dict, shared=(), fixed=lambda layer, name: False, at_once=2)  # type: ignore[arg-type]
    answer = TestClient(app, raise_server_exceptions=False).post("/v1/chat/completions", json=CHAT)
    assert replica.cancelled == 1 and "secret" not in answer.text
    if len(parts) < 2:
        assert error_of(answer, 503)["code"] == "engine_failure" and answer.headers["retry-after"] == "1"
    else:
        first, error, done = answer.text.strip().split("\n\n")
        assert (first, done) == ("data: {}", "data: [DONE]")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_failure"
