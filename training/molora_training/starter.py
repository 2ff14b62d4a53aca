"""Train the starter stack from nothing: personas' data, every adapter, every router of the results table.

Each step is skipped when its result is there, so an interrupted run goes on where it was.
"""

import copy
import json
import math
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from molora import Router, RouterConfig, Stack, StackLayer, VocabularyRouter
from molora.errors import ConfigError
from molora.saved import ROUTER, ROUTER_METRICS, load, save
from molora.selection import router_rows
from molora_training import adapter, personas, router
from molora_training.adapter_settings import AdapterTrainSettings, DataFiles, LoraShape
from molora_training.data import (
    KINDS,
    Split,
    both_file,
    data_dir,
    mix_all_ways,
    read_examples,
    read_mixed,
    write_examples,
)
from molora_training.evaluate import INTEGRATION
from molora_training.router_settings import LossWeights, RouterTrainSettings

CONFIG = Path(__file__).parent / "configs" / "starter.yaml"
COMMAND = "molora train starter"
OTHERS = "*"


@dataclass(frozen=True)
class StarterLayer:
    """One layer and how its adapters are trained; of several learning rates the best on validation is kept: for each
    adapter, or for all of them the one that is best on those in ``tuned_on``.

    epochs_of, start_dropout_of: of adapters that take more or less than the others.
    learns: each of its adapters learns the data of all of these together; left out, that of its own name.
    batch_tokens: None: the whole recipe's.
    start_dropout: see :class:`LoraShape`.
    """

    name: str
    adapters: tuple[str, ...]
    rank: int
    learning_rates: tuple[float, ...]
    epochs: int
    epochs_of: dict[str, int] = field(default_factory=dict)
    checkpoint_every: int = 40
    max_steps: int | None = None
    default: str | None = "auto"
    shared: bool = False
    tuned_on: tuple[str, ...] = ()
    learns: tuple[str, ...] = ()
    batch_tokens: int | None = None
    start_dropout: int = 0
    start_dropout_of: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterVariant:
    """One router of the table; what is None is as the whole stack's.

    start: another one, from which it goes on. without: adapters that are not there yet when it is trained. first: only
    so many of each layer are there.
    """

    router: RouterConfig = field(default_factory=RouterConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    start: str | None = None
    without: tuple[str, ...] = ()
    first: int | None = None
    mixed: int | None = None
    documents: int | None = None
    in_a_turn: int | None = None
    asides: int | None = None
    both: int | None = None
    null_start: int | None = None
    epochs: int | None = None
    batch_tokens: int | None = None
    learning_rate: float = 1e-3
    seed: int | None = None


@dataclass(frozen=True)
class Integration:
    """An adapter that acts beside every choice of the first router, trained on top of them on its mixed text.

    The idea is that of arXiv 2606.31413; whether it is trained there in this way was not checked.
    """

    rank: int
    learning_rate: float
    epochs: int = 1
    checkpoint_every: int = 100


@dataclass(frozen=True)
class StarterSettings:
    """The whole stack. routers: by name, each a :class:`RouterVariant`. own: the stack's own of them; None: the first.

    sources: source and licence of the data, by the adapter's name, or by "*" of those that are not named.
    integration: an :class:`Integration`, in a layer of that name; None for none.
    """

    base: str
    layers: tuple[Any, ...]
    routers: dict[str, Any]
    sources: dict[str, Any]
    own: str | None = None
    integration: Any = None
    out: Path = Path("starter")
    work: Path = Path("runs/starter")
    data: Path = field(default_factory=data_dir)
    processes: int = 1  # trainings at once, on all GPUs in turn
    batch_tokens: int = 8192
    router_mixed: int = 6000
    router_documents: int = 0
    router_in_a_turn: int = 0
    router_asides: int = 0
    router_both: int = 0
    router_null_start: int = 0
    router_epochs: int = 4
    router_batch_tokens: int = 8192
    router_processes: int = 1
    seed: int = 0


def train(settings: StarterSettings) -> None:
    """Makes ``settings.out`` (with its own router) and ``settings.work/routers/<variant>`` for the others.

    Raises:
        ConfigError: settings that do not fit, found before anything is trained.
    """
    from molora_training.settings import from_mapping

    layers = [from_mapping(StarterLayer, layer, "layers.") for layer in settings.layers]
    variants = {name: from_mapping(RouterVariant, one, f"routers.{name}.") for name, one in settings.routers.items()}
    own = settings.own or next(iter(variants))
    if own not in variants:
        raise ConfigError(f"own is {own!r}, which is none of the routers {', '.join(variants)}.")
    wanted = [name for layer in layers for name in layer.adapters]
    personal = [name for name in personas.read_personas() if name in wanted]
    missing = [name for name in personal if not (settings.data / f"{name}.train.jsonl").is_file()]
    if missing:
        _parallel(2, _prepare_personas, [(settings, missing)])  # in a process of its own, which gives its memory back
    tuned = {name for layer in layers for name in layer.tuned_on}
    _train_adapters(settings, layers, lambda layer, name: name in tuned)
    rates = {layer.name: _best_rate(settings, layer) for layer in layers if layer.tuned_on}
    layers = [replace(layer, learning_rates=(rates[layer.name],)) if layer.tuned_on else layer for layer in layers]
    _train_adapters(settings, layers, lambda layer, name: True)
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
    for variant in variants.values():
        fewer = copy.deepcopy(stack)
        for layer in fewer.layers:
            kept = list(layer.adapters.items())[: variant.first]
            layer.adapters = {name: path for name, path in kept if name not in variant.without}
        fewer.save(_stack_file(settings, variant))
    for later in (False, True):  # those that go on from another one
        some = {name: one for name, one in variants.items() if (one.start is not None) == later}
        runs = [(_router_settings(settings, name, one),) for name, one in some.items()]
        todo = [run for run in runs if not _done(run[0].out, ROUTER_METRICS, ROUTER)]
        _parallel(settings.router_processes, _train_router, todo)
    first = settings.work / "routers" / own
    if settings.integration is None:
        _save(settings, *load(first))
        shutil.copyfile(first / ROUTER_METRICS, settings.out / ROUTER_METRICS)
    else:
        _integrate(settings, from_mapping(Integration, settings.integration, "integration."), first)


def _train_adapters(
    settings: StarterSettings, layers: Sequence[StarterLayer], wanted: Callable[[StarterLayer, str], bool]
) -> None:
    runs = [
        _adapter_settings(settings, layer, name, rate)
        for layer in sorted(layers, key=lambda layer: -layer.rank)  # the longest first
        for name in layer.adapters
        if wanted(layer, name)
        for rate in layer.learning_rates
    ]
    _parallel(settings.processes, _train_adapter, [(run,) for run in runs if not _done(run.out)])


def _done(folder: Path, *files: str) -> bool:
    """Whether a training ended there, and its weights are still there."""
    return all((folder / file).is_file() for file in files or ("metrics.json", "adapter_model.safetensors"))


def _best_rate(settings: StarterSettings, layer: StarterLayer) -> float:
    """The learning rate with the lowest mean validation loss of the adapters in ``tuned_on``."""

    def loss(rate: float) -> float:
        folders = [settings.work / "adapters" / f"{name}-{rate:g}" for name in layer.tuned_on]
        return sum(_validation_loss(folder) for folder in folders)

    return min(layer.learning_rates, key=loss)


def _adapter_settings(settings: StarterSettings, layer: StarterLayer, name: str, rate: float) -> AdapterTrainSettings:
    source, licence = settings.sources.get(name) or settings.sources[OTHERS]
    train, validation = (_data_file(settings, layer, name, split) for split in ("train", "validation"))
    return AdapterTrainSettings(
        out=settings.work / "adapters" / f"{name}-{rate:g}",
        data=DataFiles(train, validation, 1024, source, licence),
        lora=LoraShape(
            rank=layer.rank,
            alpha=2.0 * layer.rank,
            start_dropout=layer.start_dropout_of.get(name, layer.start_dropout),
        ),
        base=settings.base,
        learning_rate=rate,
        epochs=layer.epochs_of.get(name, layer.epochs),
        batch_tokens=layer.batch_tokens or settings.batch_tokens,
        checkpoint_every=layer.checkpoint_every,
        max_steps=layer.max_steps,
        seed=settings.seed,
    )


def _data_file(settings: StarterSettings, layer: StarterLayer, name: str, split: Split) -> Path:
    """The adapter's data; that of several domains is put together here."""
    if not layer.learns:
        return settings.data / f"{name}.{split}.jsonl"
    together = settings.work / "data" / f"{name}.{split}.jsonl"
    if not together.is_file():
        write_examples(
            together,
            [row for domain in layer.learns for row in read_examples(settings.data / f"{domain}.{split}.jsonl")],
        )
    return together


def _router_settings(settings: StarterSettings, name: str, variant: RouterVariant) -> RouterTrainSettings:
    def chosen(own: Any, whole: Any) -> Any:
        return whole if own is None else own

    routers = settings.work / "routers"
    return RouterTrainSettings(
        model=_stack_file(settings, variant) if variant.start is None else routers / variant.start,
        start="new" if variant.start is None else "saved",
        out=routers / name,
        data=settings.data,
        base=settings.base,
        router=variant.router,
        loss=variant.loss,
        epochs=chosen(variant.epochs, settings.router_epochs),
        mixed=chosen(variant.mixed, settings.router_mixed),
        documents=chosen(variant.documents, settings.router_documents),
        in_a_turn=chosen(variant.in_a_turn, settings.router_in_a_turn),
        asides=chosen(variant.asides, settings.router_asides),
        both=chosen(variant.both, settings.router_both),
        null_start=chosen(variant.null_start, settings.router_null_start),
        batch_tokens=chosen(variant.batch_tokens, settings.router_batch_tokens),
        learning_rate=variant.learning_rate,
        seed=chosen(variant.seed, settings.seed),
    )


def _integrate(settings: StarterSettings, how: Integration, first: Path) -> None:
    """Trains the integration adapter on top of a saved MoLoRA, and saves that with it."""
    files = {split: settings.work / "data" / f"{INTEGRATION}.{split}.jsonl" for split in ("train", "validation")}
    base, stack, router = load(first)
    domains = [name for layer in stack.layers for name in layer.adapters]
    for split, file in files.items():
        if not file.is_file():
            write_examples(file, _mixed_text(settings, domains, split))  # type: ignore[arg-type]
    run = AdapterTrainSettings(
        out=settings.work / "adapters" / INTEGRATION,
        data=DataFiles(files["train"], files["validation"], 2048, "the other adapters' data, mixed", "see them"),
        lora=LoraShape(rank=how.rank, alpha=2.0 * how.rank),
        base=settings.base,
        stack=first,
        learning_rate=how.learning_rate,
        epochs=how.epochs,
        batch_tokens=settings.batch_tokens,
        checkpoint_every=how.checkpoint_every,
        seed=settings.seed,
    )
    if not _done(run.out):
        _parallel(2, _train_adapter, [(run,)])
    stack.layers.append(StackLayer(INTEGRATION, {INTEGRATION: run.out}, default=INTEGRATION))
    if isinstance(router, Router):
        router.add_missing(router_rows(stack))
    _save(settings, base, stack, router)


def _save(settings: StarterSettings, base: str, stack: Stack, router: Router | VocabularyRouter | None) -> None:
    """To ``settings.out``, where networks that make adapters stay."""
    paths = {f"{layer.name}/{name}": Path(path) for layer in stack.layers for name, path in layer.adapters.items()}
    save(settings.out, base, stack, router, paths)


def _mixed_text(settings: StarterSettings, domains: Sequence[str], split: Split) -> list[Any]:
    """As the first router learns from; of the validation split a tenth of it."""

    def some(count: int) -> int:
        return count if split == "train" else math.ceil(count / 10)

    ways = (settings.router_mixed, settings.router_documents, settings.router_in_a_turn, settings.router_asides)
    counts = map(some, ways)
    examples = {
        name: read_examples(file) for name in domains if (file := settings.data / f"{name}.{split}.jsonl").is_file()
    }
    rows: list[Any] = list(mix_all_ways(examples, split, counts, settings.seed))
    for kind in KINDS if settings.router_both else ():
        rows += read_mixed(settings.data / both_file(kind, split))[: some(settings.router_both)]
    return rows


def _stack_file(settings: StarterSettings, variant: RouterVariant) -> Path:
    some = [] if variant.first is None else [f"-first-{variant.first}"]
    return settings.work / ("".join(["stack", *some, *(f"-without-{name}" for name in variant.without)]) + ".yaml")


def _keep_best(settings: StarterSettings, layer: StarterLayer, name: str) -> str:
    """The folder of the learning rate with the lowest validation loss."""
    folders = [settings.work / "adapters" / f"{name}-{rate:g}" for rate in layer.learning_rates]
    return str(min(folders, key=_validation_loss).resolve())


def _validation_loss(folder: Path) -> float:
    return float(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["validation_loss"])


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
    """The function of each of the arguments; those that a GPU has no room for run again, fewer at once."""
    arguments = list(arguments)
    if processes == 1:
        for some in arguments:
            print(function(*some), flush=True)
        return
    context = multiprocessing.get_context("spawn")
    gpus = torch.cuda.device_count()
    too_large = set()
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_settle, initargs=(gpus,)) as pool:
        running = {pool.submit(function, *some): index for index, some in enumerate(arguments)}
        for done in as_completed(running):
            if _had_no_room(done.exception()):
                too_large.add(running[done])
            else:
                print(done.result(), flush=True)
    if too_large:
        fewer = processes // 2
        print(f"{len(too_large)} did not fit into the GPU beside the others: again, {fewer} at once.", flush=True)
        _parallel(fewer, function, [arguments[index] for index in sorted(too_large)])


def _had_no_room(error: BaseException | None) -> bool:
    """Also where a library finds that the GPU is full, before PyTorch does."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def _settle(gpus: int) -> None:
    """A worker's place: few threads, since those of several trainings would get into each other's way, and one GPU. It
    ends with the recipe, also where that is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(2)
    if gpus > 1:
        number = multiprocessing.current_process()._identity[-1]
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible()[number % gpus]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _visible() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
