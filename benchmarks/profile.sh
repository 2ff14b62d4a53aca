#!/usr/bin/env bash
# Nsight Compute's figures of each kernel of one layer: a decode step at batch 1 and 64, and a prompt of 2,048 tokens.
#   benchmarks/profile.sh [OUT]   OUT: folder of the CSV files and of ncu.md (default: runs/gpu)
# Clocks are left alone. Needs ncu and its right to read the counters.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
mkdir -p "$out"
export PYTHONPATH=".:kernels:training:demo${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
command -v ncu >/dev/null || { echo "ncu (Nsight Compute) is not installed." >&2; exit 1; }
metrics=$(python3 -m benchmarks.one_launch metrics)
files=()
measure() {
    local file="$out/ncu-$1.csv"
    shift
    rm -f "$file"
    # Only the run between cudaProfilerStart and cudaProfilerStop; units are ns and bytes.
    ncu --clock-control none --profile-from-start off --csv --page raw --print-units base --metrics "$metrics" \
        --log-file "$file" python3 -m benchmarks.one_launch "$@" ||
        { cat "$file" >&2; echo "ncu could not measure: $*" >&2; exit 1; }
    files+=("$file")
}
measure decode-1 decode --batch 1
measure decode-64 decode --batch 64
measure prompt-2048 prompt --tokens 2048
measure prompt-2048-modules prompt --tokens 2048 --modules
python3 -m benchmarks.one_launch table "${files[@]}" | tee "$out/ncu.md"
