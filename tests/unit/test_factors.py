"""Generated factors: put together, cut to a rank and written, against torch's own products and PEFT."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from molora.adapter import Adapter
from molora.errors import NonFiniteError
from molora.factors import concatenated, cut, write_factors
from molora.personalize.generated import generated

NAME = "model.layers.{}.mlp.down_proj"


def some(seed: int, rank: int = 4, layers: tuple[int, ...] = (0, 1, 2)) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        NAME.format(layer): (
            torch.randn(rank, 48, generator=generator) / 7, torch.randn(32, rank, generator=generator) / 7,
        )
        for layer in layers
    }  # fmt: skip


def test_ranks_side_by_side_are_the_sum() -> None:
    parts = [some(0), some(1, 2), some(2, 3, (1,))]
    found = concatenated(parts)
    assert [len(A) for A, _ in found.values()] == [6, 9, 6]
    for name, (A, B) in found.items():
        wanted = sum(part[name][1] @ part[name][0] for part in parts if name in part)
        torch.testing.assert_close(B @ A, wanted)


def test_cut_is_the_nearest_of_its_rank() -> None:
    whole = concatenated([some(0), some(1)])
    for name, (A, B) in cut(whole, 3).items():
        delta = (whole[name][1] @ whole[name][0]).double()
        u, s, v = torch.linalg.svd(delta)
        assert (A.shape, B.shape) == ((3, 48), (32, 3))
        torch.testing.assert_close((B @ A).double(), (u[:, :3] * s[:3]) @ v[:3], rtol=1e-4, atol=1e-5)
    assert all(A is whole[name][0] for name, (A, _) in cut(whole, 8).items())  # no more than that: as it was


def test_what_is_written_is_an_adapter_for_peft(base: Any, tmp_path: Path) -> None:
    factors = concatenated([some(0), some(1, 2, (1,))])  # two ranks
    rounded = {n: (A.bfloat16().float(), B.bfloat16().float()) for n, (A, B) in factors.items()}
    write_factors(tmp_path / "made", factors, "some/base", {"made_from": "a test"})
    ids = torch.arange(3, 20).view(1, -1)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "made").eval()
        with generated(base, {name: (A[None], B[None]) for name, (A, B) in rounded.items()}):
            mine = base(ids).logits
        torch.testing.assert_close(mine, loaded(ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.equal(mine, base(ids).logits)
    assert Adapter.load(tmp_path / "made").ranks == [4, 6]
    assert json.loads((tmp_path / "made" / "generated.json").read_text()) == {"made_from": "a test"}
    assert json.loads((tmp_path / "made" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"


def test_each_sequence_has_its_own_factors(base: Any) -> None:
    one, other = some(0), some(1)
    ids = torch.arange(3, 43).view(2, -1)
    both = {
        name: (torch.stack([one[name][0], other[name][0]]), torch.stack([one[name][1], other[name][1]])) for name in one
    }
    with torch.no_grad():
        with generated(base, both):
            together = base(ids).logits
        for row, factors in enumerate((one, other)):
            with generated(base, {name: (A[None], B[None]) for name, (A, B) in factors.items()}):
                torch.testing.assert_close(together[row], base(ids[row : row + 1]).logits[0], rtol=1e-5, atol=1e-5)
        again = base(ids).logits
    assert not base.model.layers[0].mlp.down_proj._forward_hooks and not torch.equal(again, together)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    factors = some(0)
    factors[NAME.format(1)][0][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj"):
        write_factors(tmp_path / "made", factors, "some/base")
    assert not list(tmp_path.iterdir())
