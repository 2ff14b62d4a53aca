"""``molora profile`` and ``molora describe``: an adapter from a text about somebody, by a trained network."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.commands.common import ChangedModelOption, Dtype, JsonOption, extra, open_model, write_json
from molora.stack import read_label

if TYPE_CHECKING:
    from molora.versions import Version

HypernetOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="The network, from `molora train hypernet profile` or `text`. Default: the one shipped for this and "
        "the model's base, if there is one.",
        show_default=False,
    ),
]


def profile(
    layer: Annotated[str, typer.Argument(help="The adapter's layer, such as user.")],
    name: Annotated[str, typer.Argument(metavar="ADAPTER", help="Its name; the history has to be this user's.")],
    history: Annotated[
        Path, typer.Option(metavar="FILE", help="The user's conversations as JSON Lines, or LaMP's questions.")
    ],
    model: ChangedModelOption,
    hypernet: HypernetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a user's adapter from a profile, which is written from the user's history. Nothing is trained.

    In: a history, and a saved MoLoRA; for another base than the starter's also a network that was trained for it. Out:
    an adapter in the saved MoLoRA, an ordinary PEFT folder; what was there under that name stays as an earlier version.
    A user without a history gets the adapter of nobody in particular, and is told so.

    Example: molora profile user ada --history ada.jsonl --model my-molora
    """
    with extra("personalize"):
        from molora.personalize.history import read_history
        from molora.personalize.place import check_label
        from molora.personalize.profile import profile_text

        check_label(model, (layer, name))
        said = read_history(history, name)
        if not said:
            typer.echo(
                f"{history.name} holds nothing of {name}: the adapter is that of nobody in particular.", err=True
            )
        about = {"made_from": "a profile", "history": hashlib.sha256(history.read_bytes()).hexdigest()}
        version = _placed(
            model, (layer, name), "profile", hypernet, lambda encoder: profile_text(said, encoder=encoder), about,
            f"molora profile {layer} {name} --history {history.name}", [one.question for one in said] or None,
        )  # fmt: skip
    _tell(f"{layer}/{name}", version, as_json)


def describe(
    text: Annotated[str, typer.Argument(help='What it is to be like, such as "answers like a pirate".')],
    label: Annotated[str, typer.Option("--as", metavar="LAYER/NAME", help="What it becomes: personality/pirate.")],
    model: ChangedModelOption,
    hypernet: HypernetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an adapter from a description. Nothing is trained.

    In: a sentence, a network from `molora train hypernet text` (none is shipped), a saved MoLoRA of its base. Out: an
    adapter in the saved MoLoRA, an ordinary PEFT folder; what was there under that name stays as an earlier version.

    Example: molora describe "answers like a pirate" --as personality/pirate --hypernet text-net --model my-molora
    """
    with extra("personalize"):
        from molora.personalize.place import check_label

        where = check_label(model, read_label(label))
        about = {"made_from": "a description", "sha256": hashlib.sha256(text.encode()).hexdigest()}
        version = _placed(
            model, where, "description", hypernet, lambda _: text, about, f"molora describe --as {label}", None
        )
    _tell("/".join(where), version, as_json)


def _placed(
    model: Path,
    label: tuple[str, str],
    kind: str,
    hypernet: Path | None,
    text: Callable[[Any], str],
    about: dict[str, Any],
    command: str,
    examples: list[str] | None,
) -> "Version":
    from molora.personalize.embeddings import SentenceEncoder
    from molora.personalize.from_text import factors_from_texts
    from molora.personalize.place import place
    from molora.personalize.shipped import shipped
    from molora.personalize.text_net import TextNet
    from molora.saved import read_manifest

    hypernet = hypernet or shipped(kind, read_manifest(model)["base"]["name"])
    loaded = open_model(str(model), Dtype.bfloat16)
    net = TextNet.load(hypernet, loaded.base, str(loaded.base_name))
    encoder = SentenceEncoder(net.config.encoder)
    (factors,) = factors_from_texts(net, encoder.encode, [text(encoder)])
    return place(
        model, loaded, label, factors, {**about, "hypernet": hypernet.name}, command=command, examples=examples
    )


def _tell(label: str, version: "Version", as_json: bool) -> None:
    if as_json:
        write_json({"adapter": label, "version": version.number})
    else:
        typer.echo(f"{label}, version {version.number}.")
