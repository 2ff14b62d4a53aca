#!/usr/bin/env bash
# Trains the starter stack and measures the main table, on whatever machine this runs. Resumes where it was.
#   benchmarks/starter.sh DATA WORK [adapters at once] [routers at once] [config.yaml]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels:training:demo${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
data=$1 work=$2 processes=${3:-1}
python3 -c "
import sys
from molora_training import starter
from molora_training.settings import load_settings
if __name__ == '__main__':
    starter.train(load_settings(starter.StarterSettings, sys.argv[1] or starter.CONFIG, sys.argv[2:]))
" "${5:-}" "data=$data" "work=$work" "out=$work/starter" "processes=$processes" "router_processes=${4:-1}"
python3 -c "
import sys
from pathlib import Path
from molora_training import main_table
data, work = map(Path, sys.argv[1:])
main_table.run(work / 'starter', work / 'routers', data, work / 'main.json', 'molora eval main', 16384)
" "$data" "$work"
