"""MoLoRA: a runtime for mixtures of LoRA adapters, routed by token."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from molora._version import __version__

if TYPE_CHECKING:
    from molora.adapter import Adapter
    from molora.layer import MoLoRALinear
    from molora.model import MoLoRAModel
    from molora.outputs import MoLoRAOutput, Routes, StreamedToken
    from molora.plan import RoutingPlan
    from molora.router import Router, RouterConfig
    from molora.selection import Selection
    from molora.stack import Stack, StackLayer
    from molora.vocabulary import VocabularyRouter

# Imported when first asked for: torch and transformers take seconds, and `molora --help` needs neither.
_PLACES = {
    "Adapter": "adapter",
    "MoLoRALinear": "layer",
    "MoLoRAModel": "model",
    "MoLoRAOutput": "outputs",
    "Router": "router",
    "RouterConfig": "router",
    "Routes": "outputs",
    "RoutingPlan": "plan",
    "Selection": "selection",
    "Stack": "stack",
    "StackLayer": "stack",
    "StreamedToken": "outputs",
    "VocabularyRouter": "vocabulary",
}

__all__ = [
    "Adapter",
    "MoLoRALinear",
    "MoLoRAModel",
    "MoLoRAOutput",
    "Router",
    "RouterConfig",
    "Routes",
    "RoutingPlan",
    "Selection",
    "Stack",
    "StackLayer",
    "StreamedToken",
    "VocabularyRouter",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'molora' has no attribute {name!r}")
    value = getattr(import_module(f"molora.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
