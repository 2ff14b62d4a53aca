"""Bodies at the door: what is read of them, and when that ends."""

import asyncio
import json
from typing import Any

import pytest

from molora.serve import door
from molora.serve.app import build_app
from tests.serve.fake_engine import FakeEngine


def ask(parts: list[bytes | None], *headers: tuple[bytes, bytes], most: int = 1000) -> tuple[int, dict[str, Any], int]:
    """Status and error of a request for a completion whose body comes in parts, and how many of them were read; None:
    nothing comes any more."""
    app: Any = build_app(FakeEngine(), most_body=most)  # type: ignore[arg-type]
    told: list[Any] = []
    left = list(parts)

    async def receive() -> dict[str, Any]:
        if not left or left[0] is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Any) -> None:
        told.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "", "query_string": b"",
        "headers": [(b"host", b"here"), (b"content-type", b"application/json"), *headers],
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    body = b"".join(message.get("body", b"") for message in told[1:])
    return told[0]["status"], json.loads(body).get("error", {}), len(parts) - len(left)


def test_many_small_parts_are_one_large_body() -> None:
    status, error, read = ask([b" " * 400] * 9)
    assert (status, read) == (413, 3) and "1000 bytes" in error["message"]


@pytest.mark.parametrize("length", [b"1001", b"-5", b"1e3", b"9" * 5000, "²".encode("latin-1")])
def test_a_length_that_is_too_large_or_none_is_refused_before_anything_is_read(length: bytes) -> None:
    status, error, read = ask([b"{}"], (b"content-length", length))
    assert (status, error["code"], read) == (413, "body_too_large", 0)


def test_a_body_that_stands_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_SILENCE_S", 0.05)
    status, error, read = ask([b'{"model"', None])
    assert (status, read) == (408, 1) and "in time" in error["message"]


def test_a_body_in_parts_is_whole() -> None:
    body = json.dumps({"model": "base", "prompt": "ab"}).encode()
    assert ask([bytes([byte]) for byte in body])[::2] == (200, len(body))
