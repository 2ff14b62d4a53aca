"""The app behind a real socket, for what a test client in the same loop cannot show."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import uvicorn


@contextmanager
def serving(app: Any, port: int = 0) -> Iterator[str]:
    """The address of ``app``, which runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def unread(address: str, path: str, body: bytes, *headers: str) -> Iterator[socket.socket]:
    """A connection over which something was asked, and that has hardly any room for the answer."""
    place = urlsplit(address)
    told = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # the server's side keeps room for some of these
        slow.connect((place.hostname, place.port))
        slow.sendall("\r\n".join([*told, *headers, "", ""]).encode() + body)
        yield slow


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether ``true`` comes to be within a time."""
    ends = time.monotonic() + seconds
    while not true() and time.monotonic() < ends:
        time.sleep(0.01)
    return true()
