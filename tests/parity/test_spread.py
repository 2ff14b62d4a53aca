"""A base on several devices gives what it gives on one: whole modules apart, and each module shared by processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from molora import MoLoRAModel
from molora.plan import RoutingPlan
from molora.spread import device_of
from tests.parity.spread_forward import ask, change, few
from tests.unit.spoken import make_spoken, save_spoken

ASKED: list[Any] = [
    {"domain": "auto"},
    {"domain": "code"},
    {"domain": None},
    [{"domain": "code"}, {"domain": None}, {"domain": "auto"}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spread")
    save_spoken(make_spoken(path, reads=(0, 1)), path)
    (path / "asked.json").write_text(json.dumps(ASKED))
    return path


def load(folder: Path, **how: Any) -> MoLoRAModel:
    return MoLoRAModel.from_pretrained(folder / "model", dtype=torch.float32, **how)


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.endswith("logits"):
            assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
        else:
            assert torch.equal(found[name], tensor), name


def test_processes_that_share_each_module_give_what_one_gives(folder: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    told = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [*start, "-m", "tests.parity.spread_forward", str(folder)],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    model = load(folder)
    wanted = {f"before/{name}": tensor for name, tensor in ask(model, folder).items()}
    A = model.adapted._modules["model.layers.0.mlp.down_proj"].factors[model.slots["domain/code"]].A
    wanted["kernels/logits"] = few(model)
    change(model, folder)
    wanted |= {f"after/{name}": tensor for name, tensor in ask(model, folder).items()}
    for rank in range(2):
        found = load_file(folder / f"found-{rank}.safetensors")
        part = found.pop("down/A")
        assert_equal(found, wanted)
        assert torch.equal(part, A.chunk(2, 1)[rank])  # each has the columns that its inputs need, and no others
        errors = json.loads((folder / f"errors-{rank}.json").read_text())
        assert errors["trained"].startswith("BaseModelError: A base that is spread by tensor parallelism serves")
        assert "shares its module model.layers.0.mlp.gate_proj among processes as 'packed_colwise'" in errors["plan"]


def test_weights_that_wait_on_the_disk(folder: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=places, offload_folder=tmp_path, dtype=torch.float32
    )
    model = MoLoRAModel.from_pretrained(folder / "model", base=base)
    away = model.base.get_submodule("model.layers.1.mlp.down_proj.base_layer")
    assert away.weight.device.type == "meta" and device_of(away) == torch.device("cpu")
    with torch.no_grad():
        assert_equal(ask(model, folder), ask(load(folder), folder))


def test_a_plan_is_sent_to_a_device_once() -> None:
    plan = RoutingPlan(torch.zeros(2, 3, 1, dtype=torch.int64), torch.ones(2, 3, 1), unit=True)
    away = plan.on(torch.device("meta"))
    assert plan.on(torch.device("cpu")) is plan and plan.on(torch.device("meta")) is away
    assert (away.chosen.device.type, away.weights.device.type, away.unit, away.shape) == (
        "meta",
        "meta",
        True,
        plan.shape,
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_gpus(folder: Path) -> None:
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1,
              "model.layers.2": 1, "model.norm": 1, "lm_head": 1}  # fmt: skip
    model, whole = load(folder, device_map=places), load(folder).to("cuda:0")
    ids = torch.randint(5, 261, (3, 60), generator=torch.Generator().manual_seed(0)).to("cuda:0")
    with torch.no_grad():
        for selection in ASKED:
            found, wanted = (one(ids, selection=selection).logits for one in (model, whole))
            assert (found.to(wanted.device) - wanted).norm() <= 1e-5 * wanted.norm()
            written = (
                one.generate(ids[:, :8], selection=selection, max_new_tokens=6, do_sample=False)
                for one in (model, whole)
            )
            assert torch.equal(*written)
