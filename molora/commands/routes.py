"""``molora routes``: which adapters act on each token of a text."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.colors import FILLS, INK, Route, fill_of, printable, shares, shares_text, speaker
from molora.commands.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SelectOption,
    open_model,
    parse_selection,
    read_text,
    room_for,
    route_record,
    write_json,
)
from molora.errors import DataError

if TYPE_CHECKING:
    from molora import MoLoRAModel
    from molora.selection import Selection
    from molora.stack import StackLayer

Token = tuple[int, str, Route]
"""(id, text, route); the text is "" where a character is not complete yet."""
_VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥"})


def routes(
    model: ModelArgument = None,
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT|-", help="The text, or - to read it from stdin. Alone: for the starter stack."),
    ] = None,
    select: SelectOption = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with coloured tokens instead.")
    ] = None,
    as_json: JsonOption = False,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Show which adapters act on each token of a text. The text is read as it is, without the chat format.

    Out comes a table with a line for each token and a column for each layer, and the share of each adapter.

    Example: molora routes "def area(r): return 3.14 * r ** 2" --html routes.html
    """
    if text is None:
        model, text = None, model
    selection = parse_selection(select)
    text = read_text(text or "")
    opened = open_model(model, dtype)
    tokens = read_routes(opened, text, selection)
    layers = opened.stack.layers
    if html is not None:
        from molora.route_page import route_page

        try:
            html.write_text(route_page([token[1:] for token in tokens], layers, "MoLoRA routes"), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{html} cannot be written: {error.strerror}.") from error
    if as_json:
        write_json(_record(text, selection, tokens, layers))
    elif html is not None:
        typer.echo(f"{html}: {len(tokens)} tokens; {shares_text([token[2] for token in tokens], layers)}")
    else:
        _print_table(tokens, layers)


def read_routes(model: "MoLoRAModel", text: str, selection: "Selection") -> list[Token]:
    """One forward over ``text``.

    Raises:
        SelectionError: ``selection`` does not fit. DataError: the text is too long for the base.
    """
    import torch

    from molora.streaming import TextDecoder

    inputs = model.encode(text)
    ids = inputs["input_ids"][0].tolist()
    if len(ids) > room_for(model, 0):
        raise DataError(f"The text has {len(ids)} tokens, and this model can read {room_for(model, 0)}: shorten it.")
    with torch.no_grad():
        found = model(**inputs, selection=selection, output_routes=True, use_cache=False, logits_to_keep=1).routes
    decoder, special = TextDecoder(model.tokenizer), set(model.tokenizer.all_special_ids)
    texts = [model.tokenizer.convert_ids_to_tokens(id) if id in special else decoder.push(id) for id in ids]
    return [(id, piece, found.at(0, place)) for place, (id, piece) in enumerate(zip(ids, texts, strict=True))]


def _record(
    text: str, selection: "Selection", tokens: Sequence[Token], layers: "Sequence[StackLayer]"
) -> dict[str, Any]:
    found = {layer.name: shares((route for _, _, route in tokens), layer.name) for layer in layers}
    return {
        "text": text,
        "selection": selection,
        "tokens": [{"id": id, "text": piece, "routes": route_record(route)} for id, piece, route in tokens],
        "shares": {
            layer: {name or "none": round(part, 4) for name, part in parts.items()} for layer, parts in found.items()
        },
    }


def _print_table(tokens: Sequence[Token], layers: "Sequence[StackLayer]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("#", justify="right", style="dim")
    table.add_column("token")
    for layer in layers:
        table.add_column(layer.name)
    for number, (_, piece, route) in enumerate(tokens):
        shown = printable(piece).translate(_VISIBLE) or "…"
        table.add_row(str(number), Text(shown), *(_cell(route, layer) for layer in layers))
    console = Console()
    console.print(table)
    console.print(f"\n{len(tokens)} tokens; {shares_text([token[2] for token in tokens], layers)}", soft_wrap=True)


def _cell(route: Route, layer: "StackLayer") -> Any:
    from rich.text import Text

    acted = [(name, weight) for where, name, weight in route if where == layer.name and name is not None]
    words = ", ".join(name if weight == 1 else f"{name} {weight:.2f}" for name, weight in acted)
    fill = fill_of(layer, speaker(route, layer.name))
    return Text(words or "-", style="dim" if fill is None else f"{INK[0]} on {FILLS[fill][0]}")
