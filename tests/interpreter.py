"""Triton's interpreter without the work that it does again and again: the same numbers in a fraction of the time."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def hurry() -> None:
    """From now on, in this process."""
    triton: Any = interpreter
    patch, dtype_of = triton._patch_lang, triton._get_np_dtype
    ours: list[Any] = []

    def patch_once(_: Any) -> Any:  # Triton's patches the language for each call of a function in a kernel
        if not ours:
            ours.append(patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core})))
        return SimpleNamespace(restore=lambda: None)

    by_name: dict[str, Any] = {}

    def looked_up(dtype: Any) -> Any:  # Triton's makes a dictionary of all of them for each look
        scalar = dtype.scalar
        if scalar.name not in by_name:
            by_name[scalar.name] = dtype_of(scalar)
        return by_name[scalar.name]

    triton._patch_lang, triton._get_np_dtype = patch_once, looked_up
    # Without debug nothing looks at what it works out about overflows.
    builder = triton.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    triton.ScanOps.generic_scan = _by_slices
    _know_shapes()


def _know_shapes() -> None:
    """What Triton works out for the type of each tensor, once for each shape."""
    tensor, block = cast(Any, tl.tensor), cast(Any, tl.block_type)
    make_tensor, make_type = tensor.__init__, block.__init__
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    of_types: dict[tuple[int, ...], tuple[Any, int]] = {}

    def new_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in of_tensors:
            make_tensor(self, handle, type)
            of_tensors[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors[sizes]

    def new_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        if sizes not in of_types:
            make_type(self, element_ty, shape)
            of_types[sizes] = self.shape, self.numel
        self.element_ty, self.name = element_ty, f"<{sizes}, {element_ty}>"
        self.shape, self.numel = of_types[sizes]

    tensor.__init__, block.__init__ = new_tensor, new_type


def _by_slices(self: Any, inputs: Any) -> list[Any]:
    """A scan with a function of ours, of tensors of any shape: one slice at a time, rather than one element."""
    lines = [np.moveaxis(one.handle.data, self.axis, 0) for one in inputs]
    found = [line.copy() for line in lines]
    for i in range(1, len(lines[0])):
        before, here = (
            [self.to_tensor(line[at], one.dtype) for line, one in zip(of, inputs, strict=True)]
            for of, at in ((found, i - 1), (lines, i))
        )
        for line, after in zip(found, self.combine_fn.fn(*before, *here), strict=True):
            line[i] = after.handle.data
    return [self.to_tensor(np.moveaxis(line, 0, self.axis), one.dtype) for line, one in zip(found, inputs, strict=True)]
