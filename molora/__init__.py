"""MoLoRA: a runtime for mixtures of LoRA adapters, routed by token."""

from molora._version import __version__
from molora.adapter import Adapter
from molora.layer import MoLoRALinear
from molora.model import MoLoRAModel
from molora.outputs import MoLoRAOutput, Routes, StreamedToken
from molora.plan import RoutingPlan
from molora.router import Router, RouterConfig, VocabularyRouter
from molora.selection import Selection
from molora.stack import Stack, StackLayer

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
