#!/usr/bin/env bash
# Makes the environment in which the pages are built: the extra "docs" alone, without MoLoRA itself and torch, for the
# reference is read from the sources.
#   tools/docs_env.sh [FOLDER]   (default: .venv-docs; Python 3.11)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
env=${1:-$root/.venv-docs}
"${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/python" - "$root/pyproject.toml" <<'EOF' | xargs -d '\n' "$env/bin/pip" install --disable-pip-version-check
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["docs"], sep="\n")
EOF
touch "$env/.installed"
