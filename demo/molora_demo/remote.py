"""The page over a running ``molora serve``: the same tabs, the answers from there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx

from molora.errors import MoLoRAError
from molora.selection import Selection
from molora.stack import StackLayer
from molora_demo.source import Numbers, Settings, Turn, messages_of

AT_ONCE = 8  # answers of this page; the server lets the others wait in its own order
TIMEOUT = httpx.Timeout(10.0, read=300.0)
TOLD = {
    "molora_sequences_total": "Answers",
    "molora_prompt_tokens_total": "Tokens read",
    "molora_generated_tokens_total": "Tokens written",
    "molora_prefix_tokens_total": "Tokens of prompts that were known already",
    "molora_store_evictions_total": "Copies that left the disk to make room",
}
PLACED = {
    ("molora_adapters_total", "live"): "Adapters asked for that were in the model (hits)",
    ("molora_adapters_total", "host"): "Adapters asked for that were put into it (misses)",
    ("molora_adapters_total", "read"): "Adapters that were read from the store",
    ("molora_adapter_evictions_total", "live"): "Adapters that left the model to make room (evictions)",
    ("molora_adapter_evictions_total", "host"): "Adapters that left memory to make room",
}
"""How a metric is shown, by its name and where it was counted."""


class RemoteToken(NamedTuple):
    """One token of a server's answer."""

    text: str
    route: list[tuple[str, str | None, float]]


class ServerSource:
    """A server that ``molora serve`` started.

    Args:
        url: such as http://127.0.0.1:8000. key: of the server's keys; None: it has none.

    Raises:
        MoLoRAError: it does not answer, or is no such server.
    """

    at_once = AT_ONCE
    model = None

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise MoLoRAError(f"{url!r} is no address of a server: write http://127.0.0.1:8000, say.") from error
        self._layers: list[StackLayer] = []
        self.catch_up()

    @property
    def layers(self) -> Sequence[StackLayer]:
        return self._layers

    def catch_up(self) -> list[str]:
        """Takes the server's stack as it is now."""
        told = self._json("/v1/stack")
        try:
            layers = [
                StackLayer(
                    layer["name"],
                    dict.fromkeys(layer["adapters"], self.url),
                    default=layer["default"],
                    shared=layer["shared"],
                    keyed=layer["keyed"],
                )
                for layer in told["layers"]
            ]
            self.name, self.has_router = str(told["base"]), bool(told["router"])
        except (KeyError, TypeError, MoLoRAError) as error:
            raise MoLoRAError(f"{self.url} does not answer as molora serve does.") from error
        before = {f"{layer.name}/{name}" for layer in self._layers or layers for name in layer.adapters}
        if [layer.name for layer in self._layers] == [layer.name for layer in layers]:
            for known, now in zip(self._layers, layers, strict=True):  # the page's controls hold these
                known.adapters = now.adapters
        else:
            self._layers = layers
        return [label for layer in layers for name in layer.adapters if (label := f"{layer.name}/{name}") not in before]

    def ask(
        self, turns: Sequence[Turn], prompt: str, selection: Selection, settings: Settings
    ) -> Iterator[RemoteToken]:
        """
        Raises:
            MoLoRAError: the server refuses, or has gone; in its words.
        """
        body = {
            "model": "molora",
            "messages": messages_of(turns, prompt),
            "selection": dict(selection),
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "stream": True,
            "routes": True,
        }
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as reply:
                if reply.status_code != 200:
                    reply.read()
                    raise MoLoRAError(_refusal(reply))
                yield from _tokens(reply.iter_lines())
        except httpx.HTTPError as error:
            raise MoLoRAError(self._gone()) from error

    def numbers(self) -> Numbers:
        """
        Raises:
            MoLoRAError: the server does not answer.
        """
        found = _metrics(self._get("/metrics").text)
        plain = {name: value for (name, labels), value in found.items() if not labels}
        places = {
            label: int(value) for (name, labels), value in found.items() if name == "molora_live_adapters"
            for _, label in labels
        }  # fmt: skip
        counts = {shown: plain[name] for name, shown in TOLD.items() if name in plain}
        for (name, labels), value in found.items():
            if (shown := PLACED.get((name, dict(labels).get("at", "")))) is not None:
                counts[shown] = counts.get(shown, 0) + value
        own = {layer.name: len(layer.adapters) for layer in self._layers}
        return Numbers(
            int(plain.get("molora_running", 0)),
            int(plain.get("molora_waiting", 0)),
            int(plain["molora_rows"]) if "molora_rows" in plain else None,
            {"of the stack": own, **({"of the store, in the model": places} if places else {})},
            {"Beginnings of prompts that are kept": int(plain.get("molora_prefix_bytes", 0))},
            counts,
        )

    def _json(self, path: str) -> Any:
        try:
            return self._get(path).json()
        except ValueError as error:
            raise MoLoRAError(f"{self.url} does not answer as molora serve does.") from error

    def _get(self, path: str) -> httpx.Response:
        try:
            reply = self._client.get(path)
        except httpx.HTTPError as error:
            raise MoLoRAError(self._gone()) from error
        if reply.status_code != 200:
            raise MoLoRAError(_refusal(reply))
        return reply

    def _gone(self) -> str:
        return f"The server at {self.url} does not answer. Start it (molora serve), then ask again."


def _tokens(lines: Iterator[str]) -> Iterator[RemoteToken]:
    """Those of an answer's events."""
    ended = False
    for line in lines:
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            ended = True
            break
        event = json.loads(data)
        if "error" in event:
            raise MoLoRAError(str(event["error"]["message"]))
        for choice in event["choices"]:
            text = choice["delta"].get("content")
            if text is not None:
                yield RemoteToken(text, [(str(of), name, float(weight)) for of, name, weight in event["routes"] or []])
    if not ended:
        raise MoLoRAError("The server ended before its answer did. Ask again.")


def _refusal(reply: httpx.Response) -> str:
    """A refusal in the server's words."""
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{reply.url} answered {reply.status_code} {reply.reason_phrase}: is it `molora serve`?"


def _metrics(text: str) -> Mapping[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Prometheus' text by name and labels; those of several replicas are added."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for line in text.splitlines():
        if line.startswith("#") or " " not in line:
            continue
        head, _, value = line.rpartition(" ")
        name, _, rest = head.partition("{")
        pairs = (pair.split("=", 1) for pair in rest.rstrip("}").split(",") if "=" in pair)
        labels = tuple((label, told.strip('"')) for label, told in pairs if label not in ("replica", "le"))
        found[name, labels] = found.get((name, labels), 0.0) + float(value)
    return found
