"""What is made while something runs, and was to be there before: each keeps whoever waits a good while longer."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Counts kernels that Triton compiles (by name), CUDA graphs that are captured, pieces of memory that the GPU is
    asked for, and passes of the garbage collector over all that is there."""
    found: Counter[str] = Counter()
    begin, before = torch.cuda.CUDAGraph.capture_begin, _asked()

    def captured(graph: Any, *args: Any, **kwargs: Any) -> Any:
        found["captured graphs"] += 1
        return begin(graph, *args, **kwargs)

    def collected(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            found["passes of the garbage collector"] += 1

    def compiled(*_: Any, **kwargs: Any) -> None:
        found[f"compiled {getattr(kwargs.get('fn'), 'name', 'kernel')}"] += 1

    hooks = _triton_hooks()
    kept = hooks.jit_post_compile_hook if hooks is not None else None
    gc.callbacks.append(collected)
    torch.cuda.CUDAGraph.capture_begin = captured  # type: ignore[method-assign]
    if hooks is not None:
        hooks.jit_post_compile_hook = compiled
    try:
        yield found
    finally:
        if hooks is not None:
            hooks.jit_post_compile_hook = kept
        torch.cuda.CUDAGraph.capture_begin = begin  # type: ignore[method-assign]
        gc.callbacks.remove(collected)
        if (asked := _asked() - before) > 0:
            found["pieces of memory"] = asked


def _triton_hooks() -> Any:
    if find_spec("triton") is None:
        return None
    from triton import knobs

    return knobs.runtime


def _asked() -> int:
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.memory_stats().get("num_device_alloc", 0))
