"""The load of :mod:`molora.serve.load` against a server at an address: ours, vLLM's, or another one of OpenAI's API."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np

from molora.errors import ConfigError
from molora.serve.load import Answered
from molora.serve.traffic import Arrival

VOCABULARY = 1000  # the ids of prompts are below: every model has them


def replay_at(
    address: str, name: str, coming: Sequence[Arrival], key: str = "", tick: Callable[[], None] = lambda: None
) -> list[Answered]:
    """Asks as ``coming`` says, by streamed completions that do not end before their length.

    Args:
        address: as http://host:port, without /v1.
        name: the model to ask for; ``{user}`` in it stands for the number of who asks.
        coming: from :func:`molora.serve.traffic.arrivals`.
        key: sent as the API key.
        tick: called when an answer is whole, or has failed.

    Raises:
        ConfigError: nobody answers there, or not that key.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    _reach(address, headers)
    return asyncio.run(_replay(address, name, coming, headers, tick))


def _reach(address: str, headers: dict[str, str]) -> None:
    try:
        reply = httpx.get(f"{address}/v1/models", headers=headers, timeout=10)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"No server answers at {address} ({type(error).__name__}).") from error
    if reply.status_code in (401, 403):
        raise ConfigError(f"The server at {address} does not take this key: give one with --key.")


async def _replay(
    address: str, name: str, coming: Sequence[Arrival], headers: dict[str, str], tick: Callable[[], None]
) -> list[Answered]:
    chance, begun = np.random.default_rng(1), time.perf_counter()
    found = [Answered(0.0) for _ in coming]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(headers=headers, timeout=None, limits=limits) as client:

        async def ask(one: Arrival, answered: Answered, body: dict[str, Any]) -> None:
            await asyncio.sleep(max(0.0, begun + one.at - time.perf_counter()))
            answered.asked = time.perf_counter() - begun
            try:
                await _answer(client, f"{address}/v1/completions", body, answered, begun)
            except (httpx.HTTPError, ValueError):  # or what is no JSON
                answered.reason = "error"
            tick()

        bodies = [_body(name, one, chance.integers(3, VOCABULARY, one.prompt).tolist()) for one in coming]
        await asyncio.gather(*map(ask, coming, found, bodies))
    return found


def _body(name: str, one: Arrival, ids: list[int]) -> dict[str, Any]:
    return {
        "model": name.replace("{user}", str(one.user)),
        "prompt": ids,
        "max_tokens": one.answer,
        "temperature": 0,
        "ignore_eos": True,  # vLLM's word for it, and ours
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _answer(client: httpx.AsyncClient, url: str, body: dict[str, Any], answered: Answered, begun: float) -> None:
    """Writes down when pieces of an answer come."""
    answered.reason = "error"
    async with client.stream("POST", url, json=body) as reply:
        if reply.status_code != 200:
            answered.reason = "busy" if reply.status_code == 429 else "error"
            return
        async for line in reply.aiter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                answered.reason = "error"
                return
            for choice in chunk.get("choices", ()):
                answered.tokens.append(time.perf_counter() - begun)
                answered.reason = choice.get("finish_reason") or answered.reason
            if usage := chunk.get("usage"):
                answered.count = usage["completion_tokens"]
