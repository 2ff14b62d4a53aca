"""Adapters that are copied before they are needed: what arrives is what was sent, and no more waits than has room.

Where there is a GPU they go there, by the stream of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from molora.adapter import Adapter
from molora.ahead import Ahead
from molora.packed import Packed, pack
from tests.conftest import write_adapter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def sent(base: Any, tmp_path: Path) -> list[Packed]:
    """Three of one size, for kernels."""

    def place(name: str, shared: bool) -> tuple[torch.device, torch.dtype, bool]:
        return DEVICE, torch.float32, True

    folders = [write_adapter(base, tmp_path / f"u{number}", number) for number in range(3)]
    return [pack(Adapter.load(folder), place, lambda name, weights: weights, None) for folder in folders]


def assert_arrived(packed: Packed, copies: list[torch.Tensor]) -> None:
    right = pack(
        packed.adapter, lambda name, shared: (DEVICE, torch.float32, False), lambda name, weights: weights, None
    ).factors
    found = packed.brought(copies)
    assert found.keys() == right.keys() and found
    for name, pair in found.items():
        assert pair.A.device.type == DEVICE.type
        assert torch.equal(pair.A, right[name].A) and torch.equal(pair.B, right[name].B)


def test_each_is_copied_once_and_taken_once(sent: list[Packed], monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = Ahead()
    for packed in (*sent, *sent):
        ahead.start(packed)
    assert len(ahead) == 3
    monkeypatch.setattr(ahead, "_copy", None)  # all were made
    for number, packed in enumerate(sent):
        assert_arrived(packed, ahead.take(packed))
        assert len(ahead) == 2 - number
    for packed in sent:  # whether or not it was started
        assert_arrived(packed, ahead.take(packed))


def test_the_one_that_was_asked_for_first_makes_room(sent: list[Packed]) -> None:
    ahead = Ahead(2 * sent[0].flat_bytes)
    for packed in (sent[0], sent[1], sent[0], sent[2]):
        ahead.start(packed)
    assert list(ahead._copies) == [sent[0], sent[2]]
    for packed in sent:
        assert_arrived(packed, ahead.take(packed))
    small = Ahead(sent[0].flat_bytes - 1)
    small.start(sent[0])
    assert len(small) == 0


def test_a_device_without_room_is_no_error(sent: list[Packed], monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = Ahead()

    def fail(values: torch.Tensor, device: torch.device) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ahead, "_copy", fail)
    ahead.start(sent[0])
    assert len(ahead) == 0
    assert_arrived(sent[0], ahead.take(sent[0]))


def test_what_torch_multiplies_is_there_already(sent: list[Packed]) -> None:
    packed = pack(
        sent[0].adapter, lambda name, shared: (DEVICE, torch.float32, False), lambda name, weights: weights, None
    )
    ahead = Ahead()
    ahead.start(packed)
    assert len(ahead) == 0 and ahead.take(packed) == []
