"""The kernels compile for the GPUs that are promised, whatever machine this is."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_kernel_compiles_for_every_target(tmp_path: Path) -> None:
    # In a process of its own: here the kernels may have been imported for the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # which only a profiler reads, and which takes time
    command = [sys.executable, "-m", "tests.kernels.compile_targets"]
    done = subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 18 * (1 + 1 + 3 + 1) + 4 * 15 and all(int(line.split()[-2]) > 1000 for line in lines)
