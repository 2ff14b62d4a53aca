"""An adapter of which one module's weights are in memory at a time."""

import re
from pathlib import Path

from safetensors import safe_open

from molora.adapter import PREFIX, WEIGHTS_FILE, Adapter, LoRAWeights


class AdapterStream:
    """A PEFT folder or Hub id: checked whole, let go of, and read again by module.

    Attributes:
        base: the name of the model that it was made for, "" where it names none.
        modules: the base's module name -> its inputs, outputs and rank.

    Raises:
        AdapterError: as of :meth:`Adapter.load`.
    """

    def __init__(self, path: str | Path) -> None:
        adapter = Adapter.load(path)
        self.base = str(adapter.config.get("base_model_name_or_path") or "")
        self.modules = {
            name: (own.A.shape[1], own.B.shape[0], own.rank) for name, own in sorted(adapter.modules.items())
        }
        self._scales = {name: own.scale for name, own in adapter.modules.items()}
        self._file = adapter.path / WEIGHTS_FILE
        self._keys: dict[tuple[str, str], str] = {}
        with safe_open(self._file, framework="pt") as source:
            for key in source.keys():
                if match := re.fullmatch(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_([AB])\.weight", key):
                    self._keys[match[1], match[2]] = key

    def weights(self, module: str) -> LoRAWeights | None:
        """Float32; None where the adapter has none."""
        if module not in self.modules:
            return None
        with safe_open(self._file, framework="pt") as source:
            A, B = (source.get_tensor(self._keys[module, half]).float() for half in "AB")
        return LoRAWeights(A, B, self._scales[module])
