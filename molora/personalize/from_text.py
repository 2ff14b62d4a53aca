"""From a description, or a user's profile, to an adapter: one forward of a trained network."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from molora.errors import AdapterError, DataError, HypernetError
from molora.factors import Factors, write_factors
from molora.personalize.text_net import KIND, TextNet


class TextEncoder(Protocol):
    """What makes embeddings of texts."""

    def __call__(self, texts: list[str], /) -> torch.Tensor:
        """float32 [N, E] of N texts."""


def adapter_from_text(net: TextNet, encoder: TextEncoder, text: str, folder: Path, base_name: str) -> Factors:
    """Writes the adapter of one text as a PEFT folder; arguments and errors as of :func:`adapters_from_texts`."""
    return adapters_from_texts(net, encoder, [text], [folder], base_name)[0]


def adapters_from_texts(
    net: TextNet, encoder: TextEncoder, texts: Sequence[str], folders: Sequence[Path], base_name: str
) -> list[Factors]:
    """Writes the adapters of N texts, made in one forward.

    The texts themselves are not kept: a profile tells of a person. Beside each adapter its text's sha256 is.

    Args:
        net: trained for that base.
        encoder: the one whose embeddings it was trained on.
        texts: a description or a profile for each adapter.
        folders: for each of them, where there must be nothing yet.
        base_name: the base, as its users name it.

    Returns:
        The factors of each adapter, as :func:`factors_from_texts`.

    Raises:
        DataError: a text is empty. AdapterError: a folder is there already, or is named twice.
        HypernetError: the network is for another base, or the encoder is not its own.
        NonFiniteError: an adapter holds NaN or infinite values.
    """
    net.check_name(base_name)
    if len(texts) != len(folders) or len(set(folders)) != len(folders):
        raise AdapterError(f"Name one folder for each text: there are {len(texts)} texts and {len(set(folders))}.")
    for folder in folders:
        if folder.exists():
            raise AdapterError(f"{folder} is there already: nothing was written. Choose another folder.")
    found = factors_from_texts(net, encoder, texts)
    for text, folder, factors in zip(texts, folders, found, strict=True):
        digest = hashlib.sha256(text.encode()).hexdigest()
        about = {"kind": KIND, "text_sha256": digest, "encoder": net.config.encoder, "head": net.config.head}
        write_factors(folder, factors, base_name, about)
    return found


@torch.no_grad()
def factors_from_texts(net: TextNet, encoder: TextEncoder, texts: Sequence[str]) -> list[Factors]:
    """The factors of each text's adapter, for :func:`molora.factors.write_factors`.

    Raises:
        DataError: a text is empty. HypernetError: the encoder is not the network's own.
    """
    embeddings = embed(encoder, texts)
    if embeddings.shape[1] != net.config.embedding:
        raise HypernetError(
            f"This hypernetwork reads embeddings of {net.config.embedding} numbers and these have "
            f"{embeddings.shape[1]}: take the encoder that it was trained with ({net.config.encoder or 'not named'})."
        )
    training = net.training
    factors = net.eval()(embeddings.to(net.mean.device))
    net.train(training)
    return [{name: (A[n], B[n]) for name, (A, B) in factors.items()} for n in range(len(texts))]


@torch.no_grad()
def embed(encoder: TextEncoder, texts: Sequence[str]) -> torch.Tensor:
    """The texts' embeddings, float32 [N, E] on the CPU.

    Raises:
        DataError: there is no text, or one is empty. HypernetError: the encoder gives anything else than embeddings.
    """
    if not texts or not all(text.strip() for text in texts):
        raise DataError("A text is empty: an adapter needs a description, or a profile, to be made from.")
    embeddings = encoder(list(texts)).detach().to("cpu", torch.float32)
    if embeddings.dim() != 2 or len(embeddings) != len(texts):
        raise HypernetError(f"The encoder gave {tuple(embeddings.shape)} for {len(texts)} texts, not [texts, size].")
    if not bool(torch.isfinite(embeddings).all()):
        raise HypernetError("The encoder gave NaN or infinite values: another encoder, or shorter texts, may help.")
    return embeddings
