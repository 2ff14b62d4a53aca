"""Reading PEFT LoRA folders: checked whole before anything is used, converted in no way on disk."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from molora.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    NonFiniteError,
    UnsupportedAdapterError,
)
from molora.key_file import KEY_FILE, read_key

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Settings of a LoraConfig that change nothing at inference, or that are read below.
_KNOWN_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora", "velora_config",
}  # fmt: skip
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COPIED = ("embed_tokens.weight", "lm_head.weight", "wte.weight")
# Initialisations that change the base weight itself: such an adapter is a delta to another base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoRAWeights:
    """One module's factors: delta(x) = scale * B (A x)."""

    A: torch.Tensor  # [rank, in]
    B: torch.Tensor  # [out, rank]
    scale: float  # alpha / rank, or alpha / sqrt(rank) with rsLoRA

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is in memory for it alone."""
        return self.A, self.B


class SharedBasis(Protocol):
    """Two bases of one module, which many adapters share: U [out, c] and V [in, c]. Told from others by identity."""

    @property
    def U(self) -> torch.Tensor: ...

    @property
    def V(self) -> torch.Tensor: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class SharedWeights:
    """One module's factors in compressed form: delta(x) = U b (a (V^T x))."""

    basis: SharedBasis
    a: torch.Tensor  # [rank, c]
    b: torch.Tensor  # [c, rank]
    scale: float = 1.0

    @property
    def A(self) -> torch.Tensor:
        """[rank, in], made here."""
        return self.a.float() @ self.basis.V.T

    @property
    def B(self) -> torch.Tensor:
        """[out, rank], made here."""
        return self.basis.U @ self.b.float()

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def core(self) -> LoRAWeights:
        """What stands between the bases."""
        return LoRAWeights(self.a, self.b, self.scale)

    @property
    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is in memory for it alone."""
        return self.a, self.b


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter, read and checked. ``modules`` maps the base's module names to factors."""

    path: Path
    modules: Mapping[str, LoRAWeights | SharedWeights]
    config: Mapping[str, Any]
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Weights of the base's own modules, which PEFT writes beside LoRA on an embedding or the head."""
    key: torch.Tensor | None = None
    """[questions, hidden] float32: what a keyed layer finds it by."""

    @property
    def ranks(self) -> list[int]:
        return sorted({weights.rank for weights in self.modules.values()})

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for weights in self.modules.values() for tensor in weights.kept)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for weights in self.modules.values() for tensor in weights.kept)

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Reads a local PEFT folder, or a Hub id where no such folder exists.

        Raises:
            AdapterNotFoundError: nothing is there.
            UnsupportedAdapterError: it uses DoRA, ``modules_to_save``, biases or another part that is not run.
            AdapterFormatError: damaged files, a pickle, ranks that contradict the config.
            NonFiniteError: NaN or infinite weights.
        """
        folder = _find(path)
        config = _read_config(folder)
        tensors = _read_tensors(folder)
        names = {key: key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in tensors}
        copies = {name: tensors.pop(key) for key, name in names.items() if name.endswith(_COPIED)}
        return cls(folder, _read_modules(folder, config, tensors), config, copies, read_key(folder))

    def check_fits(
        self,
        sizes: Mapping[str, tuple[int, int]],
        weight: Callable[[str], torch.Tensor | None],
        base_name: str = "this base",
    ) -> None:
        """Checks every module against the base.

        Args:
            sizes: (in, out) of its linear modules.
            weight: the base's weight of a given name, None where it has none.
            base_name: for messages.

        Raises:
            AdapterMismatchError: a module does not exist there or has another size.
            UnsupportedAdapterError: the adapter brings a weight of the base that differs from the base's own.
        """
        for name, copied in self.copies.items():
            own = weight(name)
            if own is None or own.shape != copied.shape or not torch.equal(copied.to(own), own):
                raise UnsupportedAdapterError(
                    f"The adapter at {self.path} brings its own {name}, which is not {base_name}'s: MoLoRA shares "
                    f"one frozen base and runs LoRA matrices only. Nothing was loaded."
                )
        for name, weights in self.modules.items():
            if name not in sizes:
                raise AdapterMismatchError(
                    f"The adapter at {self.path} adapts {name!r}, and {base_name} has no such linear module. "
                    f"It was trained for {self.config.get('base_model_name_or_path') or 'another base'}."
                )
            found = (weights.A.shape[1], weights.B.shape[0])
            if found != sizes[name]:
                raise AdapterMismatchError(
                    f"The adapter at {self.path} maps {found[0]} to {found[1]} features in {name!r}, and {base_name} "
                    f"needs {sizes[name][0]} to {sizes[name][1]}. It was trained for another base."
                )


def _find(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            return folder
    except OSError:  # a name that no file system takes
        pass
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and ".." not in str(path):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(path), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, KEY_FILE, "README.md"]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise AdapterNotFoundError(
                f"There is no adapter folder {path}, and the Hub could not bring {path} either ({error})."
            ) from error
    raise AdapterNotFoundError(f"There is no adapter folder {path}. Give a folder that holds {CONFIG_FILE}.")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise AdapterNotFoundError(f"{folder} holds no {CONFIG_FILE}: it is not a PEFT adapter.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterFormatError(f"{file} is not readable JSON ({error}).") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UnsupportedAdapterError(f"{file} has peft_type {kind!r}; MoLoRA runs LORA adapters.")
    parts = [key for key, value in config.items() if key not in _KNOWN_FIELDS and value]
    if config.get("bias", "none") != "none":
        parts.append(f"bias={config['bias']}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        parts.append(f"init_lora_weights={init} (it changes the base itself: convert it to plain LoRA with PEFT)")
    if parts:
        raise UnsupportedAdapterError(
            f"The adapter at {folder} uses {', '.join(sorted(parts))}, which MoLoRA does not run. Nothing was loaded."
        )
    return config


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule for ``rank_pattern`` and ``alpha_pattern``: the first key that matches the end of the name."""
    if not isinstance(patterns or {}, Mapping):
        raise AdapterFormatError(f"rank_pattern and alpha_pattern map module names to numbers, not {patterns!r}.")
    for key, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise AdapterFormatError(f"{key!r} in rank_pattern or alpha_pattern is no pattern ({error}).") from error
    return default


