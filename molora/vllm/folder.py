"""What a folder that :mod:`molora.vllm.export` wrote says, and the request that asks vLLM for it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora.errors import AdapterFormatError
from molora.router import RouterConfig

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

FORMAT = 1
MANIFEST = "molora_vllm.json"
TABLE = "molora_table.safetensors"
"""What the router reads of each token id, [vocabulary, width] float32."""
_KEYS = {"format", "base", "rank", "stack", "selection", "columns", "router"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """molora_vllm.json of a folder.

    Raises:
        AdapterFormatError: it is not readable, or of another format.
    """
    file = folder / MANIFEST
    try:
        manifest: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{file} is not readable ({error}).") from error
    if not isinstance(manifest, Mapping) or set(manifest) != _KEYS or manifest["format"] != FORMAT:
        raise AdapterFormatError(
            f"{file} is not of format {FORMAT} with the keys {', '.join(sorted(_KEYS))}: export the stack again."
        )
    return dict(manifest)


def reads_hidden(manifest: Mapping[str, Any]) -> bool:
    """Whether its router reads a hidden state, for which vLLM must not compile the model."""
    router = manifest["router"] or {}
    return router.get("kind") == "mlp" and max(RouterConfig.from_dict(router["config"]).points) > 0


def request(folder: str | Path) -> "LoRARequest":
    """vLLM's request for an exported folder. Its name ends with the hash of the content, and its id is made of that:
    the same content has the same id in every process."""
    from vllm.lora.request import LoRARequest

    place = Path(folder).resolve()
    read_manifest(place)
    number = int(place.name.rpartition("-")[2][:7], 16) + 1
    return LoRARequest(lora_name=place.name, lora_int_id=number, lora_path=str(place))
