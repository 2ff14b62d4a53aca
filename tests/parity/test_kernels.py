"""The same equalities with the kernels in the model: on a CPU in Triton's interpreter. (On a GPU they always serve.)"""

from collections.abc import Iterator

import pytest
import torch

from tests.conftest import DEVICE
from tests.parity.test_equalities import (
    test_a_routed_forward_is_a_loop_over_peft_adapters,
    test_adapters_at_weights_are_peft_with_all,
    test_an_adapted_head_is_peft,
    test_every_config_is_peft,
    test_null_everywhere_is_the_base,
    test_one_forced_adapter_is_peft,
    test_two_forced_layers_are_peft_with_both,
)

__all__ = [
    "test_a_routed_forward_is_a_loop_over_peft_adapters",
    "test_adapters_at_weights_are_peft_with_all",
    "test_an_adapted_head_is_peft",
    "test_every_config_is_peft",
    "test_null_everywhere_is_the_base",
    "test_one_forced_adapter_is_peft",
    "test_two_forced_layers_are_peft_with_both",
]


@pytest.fixture
def ids(ids: torch.Tensor) -> torch.Tensor:
    """A few for the interpreter: the kernels take these one by one, as they do all of them."""
    return ids if DEVICE.type == "cuda" else ids[:, -6:]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels serve, and a test in which none ran fails."""
    from molora_kernels import paged

    calls = []
    monkeypatch.setattr("molora.adapted.backend_for", lambda _: "triton")
    monkeypatch.setattr("molora.memory.backend_for", lambda _: "triton")
    for name in ("expand_paged", "add_lora_paged"):
        whole = getattr(paged, name)
        monkeypatch.setattr(paged, name, lambda *a, whole=whole: calls.append(1) or whole(*a))
    yield
    assert calls
