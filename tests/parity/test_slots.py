"""More adapters than a group of modules has seen: a slot that it does not know adds nothing there."""

import copy
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel, Stack, StackLayer
from tests.conftest import write_adapter
from tests.parity.test_equalities import close


@torch.no_grad()
def test_an_adapter_of_other_modules_in_a_late_slot(base: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """Where gate and up know 16 slots, the 18th of gate must not be read as the second of up."""
    kinds = {f"a{number}": ["up_proj"] if number == 1 else ["q_proj"] for number in range(18)}
    paths = {
        name: write_adapter(base, tmp_path / name, number, r=1, target_modules=targets)
        for number, (name, targets) in enumerate(kinds.items())
    }
    stack = Stack([StackLayer("domain", paths, default=None)])
    found, wanted = (
        MoLoRAModel.from_base(copy.deepcopy(base), stack, backend=backend)(
            ids[:, :3], selection=[{"domain": name} for name in ("a17", "a1", "a16")]
        ).logits
        for backend in ("triton", "torch")
    )
    close(found, wanted)
