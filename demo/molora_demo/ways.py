"""The other ways to an adapter: an upload, a document, a description, a history. What is here changes nothing; it
writes a PEFT folder, or refuses in words."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from molora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from molora.checks import check_fits
from molora.errors import MoLoRAError
from molora.factors import Factors
from molora.personalize.shipped import TRAINED_BY

CONFIG_BYTES = 64 * 2**10
WEIGHTS_BYTES = 32 * 2**20
DOCUMENT_BYTES = 8 * 2**20
DOCUMENT_TOKENS = 16_384
HISTORY_BYTES = 4 * 2**20
INTERACTIONS = 50  # of a history, the last ones
DESCRIPTION = 500  # characters
MOST_RANK = 8
_PLAIN = re.compile(r"[\w.-]{1,200}")
_NEEDS = {"document": ("bs4", "pypdf"), "profile": ("bm25s",), "description": (), "pieces": ()}


@dataclass(frozen=True)
class Network:
    """What makes adapters at once: what it is, and the command that trains one."""

    what: str
    command: str


NETWORKS = {
    "document": Network(
        "a network that reads a text once and turns it into an adapter",
        TRAINED_BY["document"],
    ),
    "description": Network(
        "a network that turns a sentence into an adapter",
        TRAINED_BY["description"],
    ),
    "profile": Network(
        "a network that turns a summary of what a person said into an adapter",
        TRAINED_BY["profile"],
    ),
    "pieces": Network(
        "a pool of small pieces of other people's adapters, to put a new one together from",
        "molora train pieces people=presidents out=pieces",
    ),
}


def unready(way: str, networks: Mapping[str, Path]) -> str:
    """Why a way is closed; nothing if it is open. Code stands between backticks."""
    need = NETWORKS[way]
    if way not in networks:
        folder = need.command.rpartition("out=")[2]
        return (
            f"This way needs {need.what}; none is shipped for this base. `{need.command}` makes one, and "
            f"`molora demo --network {way}={folder}` uses it."
        )
    if lacking := [name for name in _NEEDS[way] if find_spec(name) is None]:
        return f"This way needs {', '.join(lacking)}: `pip install 'molora[personalize]'`."
    return ""


def write_upload(model: Any, files: Sequence[Path], folder: Path, title: str) -> None:
    """Writes two uploaded files as a PEFT folder, if they are one that fits the model's base.

    Raises:
        MoLoRAError: they are no PEFT adapter of safetensors for this base.
    """
    kinds: dict[str, Path] = {}
    for file in files:
        kinds.setdefault(file.suffix.lower(), file)
    if set(kinds) != {".json", ".safetensors"} or len(files) != 2:
        raise MoLoRAError(f"Give the two files of a PEFT folder: {CONFIG_FILE} and {WEIGHTS_FILE}.")
    config, weights = kinds[".json"], kinds[".safetensors"]
    if config.stat().st_size > CONFIG_BYTES or weights.stat().st_size > WEIGHTS_BYTES:
        raise MoLoRAError(
            f"Too large: {CONFIG_FILE} may have {CONFIG_BYTES >> 10} KiB and {WEIGHTS_FILE} {WEIGHTS_BYTES >> 20} MiB."
        )
    folder.mkdir()
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise MoLoRAError(f"{CONFIG_FILE} is not readable JSON.") from None
    _check_patterns(settings)
    (folder / CONFIG_FILE).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    (folder / WEIGHTS_FILE).write_bytes(weights.read_bytes())
    check_folder(model, folder, title)


def _check_patterns(settings: Any) -> None:
    """PEFT reads the keys of these as regular expressions, which can be made to run for ever: names alone may come."""
    if not isinstance(settings, dict):
        raise MoLoRAError(f"{CONFIG_FILE} is no PEFT configuration.")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(field) or {}
        if not isinstance(patterns, dict) or not all(_PLAIN.fullmatch(name) for name in patterns):
            raise MoLoRAError(f"{CONFIG_FILE}: {field} may name modules, and nothing else.")
    numbers = [settings.get("r"), settings.get("lora_alpha"), *(settings.get("alpha_pattern") or {}).values()]
    if any(isinstance(one, int | float) and abs(one) > 1e6 for one in numbers):
        raise MoLoRAError(f"{CONFIG_FILE}: a rank or an alpha above a million is no adapter's.")


def check_folder(model: Any, folder: Path, title: str) -> None:
    """Raises MoLoRAError: the adapter is not one for the model's base; it is called by its title there."""
    try:
        check_fits(Adapter.load(folder), model.base, str(model.base_name), model.adapted.backend)
    except MoLoRAError as error:
        raise type(error)(str(error).replace(str(folder), f"“{title}”")) from None


