#!/usr/bin/env bash
# Makes the environment of federated training: this repository with its extra "federated". Flower pins older versions of
# what the server, Ray's replicas and the command line run on here, so it is an environment apart.
#   tools/federated_env.sh [FOLDER]   (default: .venv-federated; Python 3.11)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
env=${1:-$root/.venv-federated}
"${PYTHON:-python3.11}" -m venv "$env"
pip() { "$env/bin/pip" "$@" --disable-pip-version-check; }
torch=$(grep '^torch==' "$root/constraints.txt")
pip install "$torch"
# What Flower pins itself is left to it.
grep -vE '^(rich|typer|fastapi|starlette|uvicorn|ray|protobuf|httpx|openai|schemathesis|gradio)==' "$root/constraints.txt" \
    > "$env/constraints.txt"
pip install -c "$env/constraints.txt" -e "$root[federated]" pytest
touch "$env/.installed"
