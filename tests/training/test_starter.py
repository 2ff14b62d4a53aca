"""The recipe of a whole stack on a tiny base: rates are tuned where it says, data is put together, routers go on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from molora import MoLoRAModel
from molora.errors import ConfigError
from molora_training import starter
from molora_training.settings import from_mapping
from molora_training.starter import StarterLayer, StarterSettings
from tests.training.test_router_trainer import settings as router_settings  # noqa: F401 - a fixture

KILLED = """
import os, sys, time
from molora_training import starter

def work():
    print(os.getpid(), flush=True)
    time.sleep(60)
    return ""

if __name__ == "__main__":
    starter._parallel(2, work, [()])
"""


@pytest.fixture
def recipe(router_settings: object, tmp_path: Path) -> StarterSettings:  # noqa: F811
    """Two domains and an adapter on the data of both; one router, and one that goes on from it."""
    values = {
        "base": str(tmp_path / "base"), "out": str(tmp_path / "stack"), "work": str(tmp_path / "work"),
        "data": str(tmp_path / "data"), "batch_tokens": 512, "router_mixed": 8, "router_documents": 8,
        "router_in_a_turn": 8, "router_epochs": 1,
        "sources": {name: ["made here", "CC0-1.0"] for name in ("math", "code", "both")},
        "layers": [
            {"name": "domain", "adapters": ["math", "code"], "rank": 2, "learning_rates": [1e-3, 1e-2],
             "tuned_on": ["math"], "epochs": 1, "max_steps": 2},
            {"name": "together", "adapters": ["both"], "rank": 4, "learning_rates": [1e-3], "epochs": 1, "max_steps": 2,
             "default": None, "learns": ["math", "code"]},
        ],
        "routers": {
            "later": {"start": "first", "epochs": 1, "loss": {"lm": 1.0, "label": 0.0}},
            "first": {"router": {"width": 8, "hidden": 16}},
            "fewer": {"router": {"width": 8, "hidden": 16}, "without": ["code"]},
            "one": {"router": {"width": 8, "hidden": 16}, "first": 1},
        },
    }  # fmt: skip
    return from_mapping(StarterSettings, values)


def test_a_recipe_makes_its_stack_and_goes_on_where_it_was(recipe: StarterSettings, tmp_path: Path) -> None:
    starter.train(recipe)
    adapters = {path.name for path in (tmp_path / "work" / "adapters").iterdir()}
    losses = {rate: _validation_loss(tmp_path, f"math-{rate}") for rate in ("0.001", "0.01")}
    best = min(losses, key=losses.__getitem__)
    assert adapters == {"math-0.001", "math-0.01", f"code-{best}", "both-0.001"}  # the other one at the tuned rate
    together = (tmp_path / "work" / "data" / "both.train.jsonl").read_text().splitlines()
    assert {json.loads(line)["domain"] for line in together} == {"math", "code"} and len(together) == 24
    model = MoLoRAModel.from_pretrained(tmp_path / "stack", base=recipe.base, dtype=torch.float32)
    routers = tmp_path / "work" / "routers"
    own, first, later = (
        MoLoRAModel.from_pretrained(folder, base=recipe.base, dtype=torch.float32).router.state_dict()
        for folder in (tmp_path / "stack", routers / "first", routers / "later")
    )
    name = "parts.0.output.weight"
    assert torch.equal(own[name], later[name]) and not torch.equal(first[name], later[name])
    assert model.stack["together"].default is None and list(model.stack["together"].adapters) == ["both"]
    fewer = MoLoRAModel.from_pretrained(routers / "fewer", base=recipe.base, dtype=torch.float32)
    assert list(fewer.stack["domain"].adapters) == ["math"] and "domain/code" not in fewer.router.rows
    one = MoLoRAModel.from_pretrained(routers / "one", base=recipe.base, dtype=torch.float32)
    assert one.stack.names == ["domain/math", "together/both"]
    network = tmp_path / "stack" / "hypernets" / "profile" / "hypernet.json"
    network.parent.mkdir(parents=True)
    network.write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    starter.train(recipe)
    made, metrics = tmp_path / "stack" / "router.metrics.json", routers / "later" / "router.metrics.json"
    assert network.read_text() == "{}" and made.read_bytes() == metrics.read_bytes()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    lost = [tmp_path / "work/adapters/both-0.001/adapter_model.safetensors", routers / "fewer/router.safetensors"]
    for file in lost:
        file.unlink()
    starter.train(recipe)  # what was lost is trained again, though its metrics are there
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert before.keys() == after.keys() and all(after[file] > before[file] for file in lost)


def test_an_integration_adapter_is_trained_on_the_first_router_and_always_acts(
    recipe: StarterSettings, tmp_path: Path
) -> None:
    how = {"rank": 2, "learning_rate": 1e-2, "epochs": 3}
    starter.train(dataclasses.replace(recipe, own="first"))  # a stack is there already, with another router
    starter.train(dataclasses.replace(recipe, integration=how))
    work = tmp_path / "work"
    texts = [json.loads(line) for line in (work / "data" / "integration.train.jsonl").read_text().splitlines()]
    assert len(texts) == 24 and all(len(text["domains"]) > 1 for text in texts)
    model = MoLoRAModel.from_pretrained(tmp_path / "stack", base=recipe.base, dtype=torch.float32)
    first = MoLoRAModel.from_pretrained(work / "routers" / "later", base=recipe.base, dtype=torch.float32)
    assert model.stack["integration"].default == "integration" and "integration" not in first.stack
    rows = len(first.router.rows)
    for own, theirs in zip(model.router.parts, first.router.parts, strict=True):
        assert torch.equal(own.output.weight[:rows], theirs.output.weight)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        off = model(ids, selection={"integration": None}).logits
        assert torch.equal(off, first(ids).logits) and not torch.allclose(model(ids).logits, off, rtol=1e-3)


def test_the_stack_takes_the_router_that_is_named(recipe: StarterSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="own is 'none of them', which is none of the routers later, first"):
        starter.train(dataclasses.replace(recipe, own="none of them"))
    assert not (tmp_path / "work").exists()
    starter.train(dataclasses.replace(recipe, own="first"))
    stack, first = (tmp_path / path / "router.safetensors" for path in ("stack", "work/routers/first"))
    assert stack.read_bytes() == first.read_bytes()


def test_workers_end_with_a_recipe_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "recipe.py"
    script.write_text(KILLED)
    recipe = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert recipe.stdout is not None
    worker = int(recipe.stdout.readline())
    recipe.kill()
    recipe.wait()
    for _ in range(200):
        if not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on")


def test_some_adapters_take_more_or_less(recipe: StarterSettings) -> None:
    own = {"epochs_of": {"code": 4}, "start_dropout": 3, "start_dropout_of": {"math": 9}}
    layer = from_mapping(StarterLayer, {**recipe.layers[0], **own}, "")
    found = {name: starter._adapter_settings(recipe, layer, name, 1e-3) for name in layer.adapters}
    assert {name: one.epochs for name, one in found.items()} == {"math": 1, "code": 4}
    assert {name: one.lora.start_dropout for name, one in found.items()} == {"math": 9, "code": 3}


def _validation_loss(folder: Path, adapter: str) -> float:
    return float(json.loads((folder / "work" / "adapters" / adapter / "metrics.json").read_text())["validation_loss"])


@pytest.mark.parametrize(
    ("gpus", "worker", "own"), [(2, 1, "7"), (2, 2, "4"), (2, 3, "7"), (1, 1, "4,7"), (0, 1, "4,7")]
)
def test_workers_take_the_gpus_in_turn(gpus: int, worker: int, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(starter.multiprocessing, "current_process", lambda: SimpleNamespace(_identity=(worker,)))
    starter._settle(gpus)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def _fits_where_it_has_been(folder: Path, name: str) -> str:
    """A training for which there is no room the first time."""
    tries = len(list(folder.glob(f"{name}-*")))
    (folder / f"{name}-{tries}").touch()
    if name == "nowhere" or (name.startswith("large") and tries == 0):
        if name == "large-2":  # what the library of products says
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return f"{name} after {tries}"


def test_what_a_gpu_had_no_room_for_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starter._parallel(2, _fits_where_it_has_been, [(tmp_path, name) for name in ("large-1", "small", "large-2")])
    assert capsys.readouterr().out.splitlines() == [
        "small after 0",
        "2 did not fit into the GPU beside the others: again, 1 at once.",
        "large-1 after 1",
        "large-2 after 1",
    ]
    with pytest.raises(torch.OutOfMemoryError):  # one that fits nowhere is an error in the end
        starter._parallel(1, _fits_where_it_has_been, [(tmp_path, "nowhere")])