def document_text(model: Any, file: Path) -> str:
    """The text of an uploaded document.

    Raises:
        MoLoRAError: it cannot be read, or is too long.
    """
    from molora.personalize.documents import chunks, read_document

    if file.is_file() and file.stat().st_size > DOCUMENT_BYTES:
        raise MoLoRAError(f"The document is too large: {DOCUMENT_BYTES >> 20} MiB are the most.")
    text = read_document(file)
    if len(chunks(text, model.tokenizer, 1024)) * 1024 > DOCUMENT_TOKENS:
        raise MoLoRAError(f"The document is too long: {DOCUMENT_TOKENS:,} tokens, about 40 pages, are the most.")
    return text


def of_document(model: Any, network: Path, text: str) -> Factors:
    """One reading by the base, in its turn."""
    from molora.personalize.document_net import DocumentNet
    from molora.personalize.internalize import factors_of

    net = DocumentNet.load(network, model.dtype).to(model.device)
    with model.routing.lock:
        return factors_of(model.base, model.tokenizer, net, text, MOST_RANK)


def of_description(model: Any, network: Path, text: str) -> Factors:
    """Raises MoLoRAError: it is empty or too long, or the network is another base's."""
    text = " ".join(text.split())
    if not text or len(text) > DESCRIPTION:
        raise MoLoRAError(f"Describe it in 1 to {DESCRIPTION} characters.")
    return _of_text(model, network, lambda _: text)


def of_profile(model: Any, network: Path, said: Sequence[Any]) -> Factors:
    """From a history, by its profile."""
    from molora.personalize.profile import profile_text

    return _of_text(model, network, lambda encoder: profile_text(said, encoder=encoder))


def of_pieces(model: Any, network: Path, said: Sequence[Any]) -> Factors:
    """From a history, by one reading of it by the base, in its turn."""
    from molora.personalize.pieces import PiecePool

    pool = PiecePool.load(network)
    if pool.config.beneath:
        raise MoLoRAError("These pieces lie on top of an adapter of their task: the demo needs a pool without one.")
    turns = [[{"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer}] for one in said]
    with model.routing.lock:
        return pool.factors(pool.assemble(model.base, model.tokenizer, turns))


def history_of(file: Path, user: str) -> list[Any]:
    """The last interactions of an uploaded history.

    Raises:
        MoLoRAError: it cannot be read, is too large, or holds nothing of that user.
    """
    from molora.personalize.history import read_history

    if file.is_file() and file.stat().st_size > HISTORY_BYTES:
        raise MoLoRAError(f"The history is too large: {HISTORY_BYTES >> 20} MiB are the most.")
    said = read_history(file, user)
    if not said:
        raise MoLoRAError(f"{file.name} holds nothing of {user}.")
    return said[-INTERACTIONS:]


def _of_text(model: Any, network: Path, text: Any) -> Factors:
    from molora.personalize import embeddings
    from molora.personalize.from_text import factors_from_texts
    from molora.personalize.text_net import TextNet

    net = TextNet.load(network, model.base, str(model.base_name))
    encoder = embeddings.SentenceEncoder(net.config.encoder)
    return factors_from_texts(net, encoder.encode, [text(encoder)])[0]
