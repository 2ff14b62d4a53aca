"""What was made ready before is the adapter: put in, taken out, and put in again, by torch and by kernels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from molora import MoLoRAModel, Stack, StackLayer
from molora.adapter import Adapter
from molora.errors import AdapterMismatchError
from tests.conftest import SMALL, write_adapter
from tests.parity.test_equalities import make_routed

IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(params=["torch", "triton"])
def model(request: Any, base: Any, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> MoLoRAModel:
    monkeypatch.setattr("molora.adapted.backend_for", lambda _: request.param)
    return make_routed(base, adapters)


@torch.no_grad()
def logits(model: MoLoRAModel, name: str, tokens: int = 10) -> torch.Tensor:
    found = model(IDS[:, :tokens].to(model.device), selection={"user": name}).logits
    assert found is not None
    return found


def test_what_was_packed_acts_as_what_is_read(model: MoLoRAModel, base: Any, tmp_path: Path) -> None:
    folders = [write_adapter(base, tmp_path / f"u{rank}", rank) for rank in (3, 16, 40)]  # of one page, and of more
    for number, folder in enumerate(folders):
        model.add_adapter("user", f"read{number}", folder)
    expected = [logits(model, f"read{number}", 4) for number in range(3)]
    assert not any(torch.equal(one, expected[0]) for one in expected[1:])
    for number in range(3):
        model.remove_adapter("user", f"read{number}")
    packed = [model.adapted.pack(Adapter.load(folder)) for folder in folders]
    for number, one in enumerate(packed):  # into slots that were used before
        model.add_adapter("user", f"packed{number}", one)
    for number, one in enumerate(packed):
        assert torch.equal(logits(model, f"packed{number}", 4), expected[number])
        assert model.stack["user"].adapters[f"packed{number}"] == folders[number] == one.adapter.path
    for number in range(3):
        model.remove_adapter("user", f"packed{number}")
    model.add_adapter("user", "again", packed[1])
    assert torch.equal(logits(model, "again", 4), expected[1])


def test_a_model_that_moved_takes_what_was_packed_before(model: MoLoRAModel, base: Any, tmp_path: Path) -> None:
    folder = write_adapter(base, tmp_path / "u", 5)
    packed = model.adapted.pack(Adapter.load(folder))
    model.to(torch.float64)
    model.add_adapter("user", "packed", packed)
    model.add_adapter("user", "read", folder)
    torch.testing.assert_close(logits(model, "packed"), logits(model, "read"), rtol=1e-6, atol=1e-7)


def test_what_was_packed_for_another_model_is_made_ready_anew(
    model: MoLoRAModel, base: Any, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_adapter(base, tmp_path / "u", 5)
    packed = model.adapted.pack(Adapter.load(folder))
    other = make_routed(base, adapters)
    other.add_adapter("user", "packed", packed)
    other.add_adapter("user", "read", folder)
    assert torch.equal(logits(other, "packed"), logits(other, "read"))
    config = LlamaConfig(**{**SMALL, "hidden_size": 48})
    wide = MoLoRAModel.from_base(LlamaForCausalLM(config), Stack([StackLayer("user", {})]))
    with pytest.raises(AdapterMismatchError):
        wide.add_adapter("user", "packed", packed)
    assert not wide.stack["user"].adapters
