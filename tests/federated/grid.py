"""Flower's grid without a network: messages go to the client's app at once, or to one that misbehaves."""

import copy
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

Twist = Callable[[Message], Message | None]
"""What becomes of a client's reply: another one, or none. It may raise, as a client does."""


class LocalGrid:
    """Nodes 1, 2, ... of one app; `partition-id` tells it who they are, from 0.

    twists: of some nodes, what becomes of each of their replies. late: seconds by which a node's replies come later.
    """

    def __init__(self, app: ClientApp, count: int) -> None:
        self.app, self.gone = app, set[int]()
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0  # of a server: its process has one
        self.twists: dict[int, Twist] = {}
        self.late: dict[int, float] = {}
        self.contexts = {
            node: Context(1, node, UserConfig({"partition-id": node - 1}), RecordDict(), UserConfig())
            for node in range(1, count + 1)
        }
        self.replies: dict[str, tuple[float, Message]] = {}
        self.sent: list[Message] = []

    def get_node_ids(self) -> list[int]:
        return [node for node in self.contexts if node not in self.gone]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            self.sent.append(message)
            node = message.metadata.dst_node_id
            if node in self.gone:
                continue
            try:
                reply = self.app(copy.deepcopy(message), self.contexts[node])  # as over a network
                twisted = self.twists[node](reply) if node in self.twists else reply
            except Exception as error:
                twisted = Message(Error(1, str(error)), reply_to=message)
            if twisted is not None:
                self.replies[message.metadata.message_id] = time.monotonic() + self.late.get(node, 0.0), twisted
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        now = time.monotonic()
        there = [one for one in message_ids if one in self.replies and self.replies[one][0] <= now]
        return [self.replies.pop(one)[1] for one in there]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        left, found = set(self.push_messages(messages)), list[Message]()
        end = time.monotonic() + (timeout or 0)
        while left and time.monotonic() < end:
            found += self.pull_messages(left)
            left -= {one.metadata.reply_to_message_id for one in found}
            time.sleep(0.01)
        return found

    def context(self) -> Any:
        return Context(1, 0, UserConfig(), RecordDict(), UserConfig())
