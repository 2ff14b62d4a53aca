#!/usr/bin/env bash
# The two studies of change over time (docs/updates.md), shared by many processes on every GPU of this machine. Goes on where
# it was: what is finished lies in OUT/.continual and OUT/.stream, and what a GPU had no room for is tried again. The data has
# to be there: molora train data math code medicine law science reading commonsense puzzles many
#   benchmarks/continual.sh [OUT] [EACH]   OUT: folder of the results (default: runs/results)
#                                          EACH: processes on each GPU (default: 8; one takes up to 16 GB)
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/kernels:$root/training:$root/demo${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
out=${1:-runs/results} each=${2:-8}
mkdir -p "$out/log" "$out/.continual" "$out/.stream"
cp -n "$root"/docs/results/parts/continual/*.json "$out/.continual/" 2>/dev/null
gpus=$(python3 -c "import torch; print(torch.cuda.device_count())")
[ "$gpus" -gt 0 ] || { echo "No GPU is here." >&2; exit 1; }
tasks="math code medicine law science reading commonsense puzzles"
users=$(cd "${MOLORA_DATA:-$(python3 -c 'from molora_training.data import data_dir; print(data_dir())')}" &&
    wc -l speech-*.train.jsonl | awk '$1 >= 200 && $2 != "total" {sub(".train.jsonl", "", $2); print $2}')
count=$(python3 -c "
from pathlib import Path
from molora_training.continual.study import StudySettings, sequences
print(len(list(sequences(StudySettings(('a', 'b'), Path())))))")
# Without it processes of one GPU take turns; with it their kernels run side by side.
if command -v nvidia-cuda-mps-control >/dev/null; then
    export CUDA_MPS_PIPE_DIRECTORY=$out/mps CUDA_MPS_LOG_DIRECTORY=$out/mps
    mkdir -p "$out/mps"
    nvidia-cuda-mps-control -d && trap 'echo quit | nvidia-cuda-mps-control' EXIT
fi
jobs=$out/jobs
{
    for one in $(seq 0 $(($(wc -w <<<"$users") - 1))); do echo "stream $one"; done
    for one in $(seq 0 $((count - 1))); do echo "continual $one"; done
} >"$jobs"
echo 0 >"$out/next"
began=$SECONDS

next() { # the line after the last one that was taken
    flock 9
    local at=$(($(cat "$out/next") + 1))
    echo "$at" >"$out/next"
    sed -n "${at}p" "$jobs"
} 9>"$out/lock"

study() { # KIND SHARE
    case $1 in
        stream) python3 -m molora eval stream $users --general science --share "$2" --out "$out/stream.json" ;;
        continual) python3 -m molora eval continual $tasks --share "$2" --out "$out/continual.json" ;;
    esac
}

worker() { # GPU
    export CUDA_VISIBLE_DEVICES=$1
    local kind index tries of started
    while [ ! -e "$out/stop" ]; do
        read -r kind index tries <<<"$(next)"
        [ -n "${kind:-}" ] || break
        [ "$kind" = stream ] && of=$(wc -w <<<"$users") || of=$count
        started=$SECONDS
        if study "$kind" "$index/$of" >"$out/log/$kind-$index.txt" 2>&1; then
            echo "$((SECONDS - began)) s $kind $index: $((SECONDS - started)) s" >>"$out/progress.txt"
        else
            echo "$((SECONDS - began)) s $kind $index FAILED" >>"$out/progress.txt"
            [ "${tries:-0}" -ge 3 ] || echo "$kind $index $((${tries:-0} + 1))" >>"$jobs"
        fi
    done
}

for number in $(seq 1 "$each"); do
    for gpu in $(seq 0 $((gpus - 1))); do
        worker "$gpu" &
        sleep 0.3
    done
done
wait
for kind in stream continual; do
    CUDA_VISIBLE_DEVICES=0 study "$kind" 0/1 >"$out/log/$kind.txt" 2>&1 || echo "$kind: see $out/log/$kind.txt" >&2
done
[ -e "$out/stream.json" ] && [ -e "$out/continual.json" ]
