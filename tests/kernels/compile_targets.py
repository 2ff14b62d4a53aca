"""Compiles every kernel for GPUs that are not here; prints a line for each. Run without TRITON_INTERPRET.

python -m tests.kernels.compile_targets
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from molora_kernels import expand, outer, shrink
from molora_kernels.pages import PAGE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # Ampere
    "sm_89": GPUTarget("cuda", 89, 32),  # Ada
    "sm_90": GPUTarget("cuda", 90, 32),  # Hopper
    "gfx942": GPUTarget("hip", "gfx942", 64),  # AMD CDNA 3
}
SHAPE = {"TOP": 2, "SLICES": 3, "MAX_PAGES": 4, "SPLIT": 2, "PAGE": PAGE}
KERNELS = {
    shrink._shrink_token_kernel: {"BLOCK_D": 256},
    shrink._shrink_block_kernel: {"BLOCK_T": 64, "BLOCK_D": 64, "UPCAST": False},
    expand._expand_token_kernel: {"BLOCK_O": 256},
    expand._expand_block_kernel: {"BLOCK_T": 64, "BLOCK_O": 128, "UPCAST": False},
    outer._outer_kernel: {"BLOCK_T": 64, "BLOCK_D": 128, "UPCAST": False},
}
POINTERS = {
    "h_ptr": "fp32", "weights_ptr": "fp32", "slots_ptr": "i64", "order_ptr": "i64",
    "u_ptr": "fp32", "pairs_ptr": "i64", "starts_ptr": "i64",
    "first_ptr": "i32", "count_ptr": "i32", "columns_ptr": "i32",
}  # fmt: skip


def main() -> None:
    for target_name, target in TARGETS.items():
        for kernel, own in KERNELS.items():
            for dtype in ("bf16", "fp16", "fp32"):
                constants = {name: value for name, value in {**SHAPE, **own}.items() if name in kernel.arg_names}
                signature = {name: _kind(name, constants, dtype) for name in kernel.arg_names}
                source = ASTSource(kernel, signature=signature, constexprs=constants)
                compiled = triton.compile(source, target=target, options={"num_warps": 4})
                binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
                print(f"{target_name} {kernel.fn.__name__} {dtype} {len(binary)} bytes", flush=True)


def _kind(name: str, constants: dict[str, object], dtype: str) -> str:
    if name in constants:
        return "constexpr"
    return f"*{POINTERS.get(name, dtype)}" if name.endswith("_ptr") else "i32"


if __name__ == "__main__":
    main()
