"""The server's side in Flower: who is asked, and when a round ends (:mod:`molora_training.federated.rounds`)."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.app.message_type import MessageType
from flwr.serverapp import Grid

from molora.errors import FederationError
from molora_training.federated import masked, messages
from molora_training.federated.rounds import TRIES, Federation, RoundReport

POLL = 0.2  # seconds
Watch = Callable[[str, Mapping[str, Any]], None]
"""Told of what happens: "clients", "round", "answer", "closed", "again", "trial", each with its figures."""


@dataclass
class Fleet:
    """The clients that are there, by the names that they give themselves.

    nodes: Flower's id of each. ranks: what each can afford. silent: nodes that did not say in time who they are, and
    are not waited for again; one that is started anew has another id.
    """

    grid: Grid
    seconds: float
    watch: Watch
    nodes: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    named: dict[int, str] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)

    def look(self) -> list[str]:
        """Those that are there now; new ones are asked who they are."""
        there = set(self.grid.get_node_ids())
        new = there - self.named.keys() - self.silent
        self.silent |= new
        for node, content in self.ask({node: RecordDict() for node in sorted(new)}, MessageType.QUERY):
            self.silent.discard(node)
            told = messages.to_figures(content)
            name, rank = str(told.get("name", ""))[:64], told.get("rank", 1)
            taken = self.nodes.get(name)
            if not name or (taken is not None and taken in there):
                self.watch("refused", {"client": name, "why": "another client has its name"})
                continue
            self.nodes[name], self.ranks[name], self.named[node] = node, rank if isinstance(rank, int) else 1, name
        return sorted(name for name, node in self.nodes.items() if node in there)

    def ask(self, contents: Mapping[int, RecordDict], kind: str) -> Iterable[tuple[int, RecordDict]]:
        """Sends to each node its message, and gives answers as they come, until the time is over."""
        sent = [Message(content, node, kind, ttl=self.seconds) for node, content in contents.items()]
        left, end = set(self.grid.push_messages(sent)), time.monotonic() + self.seconds
        while left and time.monotonic() < end:
            for message in self.grid.pull_messages(left):
                left.discard(message.metadata.reply_to_message_id)
                if message.has_error():
                    name = self.named.get(message.metadata.src_node_id, "")
                    self.watch("failed", {"client": name, "why": message.error.reason})
                else:
                    yield message.metadata.src_node_id, message.content
            time.sleep(POLL)


def serve(grid: Grid, context: Context, federation: Federation, watch: Watch) -> dict[str, Any]:
    """All rounds that are left.

    Returns:
        The clients' losses before and after, by client; empty where they are not to be asked for.

    Raises:
        FederationError: too few clients come, or a round had too few updates three times.
    """
    settings = federation.settings
    fleet = Fleet(grid, settings.limits.seconds, watch)
    _wait(fleet, settings.limits.fewest)
    before = federation.begun_with(lambda: _trial(fleet, federation, "before"))
    while not federation.over:
        _round(fleet, context, federation)
    return {"before": before, "after": _trial(fleet, federation, "after")}


def _wait(fleet: Fleet, fewest: int) -> None:
    end = time.monotonic() + fleet.seconds
    while len(there := fleet.look()) < fewest:
        if time.monotonic() > end:
            raise FederationError(
                f"{len(there)} clients came within {fleet.seconds:g} seconds, and limits.fewest asks for {fewest}: "
                f"start more SuperNodes, or give them more time by limits.seconds."
            )
        time.sleep(POLL)
    fleet.watch("clients", {"clients": there})


def _round(fleet: Fleet, context: Context, federation: Federation) -> RoundReport:
    for attempt in range(1, TRIES + 1):
        clients = federation.cohort(fleet.look())
        fleet.watch("round", {"round": federation.round + 1, "clients": clients})
        began = time.monotonic()
        try:
            report = _closed(fleet, context, federation, clients, began)
            fleet.watch("closed", vars(report))
            return report
        except FederationError as error:
            if attempt == TRIES:
                raise
            fleet.watch("again", {"why": str(error)})
    raise AssertionError


def _closed(fleet: Fleet, context: Context, federation: Federation, clients: list[str], began: float) -> RoundReport:
    orders = {client: federation.order(client, fleet.ranks[client]) for client in clients}
    if federation.settings.privacy.secure:
        found = masked.mean(fleet.grid, context, federation, {fleet.nodes[c]: order for c, order in orders.items()})
        rows = {fleet.named[node]: row for node, row in found.clients.items()}
        return federation.close_sum(found.mean, rows, time.monotonic() - began)
    answers = {}
    contents = {fleet.nodes[client]: messages.of_order(order) for client, order in orders.items()}
    for node, content in fleet.ask(contents, MessageType.TRAIN):
        answers[fleet.named[node]] = messages.to_answer(content)
        fleet.watch("answer", {"client": fleet.named[node], "answers": len(answers), "asked": len(clients)})
    return federation.close(answers, time.monotonic() - began)


def _trial(fleet: Fleet, federation: Federation, when: str) -> dict[str, dict[str, float]]:
    """What clients lose on what they hold out, which is asked of them only where their updates are seen too."""
    if federation.settings.privacy.sums_only:
        return {}
    order = messages.of_order(federation.trial())
    found: dict[str, dict[str, float]] = {}
    for node, content in fleet.ask({fleet.nodes[client]: order for client in fleet.look()}, MessageType.EVALUATE):
        figures = messages.to_figures(content)
        told: dict[str, Any] = {name: figures.get(name) for name in ("loss", "tokens", "conversations")}
        if all(isinstance(one, int | float) and 0 <= one < math.inf for one in told.values()):
            found[fleet.named[node]] = {name: float(one) for name, one in told.items()}
    tokens = sum(one["tokens"] for one in found.values())
    fleet.watch("trial", {"when": when, "loss": sum(one["loss"] for one in found.values()) / max(1.0, tokens)})
    return found
