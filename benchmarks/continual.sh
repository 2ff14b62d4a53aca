#!/usr/bin/env bash
# The two studies of change over time (docs/updates.md), shared by many processes on every GPU of this machine. Goes on where
# it was: what is finished lies in OUT/.continual and OUT/.stream, and what a GPU had no room for is tried again with more.
# The data has to be there: molora train data math code medicine law science reading commonsense puzzles many
#   benchmarks/continual.sh [OUT] [EACH]   OUT: folder of the results (default: runs/results)
#                                          EACH: processes on each GPU (default: one for each 14 GiB of its memory)
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/kernels:$root/training:$root/demo${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
out=${1:-runs/results}
mkdir -p "$out/log" "$out/.continual" "$out/.stream"
read -r gpus room < <(python3 -c "
import torch
count = torch.cuda.device_count()
print(count, torch.cuda.get_device_properties(0).total_memory // 2**30 if count else 0)")
[ "$gpus" -gt 0 ] || { echo "No GPU is here." >&2; exit 1; }
each=${2:-$((room / 14))}
tasks="math code medicine law science reading commonsense puzzles"
users=$(cd "${MOLORA_DATA:-$(python3 -c 'from molora_training.data import data_dir; print(data_dir())')}" &&
    wc -l speech-*.train.jsonl | awk '$1 >= 200 && $2 != "total" {sub(".train.jsonl", "", $2); print $2}')
# Without it processes of one GPU take turns; with it their kernels run side by side.
if command -v nvidia-cuda-mps-control >/dev/null; then
    export CUDA_MPS_PIPE_DIRECTORY=$out/mps CUDA_MPS_LOG_DIRECTORY=$out/mps
    mkdir -p "$out/mps"
    nvidia-cuda-mps-control -d && trap 'echo quit | nvidia-cuda-mps-control' EXIT
fi
jobs=$out/jobs # lines of: KIND SHARE GIB, those that take longest first
python3 - "$out" $users >"$jobs" <<'PY'
import sys
from pathlib import Path

from molora_training.continual.study import StudySettings, part_names

LONG = ("elastic-replay", "distil-replay", "inflora", "elastic", "treelora", "smolora", "distil", "apart-by-key")
out, *users = sys.argv[1:]
names = part_names(StudySettings(("a", "b"), Path()))
for index, user in enumerate(users):
    if not Path(out, ".stream", f"{user}.json").is_file():
        print("stream", f"{index}/{len(users)}", 12)
missing = [n for n in range(len(names)) if not Path(out, ".continual", f"{names[n]}.json").is_file()]
rank = {n: next((at for at, start in enumerate(LONG) if names[n].startswith(start)), len(LONG)) for n in missing}
for n in sorted(missing, key=rank.get):
    print("continual", f"{n}/{len(names)}", 22 if "distil" in names[n] else 12)
PY
echo 0 >"$out/next"
began=$SECONDS

next() { # the line after the last one that was taken
    flock 9
    local at=$(($(cat "$out/next") + 1))
    echo "$at" >"$out/next"
    sed -n "${at}p" "$jobs"
} 9>"$out/lock"

study() { # KIND SHARE GIB: the allocator gives back what is free before it takes more of a GPU than that
    local arguments
    case $1 in
        stream) arguments="stream $users --general science" ;;
        continual) arguments="continual $tasks" ;;
    esac
    python3 -c "
import sys, torch
from molora.cli import main
torch.cuda.set_per_process_memory_fraction(min(1.0, int(sys.argv.pop(1)) * 2**30 / torch.cuda.get_device_properties(0).total_memory))
main()" "$3" eval $arguments --share "$2" --out "$out/$1.json"
}

worker() { # GPU
    export CUDA_VISIBLE_DEVICES=$1
    local kind share gib started
    while [ ! -e "$out/stop" ]; do
        read -r kind share gib <<<"$(next)"
        [ -n "${kind:-}" ] || break
        started=$SECONDS
        if study "$kind" "$share" "$gib" >"$out/log/$kind-${share%/*}.txt" 2>&1; then
            echo "$((SECONDS - began)) s $kind $share: $((SECONDS - started)) s" >>"$out/progress.txt"
        else
            echo "$((SECONDS - began)) s $kind $share in $gib GiB FAILED" >>"$out/progress.txt"
            [ "$gib" -ge 28 ] || echo "$kind $share $((gib + 4))" >>"$jobs"
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
    CUDA_VISIBLE_DEVICES=0 study "$kind" 0/1 28 >"$out/log/$kind.txt" 2>&1 || echo "$kind: see $out/log/$kind.txt" >&2
done
[ -e "$out/stream.json" ] && [ -e "$out/continual.json" ]
