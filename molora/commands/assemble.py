"""``molora assemble``: a user's adapter from others' pieces."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from molora.commands.common import ChangedModelOption, Dtype, JsonOption, extra, open_model, write_json

if TYPE_CHECKING:
    from molora import MoLoRAModel
    from molora.factors import Factors
    from molora.personalize.pieces import Assembled, PiecePool
    from molora_training.data import Encoded


def assemble(
    layer: Annotated[str, typer.Argument(help="The adapter's layer, such as user.")],
    name: Annotated[str, typer.Argument(metavar="ADAPTER", help="Its name; the history has to be this user's.")],
    history: Annotated[
        Path, typer.Option(metavar="FILE", help="The user's conversations as JSON Lines, or LaMP's questions.")
    ],
    pool: Annotated[Path, typer.Option(metavar="FOLDER", help="Pieces, from `molora train pieces`.")],
    model: ChangedModelOption,
    way: Annotated[
        Literal["pieces", "fitted", "anchors"],
        typer.Option(
            help="pieces: chosen module by module; fitted: drawn by chance, with weights that are learnt; "
            "anchors: whole adapters of the nearest histories, merged."
        ),
    ] = "pieces",
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Pieces of each module, or anchors. Default: 3, of anchors 2.", show_default=False),
    ] = None,
    beneath: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER/ADAPTER",
            help="The adapter of the saved MoLoRA on top of which the pool was trained.",
            show_default=False,
        ),
    ] = None,
    on_top: Annotated[
        int, typer.Option(min=0, metavar="RANK", help="Train an adapter of this rank on top, on the history; 0: none.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write what has to be kept of the user: places and weights, about 2 KB."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put a user's adapter together from others', by one reading of the user's history. Nothing is trained, but for
    --on-top and the few hundred weights of --way fitted.

    In: a history, a pool of pieces, a saved MoLoRA of the pool's base. Out: an adapter in the saved MoLoRA, an ordinary
    PEFT folder; what was there under that name stays as an earlier version. A user without a history gets no adapter.

    Example: molora assemble user ada --history ada.jsonl --pool pieces --model my-molora
    """
    with extra("personalize"):
        from molora.errors import DataError, HypernetError
        from molora.factors import concatenated
        from molora.personalize.generated import generated, stacked
        from molora.personalize.history import read_history
        from molora.personalize.pieces import ANCHORS, TOP, PiecePool
        from molora.personalize.place import check_label, place
        from molora.personalize.retrieval import text_of

        check_label(model, (layer, name))
        said = read_history(history, name)
        if not said:
            raise DataError(f"{history.name} holds nothing of {name}: without a history the base answers as it is.")
        pieces = PiecePool.load(pool)
        loaded = open_model(str(model), Dtype.bfloat16)
        below = _below(loaded, beneath, pieces)
        turns = [
            [{"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer}] for one in said
        ]
        if way == "anchors":
            from molora.personalize.embeddings import SentenceEncoder

            if pieces.embeddings is None:
                raise HypernetError(f"The pool {pool} has no embeddings of histories: train one that has.")
            encoder = SentenceEncoder(pieces.config.encoder)
            chosen = pieces.nearest(encoder.encode([text_of(one) for one in said]).mean(0), top or ANCHORS)
        elif way == "fitted":
            chosen = _fitted(loaded, below, pieces, turns, top or TOP)
        else:
            with generated(loaded.base, stacked(below, loaded.base.device)):
                chosen = pieces.assemble(loaded.base, loaded.tokenizer, turns, top or TOP)
        factors = pieces.factors(chosen)
        if on_top:
            trained = _trained(loaded, concatenated([*below, factors]), list(factors), turns, on_top)
            factors = concatenated([factors, trained])
        kept = chosen.to_bytes()
        about = {
            "made_from": way,
            "on_top": on_top,
            "history": hashlib.sha256(history.read_bytes()).hexdigest(),
            "interactions": len(said),
            "pool": pool.name,
        }
        version = place(
            model, loaded, (layer, name), factors, about,
            command=f"molora assemble {layer} {name} --history {history.name}",
            examples=[one.question for one in said],
        )  # fmt: skip
        if out is not None:
            out.write_bytes(kept)
    found = {"adapter": f"{layer}/{name}", "version": version.number, "interactions": len(said), "bytes": len(kept)}
    if as_json:
        write_json(found)
    else:
        typer.echo(
            f"{layer}/{name}, version {version.number}, from {len(said)} interactions; {len(kept):,} bytes to be kept."
        )


def _below(model: "MoLoRAModel", beneath: str | None, pool: "PiecePool") -> "list[Factors]":
    """What acts beneath the pieces: nothing, or one adapter.

    Raises:
        AdapterNotFoundError: there is none of that name. HypernetError: it is another one than the pool was trained on.
    """
    from molora.errors import AdapterNotFoundError, HypernetError
    from molora.factors import of_adapter
    from molora.personalize.pieces import weights_digest

    if beneath is None:
        if pool.config.beneath:
            raise HypernetError(
                "These pieces were trained on top of an adapter of their task: name it with --beneath LAYER/ADAPTER."
            )
        return []
    if beneath not in model.adapters:
        raise AdapterNotFoundError(f"The model has no adapter {beneath!r}; there are: {', '.join(model.adapters)}.")
    adapter = model.adapters[beneath]
    if weights_digest(adapter.path) != pool.config.beneath:
        raise HypernetError(f"These pieces were not trained on top of {beneath}: give the adapter that they were.")
    return [of_adapter(adapter)]


def _fitted(
    model: "MoLoRAModel", below: "list[Factors]", pool: "PiecePool", turns: list[list[dict[str, str]]], top: int
) -> "Assembled":
    with extra("train"):
        from molora_training.fitting import drawn, fit_weights

        pool.check(model.base)
        rows, pad = _rows(model, turns)
        beneath = below[0] if below else None
        return fit_weights(model.base, pool, [drawn(pool, top)], [rows], pad, below=beneath)[0]


def _trained(
    model: "MoLoRAModel", below: "Factors", modules: list[str], turns: list[list[dict[str, str]]], rank: int
) -> "Factors":
    with extra("train"):
        from molora_training.side_by_side import ON_TOP, train_adapters

        rows, pad = _rows(model, turns)
        return train_adapters(model.base, [rows], pad, ON_TOP, modules, rank, below=[below])[0]


def _rows(model: "MoLoRAModel", turns: list[list[dict[str, str]]]) -> "tuple[list[Encoded], int]":
    """A history as trainings read it, and what pads it."""
    from molora_training.data import encode

    tokenizer: Any = model.tokenizer
    return [encode(messages, tokenizer, ["user"], ["user"]) for messages in turns], int(tokenizer.pad_token_id or 0)
