"""The networks that come with MoLoRA and make adapters: beside the starter stack, each for one base."""

import json
from pathlib import Path

from molora.base import same_base
from molora.errors import HypernetError, StackError
from molora.starter import starter_folder

FOLDER = "hypernets"
CONFIG_FILE = "hypernet.json"
TRAINED_BY = {  # what adapters are made of -> the command that trains a network for it
    "document": "molora train hypernet doc out=document-net",
    "profile": "molora train hypernet profile raters out=profile-net",
    "description": "molora train hypernet text data.folder=manners out=text-net",
}


def shipped(kind: str, base: str) -> Path:
    """The folder of the network of a ``kind`` in TRAINED_BY that is shipped for ``base``, as its users name it.

    Raises:
        HypernetError: none is shipped, or for another base; it says how to train one. StackError: $MOLORA_STARTER names
            no saved MoLoRA.
    """
    command = TRAINED_BY[kind]
    folder = starter_folder() / FOLDER / kind
    if not (folder / CONFIG_FILE).is_file():
        raise HypernetError(
            f"No network that makes adapters of a {kind} is shipped ({folder} holds none): train one with `{command}`, "
            f"and name its folder."
        )
    try:
        made_for = str(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["base"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HypernetError(f"The hypernetwork at {folder} is damaged: {error!r}") from error
    if not same_base(made_for, base):
        raise HypernetError(
            f"The network that is shipped to make adapters of a {kind} was trained for {made_for}, and this model's "
            f"base is {base}: train one for it with `{command} base={base}`, and name its folder."
        )
    return folder


def all_shipped(base: str) -> dict[str, Path]:
    """Those that are shipped for ``base``, by kind."""
    found = {}
    for kind in TRAINED_BY:
        try:
            found[kind] = shipped(kind, base)
        except (HypernetError, StackError):
            continue
    return found
