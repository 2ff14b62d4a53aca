"""Compiles every kernel for GPUs that are not here; prints a line for each. Run without TRITON_INTERPRET.

python -m tests.kernels.compile_targets
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from molora_kernels import (
    affine,
    attention,
    averages,
    blocks,
    cores,
    epilogue_block,
    epilogue_token,
    expand,
    gated,
    gates,
    linear,
    outer,
    route,
    shrink,
    sort,
)
from molora_kernels.pages import PAGE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # Ampere
    "sm_89": GPUTarget("cuda", 89, 32),  # Ada
    "sm_90": GPUTarget("cuda", 90, 32),  # Hopper
    "gfx942": GPUTarget("hip", "gfx942", 64),  # AMD CDNA 3
}
DTYPES = {"sm_80": ("bf16",), "sm_89": ("bf16",), "sm_90": ("bf16", "fp16", "fp32"), "gfx942": ("bf16",)}
SHAPE = {"TOP": 2, "SLICES": 3, "MAX_PAGES": 1, "SPLIT": 1, "PAGE": PAGE, "CUTS": 2, "ADAPTED": True, "ALIGN": 16}
SHAPE |= {"TOPS": 2, "FIRST": 1, "CORE": 16, "PARTS": 16, "UPCAST": False}
BLOCKS = {
    "HOT": False,
    "AT_ONCE": 1,
    "PAGES": 4,
    "LIST": 64,
    "BLOCK_T": 64,
    "BLOCK_O": 64,
    "ORDERED": True,
    "SPLIT_Y": 1,
}
PRODUCT = {"AHEAD": 4, "SHRINK_FIRST": True, "BY_SLOT": True, "SHRINK_K": 128, "LIST_T": 64, "BLOCK_D": 1024}
PRODUCT |= {"LISTED": 64, "BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_T": 16, "EVEN": True}
HEADS = {"HALF": 64, "BLOCK": 64, "NORM": True, "BIAS": True}
PARTS = {"GROUP": 3, "BLOCK_G": 16, "WIDTH": 64, "BLOCK_W": 64, "BLOCK_T": 64, "PARTS": 4}
KERNELS = {
    blocks._blocks_kernel: {"TOPS": 2, "BLOCK": 64, "ORDERED": True},
    sort._order_kernel: {"COLUMNS": 2, "BITS": 20, "BLOCK_T": 16, "BLOCK_J": 1024},
    shrink._shrink_token_kernel: {"BLOCK_D": 256},
    shrink._shrink_block_kernel: {"BLOCK_T": 16, "BLOCK_D": 64, "BLOCK_R": 64, "AT_ONCE": 2},
    expand._expand_token_kernel: {"BLOCK_O": 256},
    expand._expand_block_kernel: {**BLOCKS, "BLOCK_O": 128},
    gated._gated_shrink_kernel: {"BLOCK_T": 16, "BLOCK_D": 256, "BLOCK_R": 16},
    gated._gated_expand_kernel: {"BLOCK_T": 16, "BLOCK_O": 64, "BLOCK_R": 16, "ADD": True},
    gated._open_gates_kernel: {"BLOCK_R": 128},
    gated._route_gates_kernel: {"BLOCK_R": 128},
    cores._core_kernel: {"BLOCK": 32},
    outer._outer_kernel: {"BLOCK_T": 64, "BLOCK_D": 128},
    linear._linear_kernel: {**PRODUCT, "DOT": True},
    epilogue_token._norm_kernel: {"BLOCK": 2048},
    epilogue_token._add_kernel: {"BLOCK": 128, "NORM": True},
    epilogue_token._heads_kernel: HEADS,
    epilogue_token._gate_kernel: {"BLOCK": 128},
    epilogue_block._add_kernel: {**BLOCKS, "BLOCK_O": 128, "NORM": True},
    epilogue_block._heads_kernel: {**BLOCKS, **HEADS},
    epilogue_block._gate_kernel: BLOCKS,
    attention._part_kernel: PARTS,
    attention._join_kernel: {"WIDTH": 64, "BLOCK_W": 64, "PARTS": 4},
    averages._ends_kernel: {"DECAYS": 2, "CHUNK": 32, "BLOCK_W": 32},
    averages._averages_kernel: {"DECAYS": 2, "CHUNK": 32, "BLOCK_C": 64, "BLOCK_W": 32},
    route._remember_kernel: {"DECAYS": 2, "BLOCK_W": 128},
    affine._affine_kernel: {"SILU": True, "BLOCK_O": 64, "BLOCK_D": 32, "BLOCK_T": 64},
    gates._places_kernel: {"BLOCK_T": 1024},
    gates._chunks_kernel: {"REACH": 4, "CHUNK": 64, "BLOCK_W": 64, "BLOCK_U": 32},
    gates._carry_kernel: {"REACH": 4, "CHUNK": 64, "BLOCK_C": 64, "BLOCK_W": 128, "BLOCK_U": 32},
    gates._see_kernel: {"REACH": 4, "BLOCK_W": 128},
    gates._open_kernel: {"BLOCK_U": 16, "BLOCK_D": 64, "BLOCK_B": 128, "BLOCK_T": 16},
    route._choose_kernel: {"LAYERS": 3, "MOST": 4, "SOFTMAX": True, "BLOCK_C": 64},
}
ROUTE = {  # of integers and float32 alone
    blocks._blocks_kernel,
    sort._order_kernel,
    averages._ends_kernel,
    averages._averages_kernel,
    route._remember_kernel,
    affine._affine_kernel,
    gated._open_gates_kernel,
    gated._route_gates_kernel,
    gates._places_kernel,
    gates._chunks_kernel,
    gates._carry_kernel,
    gates._see_kernel,
    gates._open_kernel,
    route._choose_kernel,
}
POINTERS = {
    **dict.fromkeys(["order_ptr", "pairs_ptr", "starts_ptr", "ids_ptr"], "i64"),
    **dict.fromkeys(["slots_ptr", "lists_ptr", "counts_ptr"], "i32"),
    **dict.fromkeys(["first_ptr", "count_ptr", "core_first_ptr", "core_count_ptr"], "i32"),
    **dict.fromkeys(["places_ptr", "columns_ptr", "rows_ptr", "slots_of_ptr", "firsts_ptr"], "i32"),
    **dict.fromkeys(["forced_ptr"], "i32"),
    **dict.fromkeys(["real_ptr", "allowed_ptr", "routed_ptr"], "i1"),
    **dict.fromkeys(["h_ptr", "weights_ptr", "u_ptr", "parts_ptr", "best_ptr", "total_ptr"], "fp32"),
    "squares_ptr": "fp32",
    **dict.fromkeys(["positions_ptr", "length_ptr", "acts_ptr", "at_ptr", "owners_ptr"], "i64"),
    "mask_ptr": "i1",
}


WIDE = {"TOP": 11, "TOPS": 16}  # a merge of nine adapters, and two layers beside


def main() -> None:
    for target_name, target in TARGETS.items():
        for kernel, own in [*KERNELS.items(), (blocks._blocks_kernel, KERNELS[blocks._blocks_kernel] | WIDE)]:
            for dtype in ("fp32",) if kernel in ROUTE else DTYPES[target_name]:
                pdl = target.backend == "cuda" and target.arch >= 90  # programmatic dependent launch
                precision = "tf32x3" if target.backend == "cuda" else "ieee"
                given = {**SHAPE, **own, "PDL": pdl, "PRECISION": precision}
                if dtype == "fp32" and "LIST" in own:  # of epilogues by block
                    given["BLOCK_T"] = 16
                constants = {name: value for name, value in given.items() if name in kernel.arg_names}
                signature = {name: _kind(name, constants, dtype) for name in kernel.arg_names}
                # As at a launch with the usual sizes: what 16 divides is loaded together.
                attributes = {
                    (index,): [["tt.divisibility", 16]]
                    for index, kind in enumerate(signature.values())
                    if kind not in ("constexpr", "fp32")
                }
                source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
                compiled = triton.compile(source, target=target, options={"num_warps": 4})
                binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
                print(f"{target_name} {kernel.fn.__name__} {dtype} {len(binary)} bytes", flush=True)


def _kind(name: str, constants: dict[str, object], dtype: str) -> str:
    if name in constants:
        return "constexpr"
    if name in ("eps", "scale", "scale_eps"):
        return "fp32"
    return f"*{POINTERS.get(name, dtype)}" if name.endswith("_ptr") else "i32"


if __name__ == "__main__":
    main()
