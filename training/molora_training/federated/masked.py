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
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from flwr.serverapp import Grid

from molora.errors import FederationError
from molora_training.federated import messages
from molora_training.federated.client import Order
from molora_training.federated.private import QUANTA
from molora_training.federated.rounds import Federation

_MODULUS = 2**32  # of masks and their sum
_MOST = _MODULUS // QUANTA - 1  # clients of which a sum does not wrap around


@dataclass
class Sum:
    """mean: float32 [entries of B and of a row's moments]. clients: by node what each told of its cost."""

    mean: torch.Tensor
    clients: dict[int, dict[str, Any]]


def mean(grid: Grid, context: Context, federation: Federation, orders: Mapping[int, Order]) -> Sum:
    """Asks the nodes and gets the mean of what they changed.

    Raises:
        FederationError: too few or too many are asked, too many of them were gone for the masks to be taken off, or one
            sent what is no part of the protocol; nothing is known then.
    """
    settings, number, count = federation.settings, federation.round + 1, len(orders)
    # Fewer cannot take a mask off, whoever they obey.
    threshold = max(2, settings.limits.fewest, count // 2 + 1)
    if not threshold <= count <= _MOST:
        raise FederationError(
            f"Round {number} asks {count} clients for a masked sum, which is of {threshold} to {_MOST}: change "
            f"limits.fewest or privacy.cohorts, or start more clients."
        )
    asking = _Asking(orders)
    own: Any = LegacyContext(context, config=ServerConfig(num_rounds=1), strategy=asking)
    own.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: number})
    own.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
    workflow = _Workflow(
        num_shares=1.0,
        reconstruction_threshold=threshold,
        max_weight=1.0,
        clipping_range=settings.privacy.clip,
        quantization_range=QUANTA,
        modulus_range=_MODULUS,
        timeout=settings.limits.seconds,
    )
    try:
        workflow(grid, own)
    except Exception as error:  # Flower takes what clients send for what it should be
        raise FederationError(f"The masked sum of round {number} failed: {error!r}.") from error
    if asking.mean is None:
        raise FederationError(
            f"The masks of round {number} could not be taken off: of {count} clients fewer than {threshold} stayed to "
            f"the end."
        )
    return Sum(asking.mean, asking.clients)


class _Workflow(SecAggPlusWorkflow):
    """One that does not miss who left before the keys were shared out: no mask is of theirs, and the others, whom
    Flower would ask for shares of their keys, have none."""

    def setup_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        return super().setup_stage(grid, context, state) and _forget_others(state)

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        return super().share_keys_stage(grid, context, state) and _forget_others(state)


def _forget_others(state: WorkflowState) -> bool:
    state.sampled_node_ids = set(state.active_node_ids)
    state.nid_to_neighbours = {
        node: state.nid_to_neighbours[node] & state.active_node_ids for node in state.active_node_ids
    }
    return True


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
