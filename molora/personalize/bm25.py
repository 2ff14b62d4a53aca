"""Brings `bm25s` without JAX, which it would start to sort a few numbers, and which takes most of a GPU's memory."""

import sys
from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def bm25s(part: str = "bm25s") -> ModuleType:
    """The package, or a module of it by its full name. A JAX that is in use already stays in use.

    Raises:
        ImportError: bm25s is not installed.
    """
    if "jax" in sys.modules:
        return import_module(part)
    sys.modules["jax"] = None  # type: ignore[assignment]  # `import jax` is an ImportError, which bm25s provides for
    try:
        return import_module(part)
    finally:
        del sys.modules["jax"]
