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
    tests/unit/test_generation.py tests/unit/test_live_stack.py tests/unit/test_streaming.py tests/training/test_on_stack.py \
    tests/training/test_plum.py::TestLearner::test_captured_steps_learn_the_same \
    tests/training/test_plum.py::TestLearner::test_a_batch_is_filled_up_with_what_counts_for_nothing \
    tests/serve/test_engine.py tests/serve/test_row_steps.py tests/serve/test_prefixes.py tests/serve/test_pool.py
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -m benchmarks.sanitize
    done
fi
# The rest of a table is worth having when one of them fails, and the script then fails at its end.
failed=()
measure() { python3 -m "benchmarks.$@" || failed+=("$1"); }
measure step --adapters 8 64 1024 --top 1 2 --peer --out "$out/step.json"
measure step --shape 8B --adapters 8 --out "$out/step-8b.json"
measure prefill --adapters 2 4 8 16 32 64 1024 --top 1 --out "$out/prefill.json"
measure prefill --adapters 8 --top 1 --popularity zipf identical --out "$out/prefill-skew.json"
measure prefill --adapters 8 64 --top 2 --out "$out/prefill-top2.json"
measure prefill --shape 8B --adapters 8 64 --top 1 --out "$out/prefill-8b.json"
for rank in 8 64; do
    measure step --adapters 8 --rank "$rank" --out "$out/step-rank$rank.json"
    measure prefill --adapters 8 64 --top 1 --rank "$rank" --out "$out/prefill-rank$rank.json"
done
measure train --out "$out/train.json"
measure peers --out "$out/peers.json"
measure kernels --out "$out/kernels.csv"
if [ -n "${MOLORA_SMOLLM:-}" ]; then # a folder of the base; the tokens to compare with are those of this machine's CPU
    CUDA_VISIBLE_DEVICES= measure smollm --base "$MOLORA_SMOLLM" --reference "$out/smollm-cpu.json"
    measure smollm --base "$MOLORA_SMOLLM" --compare "$out/smollm-cpu.json" --out "$out/smollm.json"
fi
measure following
measure chats --chats 8 --out "$out/chats.json"
measure serving --out "$out/serving.json"
measure compressed_pace --out "$out/compressed-pace.json"
python3 -m benchmarks.results "$out" --out "$out/results.json"
[ ${#failed[@]} -eq 0 ] || { echo "did not run: ${failed[*]}" >&2; exit 1; }
