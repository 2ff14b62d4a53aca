"""What several commands share: arguments, options, and how a model is opened."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.errors import DataError, MoLoRAError, SelectionError
from molora.stack import AUTO, NONE

if TYPE_CHECKING:
    from molora import MoLoRAModel
    from molora.selection import Choice

EXTRAS = {
    "demo": {"gradio", "molora_demo"},
    "train": {"peft", "tensorboard", "matplotlib", "molora_training"},
    "eval": {"peft", "lm_eval", "molora_training"},
    "ray": {"ray"},
    "federated": {"flwr", "ray", "dp_accounting"},
    "serve": {"fastapi", "httpx", "uvicorn", "prometheus_client", "python_multipart"},
    "personalize": {"bm25s", "bs4", "pypdf", "rouge_score", "sklearn"},
}


class MissingExtraError(MoLoRAError, ImportError):
    """A part of MoLoRA is not installed."""


class Dtype(StrEnum):
    """Of the base's weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A saved MoLoRA: folder or Hub id. Default: the starter stack."),
]
ChangedModelOption = Annotated[
    Path, typer.Option("--model", metavar="FOLDER", help="The saved MoLoRA that gets the adapter.")
]
SelectOption = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        metavar="LAYER=CHOICE",
        help="Who may act in a layer: auto (the router decides), none, a name (forced), name1,name2 (the router "
        "decides among these), or name1:0.7,name2:0.5 (all of them, at these weights). Repeat it for other layers; "
        "layers left out have their default.",
        show_default=False,
    ),
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0: always the likeliest token; above: sampling.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the sampling; without one each run differs.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number type of the base's weights.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Names the extra where a module of it is missing.

    Raises:
        MissingExtraError: it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRAS[name]:
            raise
        raise MissingExtraError(
            f"This command needs {error.name}, which is not installed. Run: pip install 'molora[{name}]'"
        ) from error


def model_place(model: str | None) -> str:
    """``model``, or where the starter stack is."""
    from molora.starter import starter_folder

    return model if model is not None else str(starter_folder())


def open_model(model: str | None, dtype: Dtype) -> "MoLoRAModel":
    """Loads a saved MoLoRA, onto the GPU where there is one."""
    import torch

    from molora import MoLoRAModel

    place = model_place(model)
    hide_loading_bars()
    device_map = "cuda" if torch.cuda.is_available() else None
    return MoLoRAModel.from_pretrained(place, dtype=getattr(torch, dtype.value), device_map=device_map)


def hide_loading_bars() -> None:
    """Without the bars of ``transformers``, which take a fraction of a second."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def parse_selection(entries: Sequence[str] | None) -> "dict[str, Choice]":
    """Layer -> choice of "layer=choice" entries; the last one of a layer wins.

    Raises:
        SelectionError: an entry has another form.
    """
    selection: dict[str, Choice] = {}
    for entry in entries or ():
        layer, equals, choice = entry.partition("=")
        names = [name.strip() for name in choice.split(",")]
        if not equals or not layer.strip() or not all(names):
            raise SelectionError(
                f"{entry!r} is no selection: write layer=choice, as in domain=auto or domain=math,code."
            )
        if any(":" in name for name in names):
            selection[layer.strip()] = _weights(entry, names)
            continue
        single = None if names[0] == NONE else names[0]
        if len(names) > 1 and {AUTO, NONE} & set(names):
            raise SelectionError(f"{entry!r}: 'auto' and 'none' stand alone; a list holds names of adapters.")
        selection[layer.strip()] = names if len(names) > 1 else single
    return selection


def _weights(entry: str, names: Sequence[str]) -> dict[str, float]:
    found = {}
    for each in names:
        name, _, share = each.partition(":")
        try:
            found[name.strip()] = float(share)
        except ValueError:
            raise SelectionError(f"{entry!r}: give each name a weight, as in domain=math:0.7,code:0.5.") from None
    return found


def check_selection(model: "MoLoRAModel", selection: "dict[str, Choice]") -> None:
    """Checks ``selection`` before anything is generated.

    Raises:
        SelectionError: it does not fit the model's stack.
    """
    from molora.selection import candidates, resolve

    resolve(selection, model.stack, candidates(model.stack, model.slots), model.router is not None)


def sampling(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """The arguments of ``generate`` for these options."""
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    return settings | ({"temperature": temperature} if temperature > 0 else {})


def set_seed(seed: int | None) -> None:
    if seed is not None:
        import torch

        torch.manual_seed(seed)


def read_text(text: str) -> str:
    """``text``, or standard input for "-".

    Raises:
        DataError: there is nothing in it.
    """
    found = sys.stdin.read() if text == "-" else text
    if not found.strip():
        raise DataError("The text is empty: give some, or '-' to read it from standard input.")
    return found


def room_for(model: "MoLoRAModel", max_new_tokens: int) -> int:
    """How many tokens a prompt may have."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    return longest - max_new_tokens


def route_record(route: Sequence[tuple[str, str | None, float]]) -> list[dict[str, Any]]:
    """A route for JSON."""
    return [{"layer": layer, "adapter": adapter, "weight": round(weight, 4)} for layer, adapter, weight in route]


def write_json(record: Any) -> None:
    typer.echo(json.dumps(record, indent=1, ensure_ascii=False, default=str))
