#!/usr/bin/env bash
# Trains from nothing and measures all that docs/evaluation.md says of routing by token, on every GPU of this machine. Goes
# on where it was. The data has to be there: molora train data math code medicine law ukrainian science reading commonsense
# puzzles both many
#   benchmarks/quality.sh [OUT] [OTHER]   OUT: folder of the results (default: runs/results)
#                                         OTHER: folder of a larger model for `molora eval headline`
# What is trained goes to runs/ of the folder in which it is started. OUT/progress.txt says what is done, OUT/log how.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/kernels:$root/training:$root/demo${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
out=${1:-runs/results} other=${2:-}
mkdir -p "$out/log"
configs=$(realpath --relative-to=. "$root/training/molora_training/configs")  # as it is to stand in the results
gpus=$(python3 -c "import torch; print(torch.cuda.device_count())")
[ "$gpus" -gt 0 ] || { echo "No GPU is here." >&2; exit 1; }
began=$SECONDS

# step NAME COMMAND...: one step, its output in a log of its own.
step() {
    local name=$1
    shift
    if "$@" >"$out/log/$name.txt" 2>&1; then echo "$((SECONDS - began)) s $name"; else echo "$((SECONDS - began)) s $name FAILED"; fi >>"$out/progress.txt"
}
molora() { python3 -m molora "$@"; }
# shared NAME N COMMAND...: a table that N processes for each GPU make together, put together by one more.
shared() {
    local name=$1 each=$(($2 * gpus)) one parts=()
    shift 2
    for one in $(seq 0 $((each - 1))); do
        CUDA_VISIBLE_DEVICES=$((one % gpus)) step "$name-$one" molora "$@" --share "$one/$each" &
        parts+=($!)
    done
    wait "${parts[@]}"
    step "$name" molora "$@"
}
kept() { # the table of all routers that are trained by now; what is measured stays
    shared quality 5 eval quality runs/quality/stack --routers runs/quality/routers --out "$out/quality.json"
}

many=("processes=$((6 * gpus))" "router_processes=$((6 * gpus))")
quality=(train starter --config "$configs/quality.yaml" "${many[@]}")
step trained molora "${quality[@]}" integration=null
[ -f runs/quality/stack/molora.json ] || { echo "no stack: see $out/log/trained.txt" | tee -a "$out/progress.txt" >&2; exit 1; }

mkdir -p runs/candidates
for name in gated then-label then-both then-tokens; do ln -sfn "$PWD/runs/quality/routers/$name" "runs/candidates/$name"; done
shared validation 4 eval quality runs/quality/routers/gated --routers runs/candidates --split validation --out "$out/validation.json"
own=$(python3 -c "import json, sys; print(json.load(open(sys.argv[1]))['best'].split()[1].rstrip(','))" "$out/validation.json") || own=gated
echo "$((SECONDS - began)) s best on validation: $own" >>"$out/progress.txt"
step adding molora eval adding runs/quality/routers/without-two runs/quality/routers/gated --out "$out/adding.json" &
CUDA_VISIBLE_DEVICES=$((gpus - 1)) step integrated molora "${quality[@]}" "own=$own"
if [ -n "$other" ]; then
    CUDA_VISIBLE_DEVICES=$((gpus - 1)) step headline molora eval headline runs/quality/stack "$other" --out "$out/headline.json" &
fi
kept
wait
# How long the default router takes where nothing else runs.
CUDA_VISIBLE_DEVICES=0 step alone molora train router model=runs/quality/stack.yaml out=runs/alone router.hidden=512 \
    'router.reads=[0, 4]' mixed=3000 documents=2000 in_a_turn=2000 asides=2000 both=600 null_start=4 epochs=3
cp runs/alone/router.metrics.json "$out/alone.json"

[ "$own" = gated ] && seeds_own=gated || seeds_own=then-label
for seed in 1 2; do # the main comparison from nothing
    from_nothing=(train starter --config "$configs/quality-seed.yaml" "seed=$seed" "work=runs/seed-$seed" "out=runs/seed-$seed/stack" "own=$seeds_own")
    CUDA_VISIBLE_DEVICES=$(((seed - 1) % gpus)) step "seed-$seed-trained" molora "${from_nothing[@]}" processes=5 &
done
wait
for seed in 1 2; do
    shared "quality-seed-$seed" 3 eval quality "runs/seed-$seed/stack" --routers "runs/seed-$seed/routers" --limit 100 \
        --out "$out/quality-seed-$seed.json"
done
step routers-trained molora train starter --config "$configs/quality-routers.yaml" "${many[@]}"
kept
step many-trained molora train starter --config "$configs/many.yaml" "${many[@]}"
step scale molora eval scale runs/many/routers --out "$out/scale.json"
echo "$((SECONDS - began)) s all" >>"$out/progress.txt"
! grep FAILED "$out/progress.txt" >&2
