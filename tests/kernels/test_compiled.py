"""What kernels are compiled for: prompts of other lengths may bring no compilation while somebody waits."""

import os
import subprocess
import sys

# Without the interpreter, under which the other tests run; nothing is launched.
_LIST = """
import importlib, pkgutil
import molora_kernels
from molora_kernels.limits import COUNTS
from triton.runtime.jit import JITFunction

found = 0
for module in pkgutil.iter_modules(molora_kernels.__path__, "molora_kernels."):
    if module.name.endswith("megablocks"):
        continue
    for name, kernel in vars(importlib.import_module(module.name)).items():
        if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
            for param in kernel.params:
                if param.name in COUNTS:
                    found += 1
                    if not param.is_constexpr and not param.do_not_specialize:
                        print(module.name, name, param.name)
print("found", found)
"""
FIXED = {
    "linear _linear_kernel tokens",
    "linear _linear_kernel most",
}  # of a decode step, which is captured for its size


def test_no_kernel_is_compiled_for_the_length_of_a_prompt() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _LIST], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    *listed, count = run.stdout.splitlines()
    assert int(count.split()[1]) > 20
    assert {line.removeprefix("molora_kernels.") for line in listed} == FIXED
