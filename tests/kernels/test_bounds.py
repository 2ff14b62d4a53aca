"""The interpreter's bounds hold: without them a kernel that reads beside its tensor would go unnoticed here."""

import pytest
import torch
import triton
import triton.language as tl

from tests.bounds import OutOfBounds
from tests.conftest import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter's")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, first, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + first + i, tl.load(x_ptr + first + i, mask=i < count, other=0.0), mask=i < count)


def test_what_was_given_may_be_touched() -> None:
    x, y = torch.arange(8.0), torch.zeros(8)
    _copy_kernel[(1,)](x, y, 0, 8, BLOCK=16)
    assert torch.equal(x, y)
    _copy_kernel[(1,)](x[4:], y, 0, 4, BLOCK=16)
    assert y.tolist() == [4, 5, 6, 7, 4, 5, 6, 7]


@pytest.mark.parametrize(("size", "first", "count"), [(8, 0, 9), (8, -1, 4)], ids=["behind", "before"])
def test_nothing_else_may(size: int, first: int, count: int) -> None:
    whole = torch.zeros(3 * size)
    inside = whole[size : 2 * size]  # what lies beside it is memory, too, but was not given
    for x, y in ((inside, torch.zeros(size)), (torch.zeros(size), inside)):
        with pytest.raises(OutOfBounds, match="_copy_kernel touches 1 elements"):
            _copy_kernel[(1,)](x, y, first, count, BLOCK=16)


def test_an_expanded_tensor_is_as_large_as_its_memory() -> None:
    one = torch.ones(1).expand(4)
    with pytest.raises(OutOfBounds, match="touches 3 elements"):
        _copy_kernel[(1,)](one, torch.zeros(4), 0, 4, BLOCK=4)
