#!/usr/bin/env bash
# What an adapter of one's own brings, on people that nothing was trained on: trains the task's adapter, a pool of pieces
# and a network for profiles on the others, and measures. Sets are done side by side. Goes on where it was.
# The data has to be there: molora train people raters presidents; molora train data science
#   benchmarks/people.sh [OUT] [SET...]   OUT: folder of the results (default: runs/results)
#                                         SET: raters, presidents (default: both)
# What is trained goes to runs/people of the folder in which it is started. OUT/log says how it goes.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/kernels:$root/training:$root/demo${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
out=${1:-runs/results}
shift || true
sets=("${@:-raters presidents}")
mkdir -p "$out/log"
molora() { python3 -m molora "$@"; }
data=$(python3 -c "from molora_training.data import data_dir; print(data_dir())")

measure() {
    local set=$1 here=runs/people/$1 configs=$(realpath --relative-to=. "$root/training/molora_training/configs")
    set -e
    mkdir -p "$here"
    [ -f "$here/task/metrics.json" ] || molora train adapter --config "$configs/task.yaml" "out=$here/task" \
        "data.train=$data/task-$set.train.jsonl" "data.validation=$data/task-$set.validation.jsonl"
    [ -f "$here/pieces/metrics.json" ] || molora train pieces --config "$configs/pieces.yaml" "people=$set" \
        "task=$here/task" "out=$here/pieces"
    [ -f "$here/net/metrics.json" ] || molora train hypernet profile "$set" --config "$configs/profile-net.yaml" \
        "out=$here/net"
    molora eval people --config "$configs/people-$set.yaml" "pool=$here/pieces" "net=$here/net" "task=$here/task" \
        --out "$out/people-$set.json"
}
for set in ${sets[*]}; do
    (measure "$set") >"$out/log/people-$set.txt" 2>&1 &
done
wait
for set in ${sets[*]}; do
    [ -f "$out/people-$set.json" ] || { echo "$set failed: see $out/log/people-$set.txt" >&2; exit 1; }
done
