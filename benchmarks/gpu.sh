#!/usr/bin/env bash
# Checks on a GPU what must hold there, then measures, then prints a short table. Nothing is measured on red.
#   benchmarks/gpu.sh [OUT]   OUT: folder of the results (default: runs/gpu)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
mkdir -p "$out"
export PYTHONPATH=".:kernels:training:demo${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python3 -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'No GPU is here.')"
MOLORA_TEST_DEVICE=cuda python3 -m pytest -p no:cacheprovider tests/kernels tests/parity \
    tests/unit/test_generation.py tests/unit/test_live_stack.py tests/unit/test_streaming.py
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -m benchmarks.sanitize
    done
fi
python3 -m benchmarks.step --adapters 8 64 1024 --top 1 2 --peer --out "$out/step.json"
python3 -m benchmarks.prefill --adapters 2 8 64 1024 --top 1 2 --popularity uniform --out "$out/prefill.json"
python3 -m benchmarks.kernels --out "$out/kernels.csv"
python3 -m benchmarks.results "$out" --out "$out/kernels.json"
