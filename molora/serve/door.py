"""What a request passes before it is read: its key, and the most bytes that it may have."""

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from fastapi import HTTPException, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molora.errors import MoLoRAError
from molora.serve.failures import described, failure
from molora.serve.keys import Key, Keys
from molora.serve.keys import Scope as KeyScope

MOST_BODY_BYTES = 1 << 20  # of a request,
MOST_ADAPTER_BYTES = 1 << 30  # and of an upload
_LOCAL = Key("local", ("use",))  # without a file of keys: whoever reaches this machine's own address
_SILENCE_S = 60.0  # between two parts of a body
NEW_KEY = "Make a key that may with `molora serve --new-key NAME --scope manage`."


class CheckHost:
    """Answers only who asks for the server by one of its names."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            told = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            host = told.rpartition(":")[0] if told.rpartition(":")[2].isdigit() else told
            if host.strip("[]") not in self.hosts:
                names = " or ".join(dict.fromkeys(self.hosts))
                message = (
                    f"Without keys this server is asked as {names} only. Make keys with `molora serve --new-key NAME`."
                )
                return await failure(400, message, code="unknown_host")(scope, receive, send)
        await self.app(scope, receive, send)


class CheckKey:
    """Lets nothing under /v1/ in without a key that is known; which one, is then in the request's state."""

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            try:
                key = self._key(dict(scope["headers"]).get(b"authorization", b""))
            except MoLoRAError as error:
                status, message, code = described(error)
                return await failure(status, message, code=code)(scope, receive, send)
            if key is None:
                answer = failure(
                    401,
                    "A known API key is needed: send it as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                return await answer(scope, receive, send)
            scope.setdefault("state", {})["key"] = key
        await self.app(scope, receive, send)

    def _key(self, header: bytes) -> Key | None:
        if self.keys is None:
            return _LOCAL
        kind, _, token = header.decode("latin-1").partition(" ")
        return self.keys.find(token.strip()) if kind.lower() == "bearer" else None


def needs(wanted: KeyScope) -> Callable[[Request], Key]:
    """A dependency: the request's key, which must have a scope."""

    def check(request: Request) -> Key:
        key: Key = request.state.key
        if wanted not in key.scopes:
            advice = f" {NEW_KEY}" if wanted == "manage" else ""
            raise HTTPException(403, f"The key {key.name!r} has not the scope {wanted!r}.{advice}")
        return key

    return check


class LimitBody:
    """Ends the reading of a body that is too large or stands still, whether or not its length was told.

    Args:
        most: gives the most bytes for a path.
    """

    def __init__(self, app: ASGIApp, most: Callable[[str], int]) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        most, read, ended = self.most(scope["path"]), 0, False
        too_large = f"The body is larger than {most} bytes."
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or len(told) > 18 or int(told) > most:
            return await failure(413, too_large, code="body_too_large")(scope, receive, send)

        async def limited() -> Message:
            nonlocal read, ended
            if ended:  # what comes now is that the client has gone, whenever that is
                return await receive()
            try:
                message: Any = await asyncio.wait_for(receive(), _SILENCE_S)
            except TimeoutError:
                raise HTTPException(408, "The body did not come in time.") from None
            read += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if read > most:
                raise HTTPException(413, too_large)
            return message

        await self.app(scope, limited, send)