def _read_modules(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, LoRAWeights]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_([AB])\.weight", key)
        if match is None or tensor.dim() != 2:
            strange.append(key)
        else:
            halves.setdefault(match[1], {})[match[2]] = tensor
    if strange:
        raise UnsupportedAdapterError(
            f"{folder / WEIGHTS_FILE} holds {', '.join(sorted(strange)[:3])}"
            f"{' and more' if len(strange) > 3 else ''}: MoLoRA runs LoRA matrices of linear modules only."
        )
    return {module: _pair(folder, module, pair, config) for module, pair in halves.items()}


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise AdapterFormatError(
            f"{folder} holds no {WEIGHTS_FILE}."
            + (" Its adapter_model.bin is a pickle, which is never read: save it again with PEFT." if pickled else "")
        )
    try:
        with safe_open(file, framework="pt") as source:
            tensors = {key: source.get_tensor(key) for key in source.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterFormatError(f"{file} is damaged or not safetensors ({error}).") from error
    if not tensors:
        raise AdapterFormatError(f"{file} holds no tensors.")
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise AdapterFormatError(
                f"{file}: {key} has dtype {tensor.dtype}; LoRA weights are floating point, of 16 bits or more."
            )
        if not _finite(tensor):
            raise NonFiniteError(f"{file}: {key} holds NaN or infinite values. Nothing was loaded.")
    return tensors


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are. A sum of finite ones may be too large; that of others is never finite, and fast."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def _pair(folder: Path, module: str, pair: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> LoRAWeights:
    if set(pair) != {"A", "B"}:
        missing = "B" if "A" in pair else "A"
        raise AdapterFormatError(f"{folder / WEIGHTS_FILE} has no lora_{missing} for {module!r}.")
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    A, B = pair["A"], pair["B"]
    if isinstance(alpha, float) and not math.isfinite(alpha):
        raise NonFiniteError(f"{folder / CONFIG_FILE} gives {module!r} an alpha of {alpha}. Nothing was loaded.")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise AdapterFormatError(f"{folder / CONFIG_FILE} gives {module!r} rank {rank!r} and alpha {alpha!r}.")
    if A.shape[0] != rank or B.shape[1] != rank:
        raise AdapterFormatError(
            f"{folder}: {module!r} has factors of rank {A.shape[0]} and {B.shape[1]}, its config says {rank}."
        )
    return LoRAWeights(A, B, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def total_bytes(adapters: Iterable[Adapter]) -> int:
    """Bytes of all factors as stored."""
    return sum(t.numel() * t.element_size() for a in adapters for w in a.modules.values() for t in w.kept)
