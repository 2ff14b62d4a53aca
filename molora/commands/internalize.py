"""``molora internalize``: a document becomes an adapter."""

import hashlib
import time
from pathlib import Path
from typing import Annotated

import typer

from molora.commands.common import ChangedModelOption, Dtype, JsonOption, extra, open_model, write_json
from molora.stack import read_label


def internalize(
    document: Annotated[Path, typer.Argument(metavar="DOCUMENT", help="A .txt, .md, .html or .pdf file.")],
    label: Annotated[str, typer.Option("--as", metavar="LAYER/NAME", help="What it becomes, such as user/ada.")],
    model: ChangedModelOption,
    hypernet: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The network, from `molora train hypernet doc`. Default: the shipped one, for the starter's base.",
            show_default=False,
        ),
    ] = None,
    most_rank: Annotated[
        int | None,
        typer.Option(min=1, metavar="RANK", help="Cut the adapter to it, so that long documents take no more memory."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an adapter of a document, whose text is then in no prompt. Nothing is trained.

    What such an adapter knows depends on the network. The shipped one answers a third of the questions about plain
    facts, and is mostly wrong about others: docs/personalize.md has the figures.

    In: a document, and a saved MoLoRA; for another base than the starter's also a network that was trained for it. Out:
    an adapter in the saved MoLoRA, an ordinary PEFT folder; where the router chooses in its layer, the document's
    sentences say which tokens are for it. What was there under that name stays as an earlier version: molora rollback.

    Example: molora internalize report.pdf --as user/ada --model my-molora
    """
    with extra("personalize"):
        from molora.personalize.document_net import DocumentNet
        from molora.personalize.documents import examples_of, read_document
        from molora.personalize.internalize import factors_of
        from molora.personalize.place import check_label, place
        from molora.personalize.shipped import shipped
        from molora.saved import read_manifest

        where = read_label(label)
        check_label(model, where)
        text = read_document(document)
        hypernet = hypernet or shipped("document", read_manifest(model)["base"]["name"])
        loaded = open_model(str(model), Dtype.bfloat16)
        net = DocumentNet.load(hypernet, loaded.dtype).to(loaded.device)
        started = time.monotonic()
        factors = factors_of(loaded.base, loaded.tokenizer, net, text, most_rank)
        seconds = time.monotonic() - started
        digest = hashlib.sha256(text.encode()).hexdigest()
        about = {"made_from": "a document", "sha256": digest, "characters": len(text), "hypernet": hypernet.name}
        version = place(
            model,
            loaded,
            where,
            factors,
            about,
            command=f"molora internalize {document.name} --as {label}",
            examples=examples_of(text, loaded.tokenizer),
        )
    rank = max(len(A) for A, _ in factors.values())
    found = {"adapter": "/".join(where), "version": version.number, "rank": rank, "seconds": round(seconds, 3)}
    if as_json:
        write_json(found)
    else:
        typer.echo(f"{document.name} is {'/'.join(where)}, version {version.number}, of rank {rank}; {seconds:.1f} s.")
