"""Orders and answers as Flower's records: safetensors bytes, and Flower's own arrays where sums are masked."""

from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters
from flwr.compat.common import recorddict_compat as compat

from molora_training.federated.client import Order

ORDER, ANSWER, ABOUT = "order", "answer", "about"


def of_order(order: Order) -> RecordDict:
    """An order that is answered in the open."""
    return RecordDict({ORDER: ConfigRecord({"factors": order.factors, "below": order.below, "reader": order.reader})})


def to_order(content: RecordDict) -> Order:
    """What :func:`of_order` or :func:`fit_of_order` made."""
    if ORDER in content.config_records:
        record: Any = content.config_records[ORDER]
        return Order(bytes(record["factors"]), bytes(record["below"]), bytes(record["reader"]))
    factors, reader = compat.recorddict_to_fitins(content, keep_input=True).parameters.tensors
    return Order(factors, reader=reader)


def of_answer(update: bytes) -> RecordDict:
    """A client's update."""
    return RecordDict({ANSWER: ConfigRecord({"update": update})})


def to_answer(content: RecordDict) -> bytes:
    """The update, or what cannot be one."""
    record: Any = content.config_records.get(ANSWER, {})
    update = record.get("update", b"")
    return update if isinstance(update, bytes) else b""


def of_figures(figures: dict[str, Any]) -> RecordDict:
    """Names and numbers that a client tells of itself."""
    return RecordDict({ABOUT: ConfigRecord(figures)})


def to_figures(content: RecordDict) -> dict[str, Any]:
    """What :func:`of_figures` made; nothing if it is something else."""
    return dict(content.config_records.get(ABOUT, {}))


def fit_of_order(order: Order) -> FitIns:
    """An order that is answered by a masked sum: SecAgg+ knows Flower's older form alone."""
    return FitIns(Parameters([order.factors, order.reader], "safetensors"), {})


def fit_of_vector(vector: torch.Tensor, figures: dict[str, Any]) -> RecordDict:
    """What is to be masked: float64 [entries of B and of a row's moments]. Each client weighs the same."""
    parameters = ndarrays_to_parameters([vector.double().numpy()])
    return compat.fitres_to_recorddict(FitRes(Status(Code.OK, ""), parameters, 1, figures), keep_input=True)
