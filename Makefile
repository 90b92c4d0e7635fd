# make demo    the whole overlay as local processes: relocate, train, evaluate, serve, ask
# make test    lint, types and all tests
# make bench-serving    what the guard costs vLLM: ten minutes on an idle machine (ARGS=--quick: three)
# Everything is installed into .venv by the first of them (about 3 GB, once).

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin
TORCH := torch==2.13.0
OVERLAY ?= overlays/kind
QUESTION ?= What is the best hotel in Seville?
# Where there is no terminal to press Ctrl-C in, the demo ends when the question is answered. EXIT= keeps it serving.
EXIT ?= $(shell test -t 0 || echo --exit)

.PHONY: demo test bench-serving setup clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python -m jobs local $(OVERLAY) --ask "$(QUESTION)" $(EXIT) $(ARGS)

test: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench-serving: setup
	$(BIN)/python -m benchmarks.serving $(ARGS)

setup: .venv/installed

# --no-deps: the lists are complete, and the CPU build of vLLM asks for packages that have no CPU build and break it.
# The CPU build of torch, because the default one brings gigabytes of CUDA: from the configured index if it has one,
# else from PyTorch's own.
.venv/installed: serving/requirements-cpu.txt tests/requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and \
	  f"error: Python 3.11 is needed (the CPU build of vLLM is made for it), this is {v[0]}.{v[1]}. " \
	  "Install it and run: make PYTHON=python3.11 ...")'
	@command -v kubectl >/dev/null || { echo "error: kubectl is needed to render the overlays (no cluster is): get 1.32" \
	  "or newer from https://kubernetes.io/docs/tasks/tools/" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@echo "installing the pinned packages into .venv: about 3 GB, some minutes, once"
	$(BIN)/pip install --no-deps "$(TORCH)+cpu" \
	  || $(BIN)/pip install --no-deps "$(TORCH)+cpu" --index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install --no-deps -r serving/requirements-cpu.txt -r tests/requirements.txt
	@touch $@

clean:
	rm -rf .venv .local
