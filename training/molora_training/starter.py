"""Train the starter stack from nothing: personas' data, every adapter, every router of the results table.

Each step is skipped when its result is there, so an interrupted run goes on where it was.
"""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from molora import Stack, StackLayer
from molora_training import adapter, personas, router
from molora_training.adapter_settings import AdapterTrainSettings, DataFiles, LoraShape
from molora_training.data import data_dir
from molora_training.router_settings import LossWeights, RouterShape, RouterTrainSettings

CONFIG = Path(__file__).parent / "configs" / "starter.yaml"
COMMAND = "molora train starter"


@dataclass(frozen=True)
class StarterLayer:
    """One layer and how its adapters are trained; of several learning rates the best on validation is kept."""

    name: str
    adapters: tuple[str, ...]
    rank: int
    learning_rates: tuple[float, ...]
    epochs: int
    checkpoint_every: int = 40
    max_steps: int | None = None
    default: str | None = "auto"
    shared: bool = False


@dataclass(frozen=True)
class StarterSettings:
    """The whole stack."""

    base: str
    layers: tuple[Any, ...]
    routers: dict[str, Any]
    sources: dict[str, Any]
    out: Path = Path("starter")
    work: Path = Path("runs/starter")
    data: Path = field(default_factory=data_dir)
    processes: int = 1  # trainings at once
    batch_tokens: int = 8192
    router_mixed: int = 6000
    router_epochs: int = 4
    router_processes: int = 1
    seed: int = 0


def train(settings: StarterSettings) -> None:
    """Makes ``settings.out`` (with the first router) and ``settings.work/routers/<variant>`` for the others."""
    from molora_training.settings import from_mapping

    layers = [from_mapping(StarterLayer, layer, "layers.") for layer in settings.layers]
    wanted = [name for layer in layers for name in layer.adapters]
    missing = [n for n in personas.read_personas() if not (settings.data / f"{n}.train.jsonl").is_file()]
    if missing:
        _parallel(2, _prepare_personas, [(settings, missing)])  # in a process of its own, which gives its memory back
    runs = [
        (_adapter_settings(settings, layer, name, rate),)
        for layer in sorted(layers, key=lambda layer: -layer.rank)  # the longest first
        for name in layer.adapters
        for rate in layer.learning_rates
    ]
    _parallel(settings.processes, _train_adapter, [run for run in runs if not (run[0].out / "metrics.json").is_file()])
    stack = Stack(
        [
            StackLayer(
                layer.name,
                {name: _keep_best(settings, layer, name) for name in layer.adapters},
                default=layer.default,
                shared=layer.shared,
            )
            for layer in layers
        ]
    )
    assert len(wanted) == len(stack.names)
    settings.work.mkdir(parents=True, exist_ok=True)
    stack.save(settings.work / "stack.yaml")
    routers = {name: _router_settings(settings, name, shape) for name, shape in settings.routers.items()}
    todo = [(run,) for run in routers.values() if not (run.out / "router.metrics.json").is_file()]
    _parallel(settings.router_processes, _train_router, todo)
    shutil.rmtree(settings.out, ignore_errors=True)
    shutil.copytree(next(iter(routers.values())).out, settings.out)


def _adapter_settings(settings: StarterSettings, layer: StarterLayer, name: str, rate: float) -> AdapterTrainSettings:
    source, licence = settings.sources[name]
    return AdapterTrainSettings(
        out=settings.work / "adapters" / f"{name}-{rate:g}",
        data=DataFiles(
            settings.data / f"{name}.train.jsonl", settings.data / f"{name}.validation.jsonl", 1024, source, licence
        ),
        lora=LoraShape(rank=layer.rank, alpha=2.0 * layer.rank),
        base=settings.base,
        learning_rate=rate,
        epochs=layer.epochs,
        batch_tokens=settings.batch_tokens,
        checkpoint_every=layer.checkpoint_every,
        max_steps=layer.max_steps,
        seed=settings.seed,
    )


def _router_settings(settings: StarterSettings, name: str, shape: dict[str, Any]) -> RouterTrainSettings:
    from molora_training.settings import from_mapping

    return RouterTrainSettings(
        model=settings.work / "stack.yaml",
        out=settings.work / "routers" / name,
        data=settings.data,
        base=settings.base,
        router=from_mapping(RouterShape, shape, f"routers.{name}."),
        loss=LossWeights(),
        epochs=settings.router_epochs,
        mixed=settings.router_mixed,
        seed=settings.seed,
    )


def _keep_best(settings: StarterSettings, layer: StarterLayer, name: str) -> str:
    """The folder of the learning rate with the lowest validation loss."""
    folders = [settings.work / "adapters" / f"{name}-{rate:g}" for rate in layer.learning_rates]
    best = min(folders, key=lambda f: json.loads((f / "metrics.json").read_text(encoding="utf-8"))["validation_loss"])
    return str(best.resolve())


def _prepare_personas(settings: StarterSettings, names: list[str]) -> str:
    return f"personas: {personas.prepare(settings.data, names, settings.base, seed=settings.seed)}"


def _train_adapter(settings: AdapterTrainSettings) -> str:
    metrics = adapter.train(settings, command=COMMAND)
    return (
        f"{settings.out.name}: validation loss {metrics['base_validation_loss']:.3f} -> "
        f"{metrics['validation_loss']:.3f} in {metrics['seconds']} s"
    )


def _train_router(settings: RouterTrainSettings) -> str:
    metrics = router.train(settings, command=COMMAND)
    shown = ", ".join(f"{k} {v:.3f}" for k, v in metrics["validation"].items() if k.startswith("right/"))
    return f"router {settings.out.name}: {shown} in {metrics['seconds']} s"


def _parallel(processes: int, function: Callable[..., str], arguments: Iterable[tuple[Any, ...]]) -> None:
    arguments = list(arguments)
    if processes == 1:
        for some in arguments:
            print(function(*some), flush=True)
        return
    # Threads of several trainings would get into each other's way.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_calm) as pool:
        for done in as_completed([pool.submit(function, *some) for some in arguments]):
            print(done.result(), flush=True)


def _calm() -> None:
    torch.set_num_threads(2)
