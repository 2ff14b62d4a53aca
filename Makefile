# make demo   start the browser demo (the first start installs and fetches the base model)
# make test   lint, types and tests
# make lint   ruff and mypy only
# make vllm   the tests of the vLLM plugin, in an environment of their own (3 GB)
# make federated  the tests of federated training, in an environment of their own
# make docs   build the pages of docs/ as a site in site/, in an environment of its own
# make clean  remove the virtual environment and every cache in this folder

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
INSTALL_INPUTS := pyproject.toml constraints.txt

# Without PASSIVE a waiting OpenMP thread spins and takes the core that another process needs.
TEST_ENV := OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false GRADIO_ANALYTICS_ENABLED=False

REPLICAS := tests/serve/test_replicas.py
BROWSER := tests/browser
NO_BROWSER := ==> NOT RUN: the demo in a browser ($(BROWSER)). Install a Chromium, or name one in MOLORA_CHROMIUM.

.DEFAULT_GOAL := help
.PHONY: help demo test lint vllm federated docs clean

help:
	@sed -n 's/^# make/make/p' Makefile

# With what its tab Teach needs.
demo: $(VENV)/.installed-demo,train,personalize
	@OMP_WAIT_POLICY=PASSIVE GRADIO_ANALYTICS_ENABLED=False $(BIN)/molora demo $(ARGS)

test: lint
	@echo "==> pytest"
	@$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist worksteal $(or $(ARGS),--ignore $(REPLICAS) --ignore $(BROWSER))
# Its cluster takes both cores, and is started once if one process runs them all.
	$(if $(ARGS),,@$(TEST_ENV) $(BIN)/python -m pytest $(REPLICAS))
# A browser's tests have an event loop in the main thread, where others start their own.
	$(if $(ARGS),,@if tools/chromium.sh; then \
		$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile $(BROWSER); else echo "$(NO_BROWSER)"; fi)

lint: $(VENV)/.installed-all
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy molora training/molora_training demo/molora_demo

vllm: .venv-vllm/.installed
	@OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/vllm $(ARGS)

.venv-vllm/.installed: tools/vllm_env.sh
	@echo "==> vLLM's CPU build (3 GB, once)"
	@tools/vllm_env.sh .venv-vllm

federated: .venv-federated/.installed
	@$(TEST_ENV) OMP_NUM_THREADS=1 FLWR_TELEMETRY_ENABLED=0 .venv-federated/bin/python -m pytest tests/federated $(ARGS)

.venv-federated/.installed: tools/federated_env.sh pyproject.toml
	@echo "==> Flower, and torch once more"
	@tools/federated_env.sh .venv-federated

docs: .venv-docs/.installed
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet $(ARGS)
	@.venv-docs/bin/python tools/check_site.py site

.venv-docs/.installed: tools/docs_env.sh pyproject.toml
	@echo "==> mkdocs"
	@tools/docs_env.sh .venv-docs

clean:
	rm -rf $(VENV) .venv-vllm .venv-federated .venv-docs site build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch comes first and alone: it is most of the download, and its own bar shows that something happens.
$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "MoLoRA needs Python 3.11 or newer; install it or run: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "==> [1/3] virtual environment with $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> [2/3] $(TORCH) (the largest download, once)"
	@$(BIN)/python -m pip install $(TORCH)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.torch $(INSTALL_INPUTS)
	@echo "==> [3/3] MoLoRA and its dependencies ($*)"
	@$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	@touch $@
