"""Under Triton's interpreter a kernel may only touch what it was given: elsewhere it is an error here, and on a GPU
sometimes one, sometimes a wrong number."""

from typing import Any

import numpy as np
import torch
import triton.runtime.interpreter as interpreter


class OutOfBounds(BaseException):
    """Not one of those for which a kernel is given up and torch does its work."""


_given: list[tuple[int, int]] = []  # addresses of the kernel's tensors: from the first element to behind the last
_kernel = [""]


def watch() -> None:
    """From now on, in this process."""
    executor: Any = interpreter.GridExecutor
    builder: Any = interpreter.InterpreterBuilder
    take, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def taken(self: Any, args: Any, kwargs: Any) -> Any:
        hosts, keywords = take(self, args, kwargs)
        tensors = [one for one in (*hosts, *keywords.values()) if isinstance(one, torch.Tensor) and one.numel()]
        _given[:] = [(one.data_ptr(), one.data_ptr() + one.element_size() * _span(one)) for one in tensors]
        _kernel[0] = self.fn.__name__
        return hosts, keywords

    def checked_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        _check(pointers, mask)
        return load(self, pointers, mask, *more)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        _check(pointers, mask)
        return store(self, pointers, value, mask, *more)

    executor._init_args_hst = taken
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store


def _span(tensor: torch.Tensor) -> int:
    """Elements from its first to its last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _check(pointers: Any, mask: Any) -> None:
    at = np.asarray(pointers.data)
    at = at[np.broadcast_to(np.asarray(mask.data), at.shape).astype(bool)].astype(np.int64)
    if not at.size:
        return
    size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
    first, last = int(at.min()), int(at.max()) + size
    if any(low <= first and last <= high for low, high in _given):  # nearly always all lie in one tensor
        return
    inside = np.zeros(at.shape, bool)
    for low, high in _given:
        inside |= (at >= low) & (at + size <= high)
    if not inside.all():
        raise OutOfBounds(f"{_kernel[0]} touches {int((~inside).sum())} elements that it was not given.")
