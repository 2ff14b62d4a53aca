"""A Flower ClientApp around :class:`~molora_training.federated.client.Client`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.app.message_type import MessageType
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS

from molora.base import DEFAULT_BASE
from molora.errors import ConfigError, FederationError
from molora_training.federated import messages, row
from molora_training.federated.changes import b_vector
from molora_training.federated.client import Base, Client, read_order

Answer = Callable[[Message, Context], Message]


@dataclass(frozen=True)
class Who:
    """A client as its own host describes it.

    Args:
        name: for the report; no two clients have the same.
        data: its conversations.
        rank: that it can afford.
        base: folder or Hub id of the base here.
        secure: it answers masked, or not at all, and tells no losses.
    """

    name: str
    data: str
    rank: int = 8
    base: str = DEFAULT_BASE
    secure: bool = False


def of_node(context: Context) -> Who:
    """By `--node-config` of a SuperNode: data, and what else of :class:`Who` differs from its defaults.

    Raises:
        ConfigError: it names no data, or what is no setting.
    """
    given: dict[str, Any] = {key: value for key, value in context.node_config.items() if "partition" not in key}
    unknown = given.keys() - Who.__annotations__.keys()
    if unknown or "data" not in given:
        raise ConfigError(
            f"A client's --node-config needs data and may have {', '.join(Who.__annotations__)}, not "
            f"{', '.join(sorted(unknown)) or 'nothing'}."
        )
    return Who(**{"name": Path(str(given["data"])).stem, **given})


def client_app(find: Callable[[Context], Who]) -> ClientApp:
    """The app of clients that ``find`` describes by their context."""

    def masked(message: Message, context: Context, answer: Answer) -> Message:
        # Of another type, such as "train.default", SecAgg+ lets a message through, and the answer is not masked.
        if message.metadata.message_type == MessageType.TRAIN and RECORD_KEY_CONFIGS in message.content.config_records:
            return secaggplus_mod(message, context, answer)
        return in_the_open(message, context, answer)

    def in_the_open(message: Message, context: Context, answer: Answer) -> Message:
        if find(context).secure:
            raise FederationError(f"{find(context).name} answers masked only, and was asked without SecAgg+.")
        return answer(message, context)

    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        who = find(context)
        return Message(messages.of_figures({"name": who.name, "rank": who.rank}), reply_to=message)

    @app.train(mods=[masked])
    def train(message: Message, context: Context) -> Message:
        order = messages.to_order(message.content)
        learnt = _client(find(context)).train(order)
        if messages.ORDER in message.content.config_records:
            return Message(messages.of_answer(learnt.to_bytes()), reply_to=message)
        before, _, about = read_order(order)
        vector = b_vector(before, learnt.lora, about["rank"])
        if learnt.moments is not None:
            vector = torch.cat([vector, row.to_vector(learnt.moments, about["clip"])])
        return Message(messages.fit_of_vector(vector, asdict(learnt.usage)), reply_to=message)

    @app.evaluate(mods=[in_the_open])
    def evaluate(message: Message, context: Context) -> Message:
        found = _client(find(context)).evaluate(messages.to_order(message.content))
        return Message(messages.of_figures(found), reply_to=message)

    return app


@lru_cache(maxsize=1)
def _base(name: str) -> Base:
    return Base.load(name)


@lru_cache(maxsize=64)
def _client(who: Who) -> Client:
    """Kept for the next round of the same process."""
    return Client.of_file(who.name, _base(who.base), Path(who.data))
