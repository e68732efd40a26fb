# Everything starts from a fresh clone: each target installs first, once, into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
CPU_INDEX := https://download.pytorch.org/whl/cpu
# On small models one thread is faster than several that wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: help quickstart install engines environments test lint structure docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

quickstart: $(STAMP)  ## train a tiny model on this machine and show that it learned
	@$(BIN)/verl quickstart

install: $(STAMP)  ## make .venv with the pinned dependencies and verl itself
	@echo "verl is installed in $(VENV)"

engines:  ## make .venv-engines with real vLLM and SGLang for a machine without a GPU, for their tests
	@echo "installing vLLM and SGLang into .venv-engines, about 5 minutes the first time"
	@PYTHON=$(PYTHON) sh tests/cpu/install_engines.sh .venv-engines

environments: $(STAMP)  ## make .venv-environments and others with environments and agents from PyPI, for their tests
	@echo "installing environments from PyPI, about 3 minutes the first time"
	@$(BIN)/python -m tests.agents.environments.public_environments --requirements | while read -r folder requirements; do \
		echo "  $$folder: $$requirements"; \
		$(PYTHON) -m venv $$folder && $$folder/bin/python -m pip install -qq --disable-pip-version-check $$requirements \
			|| exit 1; \
	done

test: $(STAMP)  ## run the unit tests
	@$(BIN)/python -m pytest tests -q -n 2

lint: $(STAMP)  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/mypy

structure: $(STAMP)  ## measure sizes, names and the path of a step against their goals
	@$(BIN)/python -m tests.structure_table

docs: $(STAMP)  ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

clean:  ## delete .venv and everything that was built or cached
	rm -rf $(VENV) .venv-engines .venv-environments .venv-frameworks .venv-verifiers .venv-verifiers-0 site build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else \
		f"need Python 3.10 or newer, got {v.major}.{v.minor}; run: make PYTHON=/path/to/python3")'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Without a GPU the CPU build of PyTorch goes first: the default Linux build brings gigabytes of CUDA libraries. It is looked for
# where pip looks anyway, then at PyTorch's own index; without either, the default build works too.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), about 4 minutes the first time"
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		echo "  no NVIDIA GPU: the CPU build of PyTorch $(TORCH)"; \
		$(PIP) "torch==$(TORCH)+cpu" 2>/dev/null \
			|| $(PIP) --retries 1 --extra-index-url $(CPU_INDEX) "torch==$(TORCH)+cpu" 2>/dev/null \
			|| echo "  no CPU build found, the default build comes next (several GB)"; \
	fi
	@echo "  verl and its dependencies"
	@$(PIP) -e ".[dev,docs,lora,mcp,ray,search,smollm2]"
	@# By itself: a part of it is compiled, and everything else works without it.
	@$(PIP) -e ".[reasoning-gym]" 2>/dev/null || echo "  reasoning-gym could not be installed, so task:reasoning-gym/NAME and" \
		"quickstart --model smollm2 will not work; with a C compiler, run: $(BIN)/python -m pip install reasoning-gym"
	@# By themselves: the libraries that they name are for GPUs, and for models behind APIs.
	@$(PIP) --no-deps megatron-core bfcl-eval
	@touch $@
