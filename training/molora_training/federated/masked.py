"""A round whose updates the server never sees: Flower's SecAgg+ (IACR ePrint 2020/704) gives it their mean alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.common import FitIns, FitRes, Parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, ServerConfig
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid

from molora.errors import FederationError
from molora_training.federated import messages
from molora_training.federated.client import Order
from molora_training.federated.private import QUANTA
from molora_training.federated.rounds import Federation


@dataclass
class Sum:
    """mean: float32 [entries of B and of a row's moments]. clients: by node what each told of its cost."""

    mean: torch.Tensor
    clients: dict[int, dict[str, Any]]


def mean(grid: Grid, context: Context, federation: Federation, orders: Mapping[int, Order]) -> Sum:
    """Asks the nodes and gets the mean of what they changed.

    Raises:
        FederationError: too many of them were gone for the masks to be taken off; nothing is known then.
    """
    settings = federation.settings
    asking = _Asking(orders)
    own: Any = LegacyContext(context, config=ServerConfig(num_rounds=1), strategy=asking)
    own.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: federation.round + 1})
    own.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
    threshold = max(settings.limits.fewest, len(orders) // 2 + 1)  # fewer cannot take a mask off, whoever they obey
    workflow = SecAggPlusWorkflow(
        num_shares=1.0,
        reconstruction_threshold=threshold / max(1, len(orders)),
        max_weight=1.0,
        clipping_range=settings.privacy.clip,
        quantization_range=QUANTA,
        timeout=settings.limits.seconds,
    )
    workflow(grid, own)
    if asking.mean is None:
        raise FederationError(
            f"The masks of round {federation.round + 1} could not be taken off: of {len(orders)} clients fewer than "
            f"{threshold} stayed to the end."
        )
    return Sum(asking.mean, asking.clients)


class _Node(ClientProxy):
    """A client as SecAgg+ wants it."""

    def __init__(self, node_id: int) -> None:
        super().__init__(str(node_id))
        self.node_id = node_id

    def get_properties(self, *_: Any) -> Any:
        raise NotImplementedError

    get_parameters = fit = evaluate = reconnect = get_properties


@dataclass(repr=False)
class _Asking(FedAvg):
    """Hands out the orders, and takes the sum."""

    orders: Mapping[int, Order]
    mean: torch.Tensor | None = None
    clients: dict[int, dict[str, Any]] = field(default_factory=dict)

    def configure_fit(self, *_: Any, **__: Any) -> list[tuple[ClientProxy, FitIns]]:
        return [(_Node(node), messages.fit_of_order(order)) for node, order in self.orders.items()]

    def aggregate_fit(
        self, server_round: int, results: list[tuple[Any, FitRes]], failures: Any
    ) -> tuple[Parameters | None, dict[str, Any]]:
        for node, told in results:
            self.clients[node.node_id] = told.metrics
            (vector,) = parameters_to_ndarrays(told.parameters)  # of all of them the same: their mean
            self.mean = torch.from_numpy(vector).float()
        return None, {}
