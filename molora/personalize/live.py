"""Documents in and out of a model that runs."""

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from molora.errors import StackError
from molora.factors import write_factors
from molora.live import route_anew
from molora.personalize.document_net import DocumentNet
from molora.personalize.documents import KINDS, examples_of, read_document
from molora.personalize.internalize import factors_of
from molora.personalize.shipped import shipped
from molora.router import Router
from molora.stack import AUTO, NONE, StackLayer, check_name


class Documents:
    """What a model has internalised. The adapters' folders go when the model goes."""

    def __init__(self, model: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="molora-documents-"))
        self.added: list[tuple[str, str]] = []  # layer and name
        self.layers: list[str] = []  # that were made
        weakref.finalize(model, shutil.rmtree, self.folder, ignore_errors=True)


def internalize(
    model: Any, document: str | Path, hypernet: str | Path | None, layer: str, name: str, most_rank: int | None
) -> None:
    """See :meth:`MoLoRAModel.internalize`."""
    check_name(layer, "a layer")
    check_name(name, "an adapter")
    new = layer not in [one.name for one in model.stack.layers]
    if not new and name in model.stack[layer].adapters:
        raise StackError(f"Layer {layer!r} already has {name!r}: give the document another name, or reset().")
    text = read_document(document) if is_file(document) else str(document)
    if hypernet is None:
        hypernet = shipped("document", str(model.base_name))
    net = DocumentNet.load(hypernet, model.dtype).to(model.device)
    with model.routing.lock:  # another thread's routes would reach the reading
        factors = factors_of(model.base, model.tokenizer, net, text, most_rank)
        model.documents = documents = model.documents or Documents(model)
        folder = documents.folder / f"{len(documents.added)}"
        write_factors(folder, factors, str(model.base_name), {"made_from": "a document"})
        routed = isinstance(model.router, Router)
        if new:
            model.stack.layers.append(StackLayer(layer, {}, default=AUTO if routed else name))
        own = model.stack[layer]
        try:
            examples = examples_of(text, model.tokenizer) if routed and own.routed else None
            model.add_adapter(layer, name, folder, examples=examples)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # the next one's has the same name
            if new:
                model.stack.layers.remove(own)
                route_anew(model)
            raise
        documents.added.append((layer, name))
        if new:
            documents.layers.append(layer)


def reset(model: Any) -> None:
    """See :meth:`MoLoRAModel.reset`."""
    documents, model.documents = model.documents, None
    if documents is None:
        return
    with model.routing.lock:
        for layer, name in documents.added:
            if name in model.stack[layer].adapters:
                model.remove_adapter(layer, name)
        for layer in documents.layers:
            if not model.stack[layer].adapters:
                model.stack.layers.remove(model.stack[layer])
                if isinstance(model.router, Router):
                    model.router.remove_row(f"{layer}/{NONE}")
        route_anew(model)
    shutil.rmtree(documents.folder, ignore_errors=True)


def is_file(document: str | Path) -> bool:
    """Whether a file is meant, and not the text itself."""
    if isinstance(document, Path):
        return True
    return len(document) < 1024 and "\n" not in document and Path(document).suffix.lower() in KINDS
