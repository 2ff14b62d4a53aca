"""ncu's CSV becomes a table kernel by kernel; metrics are asked for by the names that ncu knows."""

import pytest

from benchmarks.one_launch import ACTIVE, ALWAYS, BYTES, L2, MEMORY, TIME, WARPS, metrics, read, table

CORES = "sm__pipe_tensor_cycles_active" + ACTIVE
HEAD = ["ID", "Process ID", "Kernel Name", "Block Size", "Grid Size", BYTES, MEMORY, TIME, L2, WARPS, CORES]
UNITS = ["", "", "", "", "", "byte", "%", "ns", "%", "%", "%"]
LINEAR = ["0", "7", "_linear_kernel", "(128, 1, 1)", "(132, 1, 1)", "16,000,000", "80.5", "5,000", "40", "51.26", "0"]
NORM = ["1", "7", "void at::native::norm<float>(int, float *)", "(64, 1, 1)", "(1, 1, 1)", "n/a", "n/a", "1000", "1",
        "2", "n/a"]  # fmt: skip


def as_csv(*rows: list[str]) -> list[str]:
    return [",".join(f'"{cell}"' for cell in row) for row in rows]


def test_each_kernel_has_its_line_in_order() -> None:
    around = ["==PROF== Connected to process 7 (python3)", "decode ran on a GPU"]
    lines = table(read([around[0], *as_csv(HEAD, UNITS, LINEAR, NORM), around[1]]))
    assert lines[2] == (
        "| `_linear_kernel` | (132, 1, 1) | (128, 1, 1) | 5.00 | 16.00 | 3200 | 80.5 | 40.0 | 51.3 | 0.0 |"
    )
    assert lines[3] == (
        "| `void at::native::norm<float>` | (1, 1, 1) | (64, 1, 1) | 1.00 | 0.00 |  |  | 1.0 | 2.0 |  |"
    )
    assert lines[4].startswith("| 2 kernels | | | 6.00 | 16.00 | 2667 |")
    assert lines[-1] == f"tensor %: {CORES}"


def test_a_file_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel was measured"):
        read(["==ERROR== ERR_NVGPUCTRPERM"])


def test_metrics_that_ncu_does_not_know_are_not_asked_for() -> None:
    plain = {name.partition(".")[0] for name in ALWAYS}
    assert metrics(None) == [*ALWAYS, CORES]
    assert metrics(plain | {"sm__pipe_tensor_cycles_active", "sm__inst_executed_pipe_tensor"}) == [*ALWAYS, CORES]
    both = ["sm__inst_executed_pipe_tensor_op_hmma", "sm__inst_executed_pipe_tensor_op_gmma"]
    assert metrics(plain | set(both)) == [*ALWAYS, *(name + ACTIVE for name in both)]
    assert metrics(plain - {"lts__throughput"}) == [name for name in ALWAYS if name != L2]
