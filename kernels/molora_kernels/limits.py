"""What a GPU has room for: tiles were measured on one kind of it, in half precision; and what compiles nothing."""

from functools import cache

import torch
import triton

# Arguments of kernels that follow a prompt's length: another length, or one that 16 divides, compiles nothing.
COUNTS = ["tokens", "pairs", "each", "most", "chunks", "real_n", "real_t"]
SPARE = 8 << 10  # bytes of shared memory for what is no operand


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that the operands of one program may have."""
    if device.type != "cuda":
        return 1 << 16
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"] - SPARE


def fitting_block(block: int, bytes_each: int, device: torch.device) -> int:
    """``block`` elements of ``bytes_each`` bytes in all stages, or so many halvings of it that they fit."""
    while block > 16 and block * bytes_each > shared_memory(device):
        block //= 2
    return block


def fitting_stages(stages: int, bytes_each: int, device: torch.device) -> int:
    """``stages`` of a pipeline, all but one of which hold ``bytes_each`` bytes, or as many as fit."""
    while stages > 2 and (stages - 1) * bytes_each > shared_memory(device):
        stages -= 1
    return stages
