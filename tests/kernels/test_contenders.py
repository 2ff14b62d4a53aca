"""What the benchmark times computes the same function, each contender against float64."""

import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import CONTENDERS, OPTIONAL, Problem, exact, make_problem
from benchmarks.kernels import check, limit_us, save
from benchmarks.results import read
from tests.conftest import DEVICE


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("popularity", ["uniform", "identical"])
@pytest.mark.parametrize("S", [1, 2])
def test_every_contender_is_the_exact_sum(name: str, popularity: str, S: int) -> None:
    problem = make_problem(9, 64, (48, 16), 4, S, 8, popularity, torch.float32, str(DEVICE))
    expected = exact(problem)
    assert (expected - problem.y).norm() > 0.1 * expected.norm()
    found = CONTENDERS[name](problem)()
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_prepared_contender_adds_at_each_call(name: str) -> None:
    problem = make_problem(5, 32, (16,), 3, 1, 16, "zipf", torch.float32, str(DEVICE))
    once = exact(problem) - problem.y.double()
    twice = problem.y.double() + 2 * once
    run = CONTENDERS[name](problem)
    run()
    assert (run() - twice).norm() <= 1e-5 * twice.norm()


def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels' interface, in plain torch."""

    class Meta:
        @classmethod
        def make(cls, max_loras: int, max_num_tokens: int, device: torch.device) -> "Meta":
            return cls()

        def prepare_tensors(self, mapping: torch.Tensor) -> None:
            self.mapping = mapping

        def meta_args(self, tokens: int, specialize: bool) -> tuple[torch.Tensor]:
            return (self.mapping[:tokens],)

    def shrink(x: torch.Tensor, A: list[torch.Tensor], h: torch.Tensor, mapping: torch.Tensor, scaling: float) -> None:
        h.copy_(torch.stack([torch.einsum("td,trd->tr", x, a[mapping.long()]) for a in A]) * scaling)

    def expand(
        h: torch.Tensor, B: list[torch.Tensor], y: torch.Tensor, mapping: torch.Tensor, offset_start: int,
        add_inputs: bool,
    ) -> None:  # fmt: skip
        assert offset_start == 0 and add_inputs
        y += torch.cat([torch.einsum("tr,tor->to", part, b[mapping.long()]) for part, b in zip(h, B, strict=True)], 1)

    for name in ("vllm", "vllm.lora", "vllm.lora.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("vllm.lora.ops.triton_ops")
    module.LoRAKernelMeta, module.lora_shrink, module.lora_expand = Meta, shrink, expand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_vllms_kernels_get_what_they_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and order of what the benchmark gives them; the kernels themselves are not here."""
    fake_vllm(monkeypatch)
    problem = make_problem(9, 64, (48, 16), 4, 2, 8, "uniform", torch.float32, str(DEVICE))
    expected = exact(problem)
    found = OPTIONAL["vllm"](problem)()
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_wrong_contender_is_not_timed() -> None:
    problem = make_problem(5, 32, (16,), 3, 1, 16, "uniform", torch.float32, str(DEVICE))
    before = problem.y.clone()

    def nothing(p: Problem):
        return lambda: p.y

    with pytest.raises(SystemExit, match="nothing is wrong"):
        check("nothing", problem, nothing)
    check("dense", problem, CONTENDERS["dense"])
    assert torch.equal(problem.y, before)


def test_the_limit_counts_the_adapters_that_act() -> None:
    same, spread = (
        limit_us(make_problem(8, 32, (16, 16), 4, 1, 16, popularity, torch.float32, str(DEVICE)))
        for popularity in ("identical", "uniform")
    )
    assert same < spread


def test_a_row_that_was_saved_is_read_as_it_was(tmp_path: Path) -> None:
    row = {"shape": "tiny", "adapters": 4, "popularity": "zipf", "base": 1.5, "dense": float("nan"), "device": "A GPU"}
    save(tmp_path / "kernels.csv", [row, row])
    found = read(tmp_path / "kernels.csv")
    assert found["device"] == "A GPU"
    plain = {"shape": "tiny", "adapters": 4, "popularity": "zipf", "base": 1.5, "dense": None}
    assert found["rows"] == [plain, plain]
