#!/usr/bin/env bash
# Trains the network that makes adapters of documents in its four stages, and measures it after all but the first.
# The data has to be there: molora train data passages math code medicine law commonsense puzzles science
#   benchmarks/documents.sh [OUT]   OUT: folder of the results (default: runs/results)
# An interrupted run goes on where it was. What is trained goes to runs/ of the folder in which it is started.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/kernels:$root/training:$root/demo${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
out=${1:-runs/results}
mkdir -p "$out"
for stage in needle long facts passages; do
    [ -f "runs/document/$stage/metrics.json" ] || python3 -m molora train hypernet doc \
        --config "$(realpath --relative-to=. "$root/training/molora_training/configs/document-$stage.yaml")"
    [ "$stage" = needle ] || python3 -m molora eval documents "runs/document/$stage" --out "$out/documents-$stage.json"
done
